"""`titans-pretrain stop RUN`: the run saves after the step it is in and is not started again."""

from __future__ import annotations

import argparse
import getpass
import time
from pathlib import Path

from titans_pretrain.errors import EXIT_DONE, ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.folder import RunFolder


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stop = commands.add_parser(
        "stop",
        help="save a run and end it for good",
        description="Writes RUN/stop: the run saves after its step, and neither its job nor a "
        "later start goes on. Jobs in Slurm are told at once.",
    )
    stop.add_argument("folder", metavar="RUN", type=Path, help="the run folder")
    stop.set_defaults(run=stop_run)


def stop_run(args: argparse.Namespace) -> int:
    """The command. Raises ConfigError or NodeError."""
    run = RunFolder(args.folder)
    if not run.config.exists() and not run.jobs.exists():
        raise ConfigError(
            f"{run.path} is no run folder", "a run's folder is named", "give its folder="
        )
    try:
        who = f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())} by {getpass.getuser()}\n"
        atomic_write(run.stop, who)  # first: whoever is told finds it
    except OSError as e:
        raise storage_error(e, f"writing {run.stop}", starting=True) from e
    print(f"{run.stop} is written: a rank that is running saves after its step and leaves")
    jobs = slurm.jobs_of(run.path)
    if jobs and not slurm.have("squeue"):
        print(f"no squeue on this machine: jobs {', '.join(jobs)} are not told in another way")
        jobs = []
    for job in jobs:
        state = slurm.state(job)
        if state == "PENDING":
            slurm.call(["scancel", job])
        elif state:
            slurm.call(["scancel", "--signal=USR1", job])
        if state:
            print(f"job {job} was {state}: {'cancelled' if state == 'PENDING' else 'told to save'}")
    print(f"to go on later: once its last job has ended, remove {run.stop} and start it again")
    return EXIT_DONE
