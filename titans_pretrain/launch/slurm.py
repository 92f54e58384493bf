"""Slurm's own commands: whether they are there, and what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.errors import ConfigError


def have(command: str) -> bool:
    return shutil.which(command) is not None


def call(command: Sequence[str], seconds: float | None = None) -> str:
    """What `command` prints. Raises ConfigError with its own words if it refuses, or if it takes
    longer than so many seconds."""
    if not have(command[0]):
        raise ConfigError(
            f"no {command[0]} on this machine",
            "Slurm's commands are on the PATH of a login node",
            "log in to one, or load Slurm's module; `submit --dry-run` works without, and so does "
            "`train --ranks N` on one machine",
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired as e:
        raise ConfigError(
            f"{command[0]} said nothing for {seconds:g} s",
            "Slurm's controller answers",
            "try again; if it stays silent, ask the cluster's administrator",
        ) from e
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).replace("\n", "\n    ")
        raise ConfigError(
            f"{command[0]} left with {done.returncode} and said:\n    {said}",
            "Slurm accepts what it is asked for",
            "partition, account, qos, time and further options are the site file's (--site); "
            "sinfo lists partitions",
        )
    return done.stdout


def state(job: str) -> str:
    """E.g. RUNNING or PENDING; nothing if it has ended. Raises ConfigError if Slurm is silent."""
    try:
        return call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip()
    except ConfigError as e:
        if "Invalid job id" in e.value:  # ended long ago
            return ""
        raise


class Queued(NamedTuple):
    """A job that has not ended."""

    job: str
    state: str  # e.g. RUNNING
    reason: str  # why it waits, or None
    nodes: str  # e.g. tn[1-2]; "": none yet


def queue(jobs: Sequence[str], seconds: float = 10.0) -> dict[str, Queued]:
    """What Slurm says of these jobs, asked once; those that have ended are left out. Raises
    ConfigError if it is not there, refuses, or says nothing for so many seconds."""
    form = "%A|%T|%r|%N"
    command = ["squeue", "--noheader", f"--jobs={','.join(jobs)}", f"--format={form}"]
    try:
        said = call(command, seconds)
    except ConfigError as e:
        if "Invalid job id" in e.value:  # all of them ended long ago
            return {}
        raise
    rows = [line.split("|") for line in said.splitlines()]
    return {row[0]: Queued(*row) for row in rows if len(row) == 4}


# Why a job is pending that Slurm accepted and will not start as it is.
_NEVER = re.compile(
    r"Invalid|PartitionConfig|BadConstraints|NodeLimit|TimeLimit|MaxWallDuration|NotAllowed"
)


def never_starts(jobs: Sequence[str], wait: float = 2.0) -> dict[str, str]:
    """Those of `jobs` that pend for a reason that does not pass, and the reason, e.g.
    PartitionTimeLimit. Slurm finds it soon after the submission: `wait` seconds at most. None if
    Slurm does not answer."""
    deadline = time.monotonic() + wait
    while True:
        try:
            reasons = {job: found.reason for job, found in queue(jobs).items()}
        except ConfigError:  # the jobs are submitted all the same
            return {}
        undecided = set(reasons.values()) & {"None", "JobHeldUser", "PartitionConfig"}
        if not undecided or time.monotonic() > deadline:
            return {job: why for job, why in reasons.items() if _NEVER.search(why)}
        time.sleep(0.2)


def jobs_of(run: Path) -> list[str]:
    """Ids of the jobs that were submitted for a run, or have begun, the oldest first."""
    jobs = run / "jobs"
    ids = {i for path in jobs.glob("*/id") for i in path.read_text(encoding="utf-8").split()}
    ids |= {path.name.split(".")[1] for path in jobs.glob("begun.*.*")}
    return sorted(ids, key=lambda i: (len(i), i))
