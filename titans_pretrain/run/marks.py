"""What the ranks of a Slurm job leave in the run folder for the job script: one small file each.

srun reports the highest exit code of all ranks, those included that it ended itself; so what
happened is read from these files, and the code only where there is none. All lie in RUN/jobs and
end in .<job>.<life>, where life is Slurm's count of requeues:

begun     the newest checkpoint's step as the life began   (the job script)
started   a rank has begun                                 (rank 0)
saved     a checkpoint was saved on request                (rank 0, before any rank leaves)
failure   the first failure, as JSON                       (the rank that was first)
bad       nodes to avoid from now on, one a line           (whoever finds one)
unfit     why no life can begin, in words                  (the preflight's judge)
preflight a folder: what each rank found                   (launch/preflight.py)
ended     exit code and reason, if the job does not go on  (the job script)

Without TITANS_RUN and TITANS_JOB in the environment (a run without a job script) nothing is
written. As launch/verdict.py it runs on any Python from 3.8 on, and imports only what does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.errors import EXIT_NODE

RUN, JOB = "TITANS_RUN", "TITANS_JOB"  # the run folder; <job>.<life>


class Failure(NamedTuple):
    """The first failure of a life."""

    code: int  # exit code, see errors.py
    kind: str  # class of the error
    rank: int
    host: str
    what: str  # its message


class Marks:
    """The files of one life of one job."""

    def __init__(self, run: Path, job: str, life: int) -> None:
        self.run, self.job, self.life = run, job, life
        self._folder = run / "jobs"

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.{self.job}.{self.life}"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def write(self, name: str, text: str = "") -> None:
        """Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(text, encoding="utf-8")

    def fail(self, failure: Failure) -> None:
        """Keeps `failure` unless there is an earlier one. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), self.path("failure").open("x") as file:
            file.write(json.dumps(failure._asdict()) + "\n")

    def failure(self) -> Failure | None:
        """The first failure. Raises OSError; one that could not be written counts as the disk's."""
        try:
            return Failure(**json.loads(self.path("failure").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return Failure(EXIT_NODE, "unknown", -1, "?", "what failed could not be written down")

    def avoid(self, node: str) -> None:
        """Adds `node` to those that are bad. Raises OSError."""
        if node not in self.lines("bad"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self.path("bad").open("a", encoding="utf-8") as file:
                file.write(f"{node}\n")

    def lines(self, name: str) -> list[str]:
        """The words of a mark, none if it is not there. Raises OSError."""
        path = self.path(name)
        return path.read_text(encoding="utf-8").split() if path.exists() else []


def here() -> Marks | None:
    """Those of the life that this process belongs to; None without a job script."""
    job, _, life = os.environ.get(JOB, "").rpartition(".")
    run = os.environ.get(RUN, "")
    return Marks(Path(run), job, int(life)) if run and job and life.isdigit() else None


def patience() -> float:
    """Seconds to wait for a run folder that is held: a job may start before the claim of another
    one whose node is gone runs out (lock.py)."""
    return 150.0 if here() is not None else 0.0


def saved() -> None:
    """Rank 0, once a save on request is whole: the job may be queued again. Raises OSError."""
    if (marks := here()) is not None:
        marks.write("saved")


def failed(code: int, kind: str, what: str, bad: str = "") -> None:
    """Any rank, as it fails. `bad`: the node at fault, if it is one's alone. If the disk is the
    fault, the exit code has to tell it alone."""
    marks = here()
    if marks is None:
        return
    rank = int(os.environ.get("RANK", 0))
    try:
        marks.fail(Failure(code, kind, rank, socket.gethostname(), what))
        if bad:
            marks.avoid(bad)
    except OSError as e:
        print(f"writing {marks.path('failure')}: {e}", file=sys.stderr)
