"""Ends a run that hangs, on every rank, with a report of where each rank stood (exit code 77).

A thread in each rank looks every second at what phases.py tells. No phase has begun or ended for
longer than `watchdog` of the config allows, or this rank makes no progress and another is not heard
of (run/roll.py): the rank writes failure-<time>-rank-<rank>.txt into the run folder, the others are
told to do the same, and all leave. Nothing else ends a rank that waits in a collective for one that
never comes.

Only time in which this process ran counts: one that was stopped (Ctrl-Z, a suspended job) is not
blamed when it goes on. What could itself hang, a disk or the store, is done in threads of its own
that are waited for only so long. (A thread that keeps Python's lock for ever silences the watchdog
of its own rank: the others then miss its beats.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from titans_pretrain import phases
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import EXIT_HANG, HangError, NodeError
from titans_pretrain.run import marks
from titans_pretrain.run.hang_report import behind, describe, recorded, stacks, waits_in, words
from titans_pretrain.run.lock import newest_claim
from titans_pretrain.run.roll import LEFT, Beat, Roll

if TYPE_CHECKING:
    from titans_pretrain.data.batch import Batch
    from titans_pretrain.parallel.world import World

logger = logging.getLogger("titans_pretrain.watchdog")

_MINUTES = ("step_minutes", "start_minutes", "data_minutes", "checkpoint_minutes")
_LIMITS = {  # by phase; elsewhere step_minutes
    "checkpoint": "checkpoint_minutes",
    "data": "data_minutes",
    "loading": "start_minutes",
}
_PLACE = (("RANK", 0), ("WORLD_SIZE", 1))
TICK = 1.0  # seconds between two looks
BEAT = 2.0  # seconds between two beats
ASLEEP = 5.0  # seconds: what passes beyond them between two looks, this process did not run
WRITING, TELLING = 10.0, 5.0  # seconds for the report, for telling others and awaiting theirs


class Watchdog:
    """Watches while its block lasts; `joined` as soon as there are other ranks.

    Args:
        end: ends the process with a code, at once.
    """

    def __init__(self, config: RunConfig, end: Callable[[int], None] = os._exit) -> None:
        self._limits, self._folder, self._end = config.watchdog, Path(config.folder), end
        limits = [getattr(self._limits, name) * 60 for name in _MINUTES]
        silent = self._limits.silent_seconds
        self.everywhere = all(limits)  # no phase may take for ever
        self.timeout_s = max(1800.0, *(limit + 300 for limit in limits))  # collectives': later
        shortest = min((x for x in (*limits, silent) if x), default=0.0)
        self._tick, self._every = min(TICK, shortest / 10), min(BEAT, (silent or BEAT) / 8)
        self._rank, self._size = (int(os.environ.get(n, d)) for n, d in _PLACE)
        self._clock = self._since = 0.0  # seconds awake: now, and at the last progress
        self._last = phases.now()[:2]  # at the last progress
        self._fed = 0  # steps that have begun in this life
        self._batches: Sequence[Batch] = ()
        self._roll: Roll | None = None
        self._closed, self._ending, self._ended = (threading.Event() for _ in range(3))

    def joined(self, world: World, leaving: contextlib.ExitStack) -> None:
        """From now on there are other ranks; this one says so as `leaving` is left."""
        self._rank, self._size = world.rank, world.size
        if world.size > 1 and self._tick:
            self._roll = Roll(world.size, self._mine, lambda: self._clock, self._every)
            leaving.push(self._leave)

    def fed(self, micro_batches: Sequence[Batch]) -> None:
        """The batches that the step about to begin is made of."""
        self._fed, self._batches = self._fed + 1, micro_batches

    def lost(self, error: BaseException) -> None:
        """Another rank is gone without a word: writes where this one stood, as the first of those
        that are left, to lost-rank-life-<life>.txt."""
        said = str(error).strip() or type(error).__name__
        text = self._described(f"lost another rank: {said.splitlines()[0]}", error)
        try:
            claim = newest_claim(self._folder)
            life = claim.life if claim is not None else 0
            path = self._folder / f"lost-rank-life-{life:06d}.txt"
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return  # another rank was first
        except OSError as e:
            logger.warning("%s: not written: %s", e.filename, e.strerror)
            return
        _add_recorded(path)

    def __enter__(self) -> Watchdog:
        phases.at_step(0)
        if self._tick:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._ending.is_set():  # the end was near when the block was left
            self._ended.wait(3 * WRITING)

    def _leave(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._roll is not None:
            self._roll.close(f"{kind.__name__}: {error}"[:200] if kind else LEFT)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            try:
                why = self.look(now - last)
            except Exception:  # a watchdog that ended here would do so in silence
                why = ""
                with contextlib.suppress(OSError, NodeError):  # the disk may be the fault
                    logger.exception("the watchdog could not look; it goes on")
            last = now
            if why and not self._closed.is_set():
                self._ending.set()
                self._finish(why)
                return

    def look(self, passed: float) -> str:
        """Why to end now, or nothing. `passed`: seconds since the last look."""
        self._clock += min(passed, ASLEEP)
        pulse, step, stack = phases.now()
        if (pulse, step) != self._last:
            self._last, self._since = (pulse, step), self._clock
        still = self._clock - self._since
        if self._roll is not None and self._roll.alarm:
            return self._roll.alarm
        silent = self._limits.silent_seconds
        if self._roll is not None and silent and still >= silent:
            lost = self._roll.lost(silent)
            if lost:
                return "; ".join(words(s) for s in lost[:4])
        name = self._limit(stack)
        minutes = getattr(self._limits, name)
        if not minutes or still < 60 * minutes:
            return ""
        why = (
            f"rank {self._rank} on {socket.gethostname()} has made no progress for {still:.0f} s "
            f"in {self._mine().place} (watchdog.{name}={minutes:g})"
        )
        seen = self._roll.seen() if self._roll is not None else []
        others = [
            w for w in behind(seen, 4 * self._every) if not w.startswith(f"rank {self._rank} ")
        ]
        return "; ".join([why, *others[:4]])

    def _limit(self, stack: Sequence[str]) -> str:
        """The name of the limit that counts now: the longest that fits."""
        fitting = ["start_minutes"] if self._fed < 2 else []
        fitting += [name for phase, name in _LIMITS.items() if phase in stack]
        # 0 is longest: no limit.
        return max(
            fitting or ["step_minutes"],
            key=lambda name: getattr(self._limits, name) or float("inf"),
        )

    def _mine(self) -> Beat:
        pulse, step, stack = phases.now()
        return Beat(
            self._rank,
            socket.gethostname(),
            os.getpid(),
            step=step,
            phase=" > ".join(stack) or ("" if step else "starting"),
            pulse=pulse,
            still=self._clock - self._since,
            waits_in=waits_in(),
        )

    def _finish(self, why: str) -> None:
        """Reports, tells the others, gives them a moment to report, and ends this process."""
        try:
            wrote = threading.Thread(target=self._write, args=(why,), daemon=True)
            told = threading.Thread(target=self._tell, args=(why, wrote), daemon=True)
            wrote.start()
            told.start()
            wrote.join(timeout=WRITING)
            told.join(timeout=TELLING)
        finally:
            self._end(EXIT_HANG)
            self._ended.set()

    def _described(self, why: str, lost: BaseException | None = None) -> str:
        """The report; where it fails itself, the reason to end and the stacks all the same."""
        try:
            seen = self._roll.seen() if self._roll is not None else []
            limits = (4 * self._every, self._batches)
            return describe(self._mine(), self._size, why, seen, *limits, lost=lost)
        except Exception as e:
            with contextlib.suppress(OSError, NodeError):
                logger.exception("the report of this rank is cut short")
            failed = "".join(traceback.format_exception(e))
            return f"why:        {why}\nthe report is cut short by: {failed}\n{stacks()}"

    def _write(self, why: str) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._folder / f"failure-{stamp}-rank-{self._rank:05d}.txt"
        text = self._described(why)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            where = f"{path} tells where this rank stood"
        except OSError as e:
            where = f"{path}: {e.strerror}; so here is where this rank stood:\n{text}"
        error = HangError(
            f"hang: {why}",
            "no rank stays without progress, or unheard of, for longer than `watchdog` allows",
            f"{where}; start again: the run goes on from its last checkpoint",
        )
        marks.failed(EXIT_HANG, "HangError", why)
        print(f"titans-pretrain: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError, NodeError):  # the disk may be the fault
            logger.error("%s", error)
            for stream in (sys.stdout, sys.stderr, *logging.getLogger("titans_pretrain").handlers):
                stream.flush()
        _add_recorded(path)

    def _tell(self, why: str, wrote: threading.Thread) -> None:
        """The others; then waits until all that are there have reported: if rank 0 left before
        them, they would take it for the fault."""
        if self._roll is None:
            return
        try:
            if not self._roll.alarm:
                self._roll.raise_alarm(why)
            wrote.join(timeout=WRITING)
            self._roll.report()
            there = self._size - len(self._roll.lost(4 * self._every))
            while self._roll.reported() < there:
                time.sleep(0.05)
        except torch.distributed.DistError:
            return  # whoever kept the store is gone: nobody is left to tell


def _add_recorded(report: Path) -> None:
    """To a report that tells all else already: this may hang, and fail in torch's ways."""
    try:
        with report.open("a", encoding="utf-8") as file:
            file.write(recorded())
    except Exception:
        with contextlib.suppress(OSError, NodeError):
            logger.exception("%s: without what torch's flight recorder holds", report)
