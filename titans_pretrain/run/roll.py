"""The roll of a run: where each rank is, as it last said, in the process group's store.

Each rank's thread puts its beat there every few seconds. Rank 0, where the store lives, reads them
all and puts the roll there, which the others read: two or three small requests a rank and beat, and
no rank waits for another. A beat's age is counted by rank 0 on its own clock, so that the hosts'
clocks need not agree. If the roll stops changing, it is rank 0 that is not heard of.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import torch
from torch.distributed import distributed_c10d

logger = logging.getLogger("titans_pretrain.roll")

_ROLL, _ALARM, _REPORTED = (f"titans_pretrain/{name}" for name in ("roll", "alarm", "reported"))
LISTED = 64  # ranks in a roll at most: those furthest behind
LEFT = "left"  # the state of a rank that is done


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    number: int = 0  # of its beats
    step: int = 0  # 0: before the first
    phase: str = ""  # outermost first
    pulse: int = 0  # how often a phase began or ended: who is behind has the smallest
    still: float = 0.0  # seconds without progress
    waits_in: str = ""  # the collective that the main thread is in
    state: str = ""  # LEFT, or the error that the rank leaves with

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase or 'between phases'}"


@dataclass(frozen=True)
class Seen:
    """A rank's last beat, and the seconds since it was heard."""

    beat: Beat
    silent: float

    @property
    def failed(self) -> bool:
        return self.beat.state not in ("", LEFT)


class Roll:
    """This rank's beats and what it knows of the others.

    Args:
        mine: this rank's beat of the moment.
        clock: seconds; may stand still while this process does.
        every: seconds between beats.
    """

    def __init__(
        self, size: int, mine: Callable[[], Beat], clock: Callable[[], float], every: float
    ) -> None:
        self._size, self._mine, self._clock, self._every = size, mine, clock, every
        first = mine()
        self._rank, self._state, self._sent = first.rank, "", 0
        # On rank 0: each rank's last beat, and when it came.
        self._heard = {r: (Beat(r, "an unknown host", 0), clock()) for r in range(size)}
        self._present: set[int] = set()
        self._read = (0, clock(), [Seen(first, 0.0)])  # number, when it was new, what it says
        self._failing = False
        self._closed = threading.Event()
        self._store = cast(Any, distributed_c10d._get_default_store()).clone()
        self.alarm = ""  # why some rank ends the run
        self._thread = threading.Thread(target=self._keep_beating, name="roll", daemon=True)
        self._thread.start()

    def seen(self) -> list[Seen]:
        """The ranks of the newest roll, those furthest behind first."""
        _, at, seen = self._read
        age = self._clock() - at  # while no roll comes nothing is known of ranks other than 0
        late = [replace(s, silent=s.silent + age) if s.beat.rank == 0 else s for s in seen]
        others = [s for s in late if s.beat.rank != self._rank]
        return sorted([*others, Seen(self._mine(), 0.0)], key=self._behind)

    def lost(self, seconds: float) -> list[Seen]:
        """The ranks not heard of for so long, and those that left with an error."""
        others = [s for s in self.seen() if s.beat.rank != self._rank]
        return [s for s in others if s.failed or (s.silent >= seconds and s.beat.state != LEFT)]

    def raise_alarm(self, why: str) -> None:
        """Tells all ranks to report and to leave. May block where the store is gone, as may the
        next."""
        self.alarm = why
        self._store.set(_ALARM, why)

    def reported(self) -> int:
        """How many ranks have reported."""
        return self._store.add(_REPORTED, 0)

    def report(self) -> None:
        """This rank has reported."""
        self._store.add(_REPORTED, 1)

    def close(self, state: str) -> None:
        """The last beat, with how this rank leaves."""
        self._state = state
        self._closed.set()
        self._thread.join(timeout=2.0)

    def _keep_beating(self) -> None:
        try:
            while not self._closed.is_set():
                self._try_to_beat()
                self._closed.wait(self._every)
            self._try_to_beat()
        except torch.distributed.DistError as e:
            # The rank that keeps the store is gone: `seen` shows it by its growing silence.
            if not self._closed.is_set():
                logger.warning("the roll of ranks ends: %s", str(e).splitlines()[0])

    def _try_to_beat(self) -> None:
        """Raises only what says that the store is gone: without beats the others end the run."""
        try:
            self._beat()
            self._failing = False
        except torch.distributed.DistError:
            raise
        except Exception:
            if not self._failing:  # the first of a row
                logger.exception("a beat of this rank failed; the next comes in its time")
            self._failing = True

    def _beat(self) -> None:
        self._sent += 1
        beat = replace(self._mine(), number=self._sent, state=self._state)
        self._store.set(_key(self._rank), json.dumps(astuple(beat)))
        if self._rank == 0:
            self._gather()
            table = [(*astuple(s.beat), s.silent) for s in self._read[2]]
            self._store.set(_ROLL, json.dumps([self._sent, table]))
        elif self._store.check([_ROLL]):
            number, table = json.loads(self._store.get(_ROLL))
            if number != self._read[0]:
                self._read = (number, self._clock(), [Seen(Beat(*t[:-1]), t[-1]) for t in table])
        if not self.alarm and self._store.check([_ALARM]):
            self.alarm = self._store.get(_ALARM).decode()

    def _gather(self) -> None:
        """Reads all beats; a key that is not there yet would block."""
        missing = [r for r in range(self._size) if r not in self._present]
        self._present |= {r for r in missing if self._store.check([_key(r)])}
        ranks, now = sorted(self._present), self._clock()
        for rank, text in zip(ranks, self._store.multi_get([_key(r) for r in ranks])):
            beat = Beat(*json.loads(text))
            if beat.number != self._heard[rank][0].number:
                self._heard[rank] = (beat, now)
        seen = [Seen(beat, now - at) for beat, at in self._heard.values()]
        self._read = (self._sent, now, sorted(seen, key=self._behind)[:LISTED])

    def _behind(self, seen: Seen) -> tuple[bool, int, int]:
        """Sorts those first that miss beats or failed, then by how far they have come."""
        well = seen.silent < 4 * self._every and not seen.failed
        return well or seen.beat.state == LEFT, seen.beat.pulse, seen.beat.rank


def _key(rank: int) -> str:
    return f"titans_pretrain/beat of {rank}"
