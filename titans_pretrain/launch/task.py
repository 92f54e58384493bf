"""A rank that srun started: its place from Slurm's variables, its marks for the job script.

A job script sets TITANS_RUN and TITANS_JOB (run/marks.py); without them all of this does nothing.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType

from titans_pretrain.errors import (
    ConfigError,
    LostPeerError,
    NodeError,
    TitansError,
    exit_code_of,
    this_node,
)
from titans_pretrain.run import marks, signals
from titans_pretrain.run.files import storage_error


class SlurmTask:
    """The length of a rank's work: handlers, RANK and its like, `started`, and the failure."""

    def __enter__(self) -> SlurmTask:
        mine = marks.here()
        if mine is None:
            return self
        try:
            _begin(mine)
        except TitansError as e:
            self.__exit__(type(e), e, e.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, LostPeerError):
            what = error.value if isinstance(error, TitansError) else str(error)
            bad = error.node if isinstance(error, NodeError) else ""
            marks.failed(exit_code_of(error), type(error).__name__, what, bad)


def _begin(mine: marks.Marks) -> None:
    signals.install()  # before torch is imported, which takes seconds
    place_from_slurm(os.environ)
    make_local_disk(os.environ.get("TMPDIR", ""))
    try:
        if os.environ["RANK"] == "0":
            mine.write("started")
    except OSError as e:
        raise storage_error(e, f"beginning in {mine.run}", starting=True) from e


def make_local_disk(path: str) -> None:
    """Makes the folder on this node's own disk, if there is to be one. Raises NodeError."""
    try:
        if path:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise NodeError(
            f"TMPDIR={path}: {e.strerror} (on {socket.gethostname()})",
            "a site's local_disk can be made on each node",
            "mend it there, or change local_disk in the site file",
            this_node(),
        ) from e


def place_from_slurm(env: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from what srun tells a task.

    Raises ConfigError where another launcher stands between srun and the rank, or none did start
    it.
    """
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    lacks = [name for name in (*names, "SLURM_NODEID") if name not in env]
    if lacks or "RANK" in env:
        raise ConfigError(
            f"RANK={env['RANK']} in a job's task" if "RANK" in env else f"no {', '.join(lacks)}",
            "srun starts one task a GPU and no launcher stands between",
            "let the job script call python from srun directly, or unset TITANS_JOB",
        )
    on_each = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(on_each[int(env["SLURM_NODEID"])])


def tasks_per_node(text: str) -> list[int]:
    """E.g. [2, 2, 2, 1] of "2(x3),1"."""
    runs = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return list(
        itertools.chain.from_iterable([int(m[1])] * int(m[2] or 1) for m in runs if m is not None)
    )
