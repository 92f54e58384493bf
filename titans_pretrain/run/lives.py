"""The lives of a run, RUN/lives.jsonl: when each began and ended, where, from which step to which.

Unlike the metrics nothing of it is ever cut: a life that went back to an earlier checkpoint shows
here what it repeated. A line holds some facts of one life; those of its later lines are added:

{"life", "began", "host", "pid", "ranks", "layout",       as it claims the folder; times: Unix
 "job", "queued",                                         of Slurm, and its count of requeues
 "reached", "seen"}                                       of the life before: its last recorded
                                                          step, and its last sign of life
{"life", "from", "source", "hosts"}                       the step it goes on from, and what holds
                                                          it (nothing: from scratch)
{"life", "ended", "step", "code", "why"}                  if it could still say so
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from titans_pretrain.errors import EXIT_OTHER, TitansError
from titans_pretrain.run import marks
from titans_pretrain.run.files import storage_error
from titans_pretrain.run.lines import read_lines, read_tail

_log = logging.getLogger(__name__)

Facts = dict[str, Any]
MOST = 400  # letters of what ended a life; all of it is in the log


class LifeRecord:
    """This life's lines. As a context manager it notes how an error ends it. Rank 0 holds one.

    Raises NodeError if the disk refuses, except at the end of a life that has failed already.
    """

    def __init__(self, path: Path, metrics: Path, life: int, seen: float | None) -> None:
        self._path, self._metrics, self._life = path, metrics, life
        self._ended = False
        self._seen = seen

    def begin(self, **facts: Any) -> None:
        """`facts`: host, ranks, layout."""
        mine = marks.here()
        of_slurm = {} if mine is None else {"job": mine.job, "queued": mine.life}
        reached, recorded = self._reached()
        former = {"reached": reached, "seen": max(self._seen or 0.0, recorded) or None}
        self._note({"began": time.time(), "pid": os.getpid(), **facts, **of_slurm, **former})

    def go_on(self, step: int, source: str, hosts: Sequence[str]) -> None:
        """The step that this life goes on from, the checkpoint that holds it, and the machines."""
        self._note({"from": step, "source": source, "hosts": list(dict.fromkeys(hosts))})

    def end(self, step: int, code: int, why: str) -> None:
        """It leaves with an exit code after `step`."""
        self._ended = True
        self._note({"ended": time.time(), "step": step, "code": code, "why": why})

    def __enter__(self) -> LifeRecord:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is None or self._ended:
            return
        code = error.exit_code if isinstance(error, TitansError) else EXIT_OTHER
        said = error.value if isinstance(error, TitansError) else str(error)
        why = f"{type(error).__name__}: {said}"[:MOST]
        try:
            self.end(self._reached()[0], code, why)
        except TitansError as e:  # the disk may be the fault: what failed first is what counts
            _log.warning("%s", e.value)

    def _reached(self) -> tuple[int, float]:
        """The last step on record, and when that was (Unix time)."""
        try:
            records, _ = read_tail(self._metrics)
        except OSError as e:
            raise storage_error(e, f"reading {self._metrics}") from e
        last = records[-1] if records else {}
        return last.get("step", 0), last.get("time", 0.0)

    def _note(self, facts: Facts) -> None:
        line = json.dumps({"life": self._life, **facts}, ensure_ascii=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as e:
            raise storage_error(e, f"writing {self._path}") from e


def read_lives(path: Path, damaged: Callable[[str], None] | None = None) -> list[Facts]:
    """The facts of each life, in order; none where there is no file. Raises OSError."""
    lives: dict[int, Facts] = {}
    if path.exists():
        for line in read_lines(path, ("life",), damaged):
            lives.setdefault(line["life"], {}).update(line)
    return [lives[number] for number in sorted(lives)]
