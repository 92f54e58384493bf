"""The job script of one submission: the template, with the lines between its two marks written."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from titans_pretrain.config import SiteConfig
from titans_pretrain.errors import ConfigError

BEGIN, END = "# >>> written by submit\n", "# <<< written by submit\n"
TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "pretrain.sbatch"
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


@dataclass(frozen=True)
class Job:
    """What a job script is written for."""

    name: str
    nodes: int
    gpus_per_node: int
    time: str | None
    run: Path  # the run folder
    frozen: Path  # holds code/ and config.yaml
    workdir: Path  # relative paths of the config start here
    python: str
    requeue: bool = True  # false: it ends with its life; a chain's next job goes on


def render(job: Job, site: SiteConfig) -> str:
    """The job script. Raises ConfigError if the template cannot be used."""
    path = Path(site.template) if site.template else TEMPLATE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"job script {path}: {e.strerror}",
            "a job is written from a template",
            "submit from a checkout, which has slurm/pretrain.sbatch, or name one as template: in "
            "the site file",
        ) from e
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(
            f"job script {path}: its two marks are not there",
            f"what submit writes stands between {BEGIN.strip()!r} and {END.strip()!r}",
            "copy these two lines from slurm/pretrain.sbatch",
        )
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [f"#SBATCH {option}" for option in options(job, site)] + settings(job, site)
    return before + BEGIN + "".join(f"{line}\n" for line in lines) + END + after


def options(job: Job, site: SiteConfig) -> list[str]:
    """Of sbatch."""
    asked = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus_per_node,
        "gres": f"{site.gres}:{job.gpus_per_node}" if site.gres else None,
        "cpus-per-task": site.cpus_per_task,
        "time": job.time,
        "exclude": ",".join(site.exclude) or None,
        "signal": f"USR1@{site.stop_ahead}",
        "open-mode": "append",
        "chdir": job.workdir,
        "output": job.run / "logs" / "job-%j.out",
    }
    flags = ["--exclusive"] if site.exclusive else []
    values = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return [*values, *flags, "--requeue" if job.requeue else "--no-requeue", *site.sbatch]


def settings(job: Job, site: SiteConfig) -> list[str]:
    """Lines of shell that the rest of the template reads."""
    quote = shlex.quote
    env = dict(site.env)
    preflight = site.preflight.model_dump_json() if site.preflight else ""
    lines = [
        f"python={quote(job.python)} shell_python={quote(site.shell_python)}",
        f"code={quote(str(job.frozen / 'code'))}",
        f"train=({quote(str(job.frozen / 'config.yaml'))})",
        f"run={quote(str(job.run))}",
        f"submission={quote(str(job.frozen))} requeue={'yes' if job.requeue else 'no'}",
        f"srun_options=({' '.join(map(quote, site.srun))})",
        f"wrap=({' '.join(map(quote, site.wrap))})",
        f"wait_seconds={site.wait} avoid={quote(','.join(site.exclude)) if site.exclude else ''}",
        f"preflight={quote(preflight) if preflight else ''}",
    ]
    # Double quotes: $SLURM_JOB_ID in it is the job's.
    lines.append(f'local_disk="{site.local_disk}"' if site.local_disk else "local_disk=")
    lines += [f"export {name}={quote(value)}" for name, value in env.items()]
    setup = [f"  {line}" for line in site.setup]
    return [*lines, *(["setup() {", *setup, "}"] if setup else ["setup() { :; }"])]


def seconds(time: str) -> int:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ConfigError."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(
            f"time limit {time!r}",
            "sbatch reads minutes, H:M:S or days-H:M:S",
            "e.g. --time 24:00:00, or 2-00:00:00",
        )
    a, b, c = (int(found[k] or 0) for k in "abc")
    if found["d"] is not None:
        return ((int(found["d"]) * 24 + a) * 60 + b) * 60 + c
    if found["c"] is not None:
        return (a * 60 + b) * 60 + c
    return a * 60 + b
