"""How long context ranks wait for one another: a simulation of the wavefront, and its formulas.

A rank of the chain goes through its micro-batches' layers in order. A layer's task is work before
the memory, a wait for the neighbour's state, the memory, the hand-on, work after it. Forwards hand
on from rank r - 1 to r, backwards from r + 1 to r. Pure arithmetic: no rank runs.

Letters: R context ranks, M micro-batches, L layers (of a pipeline stage), S stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

Order = Literal["F", "FB", "FFBB", "skewed"]  # F: forwards alone, as in validation
Way = Literal["F", "B"]
Part = Literal["before", "memory", "after"]
Tag = tuple[object, ...]


@dataclass(frozen=True)
class Task:
    """Seconds of one layer of one micro-batch: before the wait, from it to the hand-on, after."""

    before: float
    memory: float
    after: float

    @property
    def whole(self) -> float:
        return self.before + self.memory + self.after


@dataclass(frozen=True)
class Act:
    """A rank's work on one part of a layer of a micro-batch; seconds from the step's beginning."""

    rank: int
    way: Way
    micro_batch: int
    layer: int
    part: Part
    begin: float
    end: float
    stage: int = 0


@dataclass(frozen=True)
class Wave:
    """What a simulation found."""

    seconds: float  # until the last rank is done; inf: they wait for one another for ever
    busy: float  # seconds of work of a rank, on average
    alive: int  # micro-batches whose activations a rank holds at once, at most
    acts: tuple[Act, ...] = field(default=(), repr=False)  # rank by rank, in order

    @property
    def idle(self) -> float:
        """The share of the time in which a rank waits."""
        return 1 - self.busy / self.seconds


@dataclass(frozen=True)
class Chain:
    """What goes along a chain of context ranks in one step.

    segments: so many consecutive micro-batches are stretches of the same rows: what the last rank
    leaves of one goes round to the first as both begin the next. blocking: a send waits for its
    receive.
    """

    ranks: int
    micro_batches: int
    layers: int
    forward: Task
    backward: Task
    order: Order = "FB"
    stages: int = 1
    segments: int = 1
    blocking: bool = False

    def task(self, way: Way) -> Task:
        return self.forward if way == "F" else self.backward


def program(c: Chain, rank: int, stage: int = 0) -> list[tuple[Way, int]]:
    """The forwards and backwards of a rank in its order: (way, micro-batch)."""
    M = c.micro_batches
    if c.order == "F":
        return [("F", i) for i in range(M)]
    if c.order == "FFBB":
        return [*(("F", i) for i in range(M)), *(("B", i) for i in range(M))]
    # One stage's FB is 1F1B without warm-up; the skewed order counts context ranks as stages.
    ahead = c.stages - 1 - stage + (c.ranks - 1 - rank if c.order == "skewed" else 0)
    ahead = min(M - 1, ahead)
    ops: list[tuple[Way, int]] = [("F", i) for i in range(ahead)]
    for i in range(M):
        ops += [("F", i + ahead)] * (i + ahead < M)
        ops.append(("B", i))
    return ops


def simulate(c: Chain) -> Wave:
    """Plays the step through."""
    lanes = {
        (stage, rank): _Lane(rank, stage, list(_acts(c, rank, stage)))
        for stage in range(c.stages)
        for rank in range(c.ranks)
    }
    done: dict[Tag, float] = {}
    went = True
    while went:
        went = sum(lane.go_on(done) for lane in lanes.values()) > 0
    alive = max(most_alive(program(c, rank, stage)) for stage, rank in lanes)
    busy = sum(lane.busy for lane in lanes.values()) / len(lanes)
    acts = tuple(act for lane in lanes.values() for act in lane.done)
    if any(lane.acts for lane in lanes.values()):
        return Wave(float("inf"), busy, alive, acts)
    return Wave(max(lane.now for lane in lanes.values()), busy, alive, acts)


def waits(acts: Iterable[Act]) -> dict[tuple[int, Way, int, int], float]:
    """(rank, way, micro-batch, layer) -> seconds for which a rank waited before that memory. acts:
    rank by rank, in order."""
    found: dict[tuple[int, Way, int, int], float] = {}
    for before, act in pairwise(acts):
        if act.part == "memory":
            key = (act.rank, act.way, act.micro_batch, act.layer)
            found[key] = act.begin - before.end
    return found


class _Lane:
    """A rank's clock, and what it still has to do."""

    def __init__(self, rank: int, stage: int, acts: list[tuple[str, Any]]) -> None:
        self.rank, self.stage = rank, stage
        self.acts, self.now, self.busy = acts[::-1], 0.0, 0.0
        self.done: list[Act] = []

    def go_on(self, done: dict[Tag, float]) -> bool:
        """Goes as far as what is done lets it; whether it went at all."""
        before = len(self.acts)
        while self.acts:
            act, what = self.acts[-1]
            if act == "work":
                seconds, way, i, layer, part = what
                began, self.now = self.now, self.now + seconds
                self.busy += seconds
                self.done.append(Act(self.rank, way, i, layer, part, began, self.now, self.stage))
            elif act == "tell":
                done[what] = self.now
            elif what not in done:
                break
            else:
                self.now = max(self.now, done[what])
            self.acts.pop()
        return len(self.acts) < before


def _acts(c: Chain, rank: int, stage: int) -> Iterator[tuple[str, Any]]:
    """What a rank does, in order: work for so long on something, tell, await."""
    for way, i in program(c, rank, stage):
        step = 1 if way == "F" else -1
        layers = range(c.layers)[::step]
        task, source, target = c.task(way), rank - step, rank + step
        if c.stages > 1 and 0 <= stage - step < c.stages:
            yield "await", ("stage", way, i, stage - step, rank)
        if way == "F" and i % c.segments:
            yield from _round(c, rank, ("round", i, stage))
        for layer in layers:
            here = (way, i, layer, stage)
            before, memory, after = ((getattr(task, p), way, i, layer, p) for p in get_args(Part))
            yield "work", before
            if 0 <= source < c.ranks:
                yield "tell", ("listening", *here, rank)
                yield "await", ("state", *here, source)
            yield "work", memory
            yield "tell", ("state", *here, rank)
            if c.blocking and 0 <= target < c.ranks:
                yield "await", ("listening", *here, target)
            yield "work", after
        yield "tell", ("stage", way, i, stage, rank)


def _round(c: Chain, rank: int, here: Tag) -> Iterator[tuple[str, Any]]:
    """What the last rank left of the segment before goes to the first, as both begin the next."""
    if rank == c.ranks - 1:
        yield "tell", here
    if rank == 0:
        yield "tell", ("listening", *here)
        yield "await", here
    elif c.blocking and rank == c.ranks - 1:
        yield "await", ("listening", *here)


def most_alive(ops: list[tuple[Way, int]]) -> int:
    """Micro-batches whose forwards are done and whose backwards are not, at most."""
    alive = most = 0
    for way, _ in ops:
        alive += 1 if way == "F" else -1
        most = max(most, alive)
    return most


def formula(c: Chain) -> float:
    """Seconds of the step in closed form, for one stage and sends that do not block. The skew of
    R - 1 memories is paid once a step, in FB once a micro-batch; by forwards also where a segment
    follows another. Without the skewed order of segments."""
    M, skew = c.micro_batches, c.ranks - 1
    forwards, backwards = 1 + M - -(-M // c.segments), int(c.order != "F")
    if c.order == "FB":
        forwards = backwards = M
    work = c.forward.whole + (c.backward.whole if backwards else 0.0)
    turns = forwards * c.forward.memory + backwards * c.backward.memory
    return M * c.layers * work + skew * turns
