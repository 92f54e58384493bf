"""Hands runs to Slurm, all or none: what each job needs is written, and its jobs are submitted.

Where there are several jobs all are submitted on hold and released together, so that none begins
before sbatch has accepted the last one.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_pretrain.config import RunConfig, dump_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.launch.freeze import SCRIPT, Code, freeze
from titans_pretrain.launch.render import Job
from titans_pretrain.launch.sweep import Member
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """One run that may be submitted: it has been checked, nothing is written."""

    member: Member
    config: RunConfig
    folder: RunFolder
    layout: str
    memory: str  # what it holds and takes, by estimate
    job: Job
    script: str
    changed: tuple[str, ...] = ()  # of its config, since it was last submitted


def submit(runs: Sequence[Run], code: Code, chain: int = 1, at_once: int = 0) -> list[list[str]]:
    """Submits all runs; returns the ids of each run's jobs, as many as `chain`.

    Args:
        chain: jobs of a run, each of which waits for the end of the one before it.
        at_once: runs at a time, each of which waits for the run so many before it; 0: all.
    Raises ConfigError or NodeError with no job and no file left.
    """
    slurm.call(["sbatch", "--version"])
    hold = ["--hold"] if len(runs) * chain > 1 else []
    ids: list[list[str]] = []
    with contextlib.ExitStack() as undo:
        for number, run in enumerate(runs):
            _write(run, code, undo)
            after = ids[number - at_once][-1] if 0 < at_once <= number else ""
            ids.append([])
            for _ in range(chain):
                wait = [f"--dependency=afterany:{after}"] if after else []
                after = _sbatch(run, [*hold, *wait], ids)
                undo.callback(_cancel, after)
                ids[-1].append(after)
            try:
                atomic_write(run.job.frozen / "id", "".join(f"{i}\n" for i in ids[-1]))
            except OSError as e:
                raise storage_error(e, f"writing {run.job.frozen}/id", starting=True) from e
        if hold:
            slurm.call(["scontrol", "release", ",".join(i for jobs in ids for i in jobs)])
        undo.pop_all()
    return ids


def _sbatch(run: Run, options: list[str], before: list[list[str]]) -> str:
    """Submits one job; returns its id."""
    try:
        said = slurm.call(["sbatch", "--parsable", *options, str(run.job.frozen / SCRIPT)])
    except ConfigError as e:
        earlier = [i for jobs in before for i in jobs]
        undone = ""
        if earlier:
            which = f", at {run.member.name or run.job.name}"
            undone = f"\n    Jobs {', '.join(earlier)}, submitted before it, are cancelled{which}"
        raise ConfigError(e.value + undone, e.rule, e.remedy) from e
    return said.strip().partition(";")[0]


def _cancel(job: str) -> None:
    try:
        slurm.call(["scancel", job])
    except ConfigError as e:
        print(f"job {job} could not be cancelled: scancel {job}\n{e.value}", file=sys.stderr)


def _write(run: Run, code: Code, undo: contextlib.ExitStack) -> None:
    """Fills the folder of a submission; `undo` removes it, and what else was made on the way."""
    folder, frozen = run.folder, run.job.frozen
    for path in (*reversed(folder.path.parents), folder.path, folder.jobs, folder.logs):
        if not path.exists():
            undo.callback(_remove_empty, path)
    command = ["titans-pretrain", *sys.argv[1:]]
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        folder.jobs.mkdir(exist_ok=True)
        frozen.mkdir()  # of two submissions at one moment one stops here
        undo.callback(shutil.rmtree, frozen, ignore_errors=True)
        freeze(frozen, code, dump_config(run.config), run.script, command)
    except FileExistsError as e:
        raise ConfigError(
            f"{frozen} has just been made by another submission",
            "one job at a time trains a run",
            f"see squeue, and {folder.jobs}/*/id",
        ) from e
    except OSError as e:
        raise storage_error(e, f"writing {frozen}", starting=True) from e


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not there, or somebody else's files are in it
        folder.rmdir()
