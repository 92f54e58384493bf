"""`titans-pretrain bench wave`: how long context ranks wait for one another, measured.

The ranks hand states on as training does (parallel/context.py), but sleep where they would compute:
so it is the waiting that is measured, on any machine, beside its formula and the simulation. With
`--simulate` no rank runs: the table for as many ranks as you like. With `--traces` it draws the
ranks of a profiled run side by side.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from titans_pretrain.config import ParallelConfig, TrainConfig
from titans_pretrain.launch.local import as_ranks
from titans_pretrain.measure.lanes import Span, draw, write_lanes
from titans_pretrain.parallel.context import ModelSeam
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.wavefront import (
    Act,
    Chain,
    Order,
    Part,
    Task,
    Way,
    formula,
    program,
    simulate,
    waits,
)
from titans_pretrain.parallel.world import World, context_ranks, start_world, world_size

STATE = 64 * 64 * 4  # numbers that a layer hands on

# The memory's part of a backward, in units of its forward: the adjoint alone; with the forward
# computed again before it; or computed again while the rank waits.
SWEEPS: dict[str, tuple[float, float]] = {"kept": (2, 0), "late": (3, 0), "early": (2, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, or the exit code of the rank that failed."""
    parser = argparse.ArgumentParser(
        prog="titans-pretrain bench wave", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--ranks", type=int, default=4, metavar="R", help="default 4")
    parser.add_argument("--layers", type=int, default=8, metavar="L", help="default 8")
    parser.add_argument(
        "--micro-batches", type=int, nargs="*", default=[1, 2, 4], metavar="M", help="default 1 2 4"
    )
    parser.add_argument(
        "--milliseconds", type=float, default=36.0, metavar="MS", help="of a layer's forward"
    )
    parser.add_argument("--memory", type=float, default=1 / 3, metavar="SHARE", help="of a layer")
    parser.add_argument(
        "--sweep",
        choices=list(SWEEPS),
        default="kept",
        help="backward computes the memory again: not at all, after its wait, before it",
    )
    parser.add_argument("--simulate", action="store_true", help="start no ranks")
    parser.add_argument(
        "--segments", type=int, default=1, metavar="S", help="of a row; needs --simulate"
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="also draw who is where when: ORDER-M.svg"
    )
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help="draw a profiled run's: RUN/profile/step-A-B"
    )
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    counts = [args.ranks, args.layers, *args.micro_batches, args.milliseconds, args.segments]
    if min(counts) <= 0 or not 0 < args.memory < 1:
        parser.error("all numbers are above 0, --memory is below 1")
    if args.segments > 1 and not args.simulate:
        parser.error("--segments needs --simulate: ranks sleep through whole rows")
    if args.traces is not None:
        print(write_lanes(args.traces))
        return 0
    ranks = None if args.simulate else args.ranks
    if (code := as_ranks(["bench", "wave", *argv], ranks)) is not None:
        return code
    chain = chain_of(args.ranks, args.layers, args.milliseconds / 1000, args.memory, args.sweep)
    if args.simulate:
        foresee(replace(chain, segments=args.segments), args.micro_batches, args.draw)
    else:
        measure(chain, args.micro_batches, args.draw)
    return 0


def chain_of(ranks: int, layers: int, seconds: float, memory: float, sweep: str = "kept") -> Chain:
    """Layers of `seconds` forward, of which the memory is a share; backward takes twice that, and
    what it computes again."""
    mine, before = seconds * memory, seconds * (1 - memory) / 3
    after = seconds - mine - before
    adjoint, again = SWEEPS[sweep]
    forward = Task(before, mine, after)
    return Chain(
        ranks, 1, layers, forward, Task(2 * after + again * mine, adjoint * mine, 2 * before)
    )


def foresee(chain: Chain, micro_batches: Sequence[int], folder: Path | None = None) -> None:
    """Prints the simulation of each order and number of micro-batches of `segments` stretches."""
    print(
        _about(chain, f"{'simulated s':>12}{'formula s':>11}{'idle':>8}{'formula':>9}{'alive':>7}")
    )
    for order in get_args(Order):
        for count in micro_batches:
            c = replace(chain, order=order, micro_batches=count * chain.segments)
            wave, told = simulate(c), ("-", "-")
            if c.segments == 1 or order != "skewed":
                told = (f"{formula(c):.3f}", f"{_idle(c):.3f}")
            print(
                f"{order:<8}{count:>3}{wave.seconds:>12.3f}{told[0]:>11}{wave.idle:>8.3f}"
                f"{told[1]:>9}{wave.alive:>7}"
            )
            _draw(folder, c, [("simulated", wave.acts)])


def measure(chain: Chain, micro_batches: Sequence[int], folder: Path | None = None) -> None:
    """Collective. Goes through each order and number of micro-batches; rank 0 prints them."""
    parallel = ParallelConfig(context=chain.ranks)
    layout = Layout(world_size(), parallel, world_size() // chain.ranks, 1)
    said = f"{chain} {list(micro_batches)}"
    world = start_world(TrainConfig(device="cpu", threads=1), layout, said=said)
    try:
        link = Link.join(context_ranks(), world.device, timeout_s=120)
        columns = f"{'measured s':>12}{'simulated s':>13}{'formula s':>11}"
        _say(world, _about(chain, f"{columns}{'idle':>8}{'simulated':>11}{'formula':>9}"))
        for order in get_args(Order):
            for count in micro_batches:
                c = replace(chain, order=order, micro_batches=count)
                seconds, acts = step(c, world, link)
                idle = 1 - sum(a.end - a.begin for a in acts) / (c.ranks * seconds)
                wave = simulate(c)
                _say(
                    world,
                    f"{order:<8}{count:>3}{seconds:>12.3f}{wave.seconds:>13.3f}"
                    f"{formula(c):>11.3f}{idle:>8.3f}{wave.idle:>11.3f}{_idle(c):>9.3f}",
                )
                if world.rank == 0:
                    _draw(folder, c, [("measured", acts), ("simulated", wave.acts)])
    finally:
        world.shut_down()


def _about(c: Chain, columns: str) -> str:
    f, b = c.forward, c.backward
    parts = (" + ".join(f"{1e3 * s:.0f}" for s in (t.before, t.memory, t.after)) for t in (f, b))
    stretches = f", micro-batches of {c.segments} segments" if c.segments > 1 else ""
    return (
        f"{c.ranks} ranks, {c.layers} layers of {next(parts)} ms forward, {next(parts)} ms "
        f"backward (before, memory, after){stretches}\n{'order':<8}{'M':>3}{columns}"
    )


def _idle(c: Chain) -> float:
    work = c.forward.whole + (c.backward.whole if c.order != "F" else 0.0)
    return 1 - c.micro_batches * c.layers * work / formula(c)


def _draw(folder: Path | None, c: Chain, lanes: list[tuple[str, Sequence[Act]]]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{c.order}, {c.micro_batches} micro-batches"
    picture = draw([(f"{what}: {title}", spans_of(acts)) for what, acts in lanes])
    (folder / f"{c.order}-{c.micro_batches}.svg").write_text(picture, encoding="utf-8")


def spans_of(acts: Sequence[Act]) -> list[Span]:
    """Each layer as one span, with the wait in it. acts: rank by rank, in order."""
    found, waited = [], waits(acts)
    for begin, _, end in zip(acts[::3], acts[1::3], acts[2::3], strict=True):
        name = "forward" if begin.way == "F" else "backward"
        found.append(Span(begin.rank, begin.layer, name, begin.begin, end.end))
        wait = waited[begin.rank, begin.way, begin.micro_batch, begin.layer]
        if wait > 1e-4:
            told = "waits for state" if begin.way == "F" else "waits for gradient of state"
            found.append(Span(begin.rank, begin.layer, told, begin.end, begin.end + wait))
    return found


def _say(world: World, line: str) -> None:
    if world.rank == 0:
        print(line, flush=True)


def step(c: Chain, world: World, link: Link) -> tuple[float, list[Act]]:
    """Collective. Goes through one step: seconds until the last rank is done, and what all ranks of
    the chain slept for, rank by rank, in seconds by one clock."""
    seam, sleeper = ModelSeam(link), _Sleeper(c, link.index)
    losses: dict[int, Tensor] = {}
    world.barrier()
    began = time.perf_counter()
    for way, i in program(c, link.index):
        if way == "B":
            losses.pop(i).backward()
            continue
        with torch.set_grad_enabled(c.order != "F"):
            losses[i] = _forward(c, seam, sleeper, i)
    link.drain()
    [seconds] = world.max([time.perf_counter() - began])
    everyone: Iterable[list[Act]] = world.gather_objects(sleeper.acts)
    chain = {acts[0].rank: acts for acts in everyone}  # of several chains any
    return seconds, [act for rank in sorted(chain) for act in chain[rank]]


def _forward(c: Chain, seam: ModelSeam, sleeper: _Sleeper, i: int) -> Tensor:
    seam.before(torch.zeros(1, 1, dtype=torch.int64))  # counts the micro-batch
    x = torch.zeros(4, requires_grad=torch.is_grad_enabled())
    for layer in range(c.layers):
        (x,) = _Sleep.apply(sleeper, (i, layer, "before"), x)
        x, state = seam.take(f"layer {layer}", "state", x, torch.zeros(STATE), _blank)
        x, state = _Sleep.apply(sleeper, (i, layer, "memory"), x, state)
        x = seam.give(f"layer {layer}", "state", x, state)
        (x,) = _Sleep.apply(sleeper, (i, layer, "after"), x)
    return x.sum()


def _blank() -> Tensor:
    return torch.zeros(STATE)


class _Sleeper:
    """Sleeps for the parts of a rank's layers, and notes when."""

    def __init__(self, c: Chain, rank: int) -> None:
        self.chain, self.rank = c, rank
        self.acts: list[Act] = []

    def sleep(self, way: Way, micro_batch: int, layer: int, part: Part) -> None:
        begin = time.time()  # ranks compare these
        time.sleep(getattr(self.chain.task(way), part))
        self.acts.append(Act(self.rank, way, micro_batch, layer, part, begin, time.time()))


# Backward goes the other way: what comes before the memory there is after it here.
_BACK: dict[Part, Part] = {"before": "after", "memory": "memory", "after": "before"}


class _Sleep(torch.autograd.Function):
    """Passes tensors on after a sleep, and their gradients after another."""

    @staticmethod
    def forward(
        ctx: Any, sleeper: _Sleeper, where: tuple[int, int, Part], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sleeper, ctx.where = sleeper, where
        sleeper.sleep("F", *where)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        micro_batch, layer, part = ctx.where
        ctx.sleeper.sleep("B", micro_batch, layer, _BACK[part])
        return None, None, *(g.clone() for g in gradients)
