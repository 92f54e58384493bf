"""What a Slurm cluster is like: the file that `titans-pretrain submit --site` reads."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from titans_pretrain.config.section import Fraction, Positive, PositiveFloat, Section


class PreflightConfig(Section):
    """Bounds of the checks of each node before a life begins. GB and MB are 10^9, 10^6 bytes."""

    seconds: Annotated[float, Field(ge=5)] = 30.0  # of one check; then it counts as failed
    start_seconds: Annotated[float, Field(ge=5)] = 120.0  # until all ranks have imported torch
    matmul_tflops: PositiveFloat | None = None  # of each GPU, bf16; null: no floor
    matmul_of_median: Fraction = 0.7  # of the median of all ranks
    all_reduce_gb_per_s: PositiveFloat | None = None  # between two nodes, as nccl-tests' busbw
    disk_free_gb: Annotated[float, Field(ge=0)] = 1.0  # run folder and local_disk
    disk_mb_per_s: PositiveFloat | None = None  # all nodes writing at once
    clock_seconds: PositiveFloat = 5.0  # from the median of all nodes


class SiteConfig(Section):
    """Nothing of it changes what is computed. Values go into the job script as they are."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None  # limit of a job, as sbatch writes it; `submit --time` comes first
    gpus_per_node: Positive = 8  # each gets one rank; `submit --gpus-per-node` comes first
    # The GPU's name or file, as for `plan --gpu`: `submit` refuses what cannot fit. null: it
    # does not look.
    gpu: str | None = None
    gres: str | None = "gpu"  # --gres=GRES:gpus_per_node; null: none is asked for
    cpus_per_task: Positive | None = None  # of each rank
    exclusive: bool = True
    exclude: list[str] = Field(default=[])  # nodes, each by its name
    sbatch: list[str] = Field(default=[])  # further options of sbatch, e.g. "--mem=0"
    requeue: bool = True  # false where a job may not queue itself again: `submit --chain N`
    # Seconds before the time limit at which ranks finish their step, save and leave. Let it be
    # twice the time of a step and a save, and a minute.
    stop_ahead: Annotated[int, Field(ge=60, le=65535)] = 300
    wait: Annotated[int, Field(ge=10)] = 60  # seconds that other ranks have after one has left
    srun: list[str] = Field(default=[])  # further options of srun, e.g. of a container
    # Words between srun and python, e.g. [apptainer, exec, --nv, IMAGE]. What they start must pass
    # signals and the exit code on, so a script ends in exec "$@".
    wrap: list[str] = Field(default=[])
    python: str | None = None  # of the ranks; default: the one that submits
    shell_python: str = "python3"  # of the batch shell, outside of any container: 3.8 or later
    setup: list[str] = Field(default=[])  # lines of shell before the ranks, e.g. "module load cuda"
    env: dict[str, str] = Field(default={})  # for the ranks, e.g. NCCL_SOCKET_IFNAME
    local_disk: str | None = None  # a folder on each node's own disk: TMPDIR of the ranks
    preflight: PreflightConfig | None = PreflightConfig()  # null: none
    template: str | None = None  # job script; default: slurm/pretrain.sbatch

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError(
                f"time={value}; YAML takes 24:00:00 for a number, of seconds; quote it: "
                'time: "24:00:00"'
            )
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(
                    f"the option {option!r}; an entry is one option with its dashes, on one line; "
                    "e.g. --mem=0"
                )
        return value

    @field_validator("wrap")
    @classmethod
    def _words(cls, value: list[str]) -> list[str]:
        for word in value:
            if not word or "\n" in word or (value[0].startswith("-")):
                raise ValueError(
                    f"wrap: {word!r}; a program and its arguments, each an entry on one line; "
                    "e.g. [apptainer, exec, --nv, IMAGE]; options of srun are in srun:"
                )
        return value

    @field_validator("env")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"env: the name {name!r}; a variable's name has letters, digits and _; "
                    "rename it"
                )
        return value

    @model_validator(mode="after")
    def _one_word(self) -> SiteConfig:
        for name in ("partition", "account", "qos", "gres", "time"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"\s", value)):
                raise ValueError(
                    f"{name}={value!r}; it is one word for sbatch; remove the blanks, or leave "
                    "it out"
                )
        return self
