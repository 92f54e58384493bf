"""Which rank holds the others up: each one's own time in a step, without its waiting for others.

One step in `log.straggler.every` is looked at. On every rank each moment of it goes to a phase
(phases.py) or to waiting: all calls that give a collective or a message to torch.distributed, and
all waits for one, wherever they are made: inside a forward (tensor and context parallel ranks,
pipeline stages), in the gradients' reduction or in a sum over all ranks. What is left is the
rank's own. On CUDA both are times of the stream, so that a slow device shows, and so does a kernel
of NCCL that waits. The figures travel with a reduction that each step makes anyway.

Ranks of the same pipeline stage do equal work; each is compared with the lower median of these.
What it sees: a slow device or host, a slow reader of data, a neighbour that takes its cores. What
not: a slow network (its transfers are waiting, on both ends); a rank that is alone in its stage;
what happens outside of the step (validation, saves, records); on CUDA work of other streams, and
communication that goes on behind the computing without holding it up. Documents of uneven length
make own times differ, too; hence a factor well above 1, several looks in a row.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import ProcessGroup, Work

from titans_pretrain import phases
from titans_pretrain.config import StragglerConfig
from titans_pretrain.measure.stopwatch import Stopwatch
from titans_pretrain.parallel.world import World

PHASES = ("data", "forward", "backward", "optimizer", "rest")
# What hands something to other ranks or waits for it: on CUDA either may hold the stream.
_CALLS = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single", "alltoall", "alltoall_base", "send", "recv", "_end_coalescing"),
)
_WAIT = "wait"

Own = Sequence[Sequence[float]]  # rank -> seconds by PHASES


@dataclass(frozen=True)
class Slow:
    """A rank that has been slow for some looks in a row."""

    rank: int
    factor: float  # its own time over the median's, mean of these looks
    phase: str  # in which most of the difference lies, in the last look
    seconds: float  # its own in that phase
    median: float  # that of its peers


class Judge:
    """Tells of each rank that becomes slow, once; again after it has been as fast as the others.

    Args:
        peers: ranks that do equal work, by group; a rank without others is not judged.
    """

    def __init__(self, factor: float, looks: int, peers: Sequence[Sequence[int]]) -> None:
        self._factor, self._looks = factor, looks
        self._peers = [ranks for ranks in peers if len(ranks) > 1]
        self._streaks: dict[int, list[float]] = {}

    def __call__(self, own: Own) -> tuple[float, list[Slow]]:
        """(the slowest rank's own time over its peers' median, ranks that have become slow)."""
        largest, slow = 1.0, []
        for ranks in self._peers:
            median = _median([sum(own[rank]) for rank in ranks])
            for rank in ranks:
                ratio = sum(own[rank]) / max(median, 1e-9)
                largest = max(largest, ratio)
                if ratio < self._factor:
                    self._streaks.pop(rank, None)
                    continue
                streak = self._streaks.setdefault(rank, [])
                streak.append(ratio)
                if len(streak) == self._looks:
                    slow.append(_slow(rank, statistics.mean(streak), own, ranks))
        return largest, slow


def _slow(rank: int, factor: float, own: Own, peers: Sequence[int]) -> Slow:
    medians = [_median([own[r][i] for r in peers]) for i in range(len(PHASES))]
    most = max(range(len(PHASES)), key=lambda i: own[rank][i] - medians[i])
    return Slow(rank, factor, PHASES[most], own[rank][most], medians[most])


def _median(values: Sequence[float]) -> float:
    """The lower one: of two ranks the faster is what is to be expected."""
    return statistics.median_low(values)


class Stragglers:
    """Looks at this rank's steps and judges all ranks'. Collective to make."""

    def __init__(self, config: StragglerConfig, world: World) -> None:
        self._config, self._world = config, world
        self._every = config.every if world.size > 1 else 0
        self._looking: contextlib.ExitStack | None = None
        self._watch = Stopwatch(world.device)
        self._own = [0.0] * len(PHASES)  # of the step that was looked at last
        if not self._every:
            return
        self._hosts = world.gather_objects(world.host)
        stages: dict[int, list[int]] = {}
        for rank in range(world.size):
            stages.setdefault(world.layout.place(rank).pipeline, []).append(rank)
        self._judge = Judge(config.factor, config.looks, list(stages.values()))

    def _due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        self.close()  # a step that was broken off
        if self._due(step):
            self._looking = contextlib.ExitStack()
            self._looking.enter_context(phases.listening(self._watch))
            self._looking.enter_context(_telling_waits(self._watch))
            self._watch.start()

    def end(self) -> None:
        """Its update is done."""
        if self._looking is None:
            return
        self.close()
        own = dict.fromkeys(PHASES, 0.0)
        for (name, _), seconds in self._watch.stop().items():
            name = "backward" if name == "recompute" else name
            if name != _WAIT:
                own[name if name in own else "rest"] += seconds
        self._own = list(own.values())

    def close(self) -> None:
        if self._looking is not None:
            self._looking.close()
            self._looking = None

    def own(self, step: int) -> list[float]:
        """What is to be maximised over ranks after `step`: this rank's own time in its place."""
        if not self._due(step):
            return []
        each = len(PHASES)
        before, after = self._world.rank * each, (self._world.size - self._world.rank - 1) * each
        return [0.0] * before + self._own + [0.0] * after

    def judge(self, own: Sequence[float]) -> tuple[float, list[str]]:
        """(slowest over median, a sentence on each rank that has become slow) of what `own` has
        become over all ranks."""
        each = len(PHASES)
        by_rank = [own[i : i + each] for i in range(0, len(own), each)]
        largest, slow = self._judge(by_rank)
        return largest, [self._told(s) for s in slow]

    def _told(self, slow: Slow) -> str:
        c = self._config
        return (
            f"rank {slow.rank} on {self._hosts[slow.rank]} is slow: its own time, without waiting, "
            f"was {slow.factor:.1f} times the median of its peers in the last {c.looks} steps that "
            f"were looked at (one in {c.every}); the last time {slow.seconds:.3f} s in "
            f"{slow.phase}, its peers {slow.median:.3f} s"
        )


@contextlib.contextmanager
def _telling_waits(watch: Stopwatch) -> Iterator[None]:
    """Inside the block `watch` hears of each wait for other ranks as of a phase; no number
    changes."""
    with contextlib.ExitStack() as undo:
        for owner, names in ((ProcessGroup, _CALLS), (Work, ("wait",))):
            for name in names:
                original = vars(owner).get(name)  # torch versions differ in what they have
                if original is not None:
                    setattr(owner, name, _timed(original, watch))
                    undo.callback(setattr, owner, name, original)
        yield


def _timed(original: Callable[..., Any], watch: Stopwatch) -> Callable[..., Any]:
    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if _beside():
            return original(*args, **kwargs)
        watch.began(_WAIT)
        try:
            return original(*args, **kwargs)
        finally:
            watch.ended(_WAIT)

    return timed


def _beside() -> bool:
    """Whether this is a thread beside training's, such as one that saves. Autograd's, which runs
    backward on CUDA while the main thread waits for it, is none that Python has started."""
    here = threading.get_ident()
    main = threading.main_thread().ident
    return here != main and any(t.ident == here for t in threading.enumerate())
