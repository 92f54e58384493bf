"""`titans-pretrain bench wave`: how long context ranks wait for one another, measured.

The ranks hand states on as training does (parallel/context.py), but sleep where they would compute:
so it is the waiting that is measured, on any machine, beside its formula and the simulation.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from titans_pretrain.config import ParallelConfig, TrainConfig
from titans_pretrain.launch.local import launch
from titans_pretrain.parallel.context import ModelSeam
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.wavefront import Chain, Order, Task, formula, program, simulate
from titans_pretrain.parallel.world import World, context_ranks, start_world, world_size

STATE = 64 * 64 * 4  # numbers that a layer hands on


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
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    counts = [args.ranks, args.layers, *args.micro_batches, args.milliseconds]
    if min(counts) <= 0 or not 0 < args.memory < 1:
        parser.error("all numbers are above 0, --memory is below 1")
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "titans_pretrain", "bench", "wave"]
        with tempfile.TemporaryDirectory() as logs:
            return launch([*command, *argv], args.ranks, logs=Path(logs))
    whole = args.milliseconds / 1000
    memory, before = whole * args.memory, whole * (1 - args.memory) / 3
    after = whole - memory - before
    forward, backward = Task(before, memory, after), Task(2 * after, 2 * memory, 2 * before)
    measure(Chain(args.ranks, 1, args.layers, forward, backward), args.micro_batches)
    return 0


def measure(chain: Chain, micro_batches: Sequence[int]) -> None:
    """Collective. Goes through each order and number of micro-batches; rank 0 prints them."""
    parallel = ParallelConfig(context=chain.ranks)
    layout = Layout(world_size(), parallel, world_size() // chain.ranks, 1)
    world = start_world(TrainConfig(device="cpu", threads=1), layout)
    try:
        link = Link.join(context_ranks(), world.device, timeout_s=120)
        f = chain.forward
        _say(
            world,
            f"{chain.ranks} ranks, {chain.layers} layers of {1e3 * f.before:.0f} + "
            f"{1e3 * f.memory:.0f} + {1e3 * f.after:.0f} ms forward, twice that backward\n"
            f"{'order':<8}{'M':>3}{'measured s':>12}{'simulated s':>13}{'formula s':>11}"
            f"{'idle':>8}",
        )
        for order in get_args(Order):
            for count in micro_batches:
                c = replace(chain, order=order, micro_batches=count)
                seconds, worked = step(c, world, link)
                _say(
                    world,
                    f"{order:<8}{count:>3}{seconds:>12.3f}{simulate(c).seconds:>13.3f}"
                    f"{formula(c):>11.3f}{1 - worked / seconds:>8.3f}",
                )
    finally:
        world.shut_down()


def _say(world: World, line: str) -> None:
    if world.rank == 0:
        print(line, flush=True)


def step(c: Chain, world: World, link: Link) -> tuple[float, float]:
    """Collective. Goes through one step: seconds until the last rank is done, and those that this
    rank slept."""
    seam, slept = ModelSeam(link), [0.0]
    losses: dict[int, Tensor] = {}
    world.barrier()
    began = time.perf_counter()
    for way, i in program(c, link.index):
        if way == "B":
            losses.pop(i).backward()
            continue
        with torch.set_grad_enabled(c.order != "F"):
            losses[i] = _forward(c, seam, slept)
    link.drain()
    [seconds] = world.max([time.perf_counter() - began])
    return seconds, slept[0]


def _forward(c: Chain, seam: ModelSeam, slept: list[float]) -> Tensor:
    f, b = c.forward, c.backward
    seam.before(torch.zeros(1, 1, dtype=torch.int64))  # counts the micro-batch
    x = torch.zeros(4, requires_grad=torch.is_grad_enabled())
    for layer in range(c.layers):
        # Backward goes the other way: what comes before the memory there is after it here.
        (x,) = _Sleep.apply(f.before, b.after, slept, x)
        x, state = seam.take(f"layer {layer}", "state", x, torch.zeros(STATE), _blank)
        x, state = _Sleep.apply(f.memory, b.memory, slept, x, state)
        x = seam.give(f"layer {layer}", "state", x, state)
        (x,) = _Sleep.apply(f.after, b.before, slept, x)
    return x.sum()


def _blank() -> Tensor:
    return torch.zeros(STATE)


class _Sleep(torch.autograd.Function):
    """Passes tensors on after a sleep, and their gradients after another."""

    @staticmethod
    def forward(
        ctx: Any, forward_s: float, backward_s: float, slept: list[float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.seconds, ctx.slept = backward_s, slept
        time.sleep(forward_s)
        slept[0] += forward_s
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        time.sleep(ctx.seconds)
        ctx.slept[0] += ctx.seconds
        return None, None, None, *(g.clone() for g in gradients)
