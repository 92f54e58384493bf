"""Ranks that sleep where they would compute go through a step in the order that is simulated: who
does what after whom, and who waits. How fast they are is not looked at."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, get_args
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.worlds import run_world
from titans_pretrain.config import ParallelConfig, TrainConfig
from titans_pretrain.measure.wave_benchmark import step
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.pipeline import Schedule
from titans_pretrain.parallel.wavefront import Act, Chain, Order, Task, program, simulate, waits
from titans_pretrain.parallel.world import context_ranks, start_world

# A wait in the simulation is no shorter than a memory; what busy machines oversleep is.
MEMORY = 0.12
CHAIN = Chain(1, 3, 2, Task(0.05, MEMORY, 0.08), Task(0.16, 2 * MEMORY, 0.1))


def slept(size: int, orders: list[Order]) -> dict[Order, list[Act]]:
    layout = Layout(size, ParallelConfig(context=size), 1, 1)
    world = start_world(TrainConfig(device="cpu", threads=1), layout)
    link, out = Link.join(context_ranks(), world.device, timeout_s=60), {}
    for order in orders:
        _, out[order] = step(replace(CHAIN, ranks=size, order=order), world, link)
    dist.barrier()
    world.shut_down()
    return out


def what(act: Act) -> Any:
    return act.rank, act.way, act.micro_batch, act.layer, act.part


def disagreements(c: Chain, acts: list[Act]) -> list[Any]:
    """What is not as simulated."""
    wave = simulate(c)
    if list(map(what, acts)) != list(map(what, wave.acts)):
        return [("what the ranks do, and in which order", c.order)]
    found: list[Any] = []
    # Who waits for whom: nobody has a memory's state before its neighbour.
    ends = {what(act): act.end for act in acts}
    for act in acts:
        source = act.rank - 1 if act.way == "F" else act.rank + 1
        if act.part != "memory" or not 0 <= source < c.ranks:
            continue
        if ends[source, *what(act)[1:]] > act.begin:
            found.append(("before its neighbour", what(act)))
    really = waits(acts)
    for key, seconds in waits(wave.acts).items():
        if seconds >= MEMORY - 1e-9 and really[key] < MEMORY / 2:
            found.append(("does not wait", key, really[key]))
    # What is simulated to come a memory's time later comes later, on whichever rank.
    for i, j in combinations(range(len(acts)), 2):
        gap = wave.acts[j].begin - wave.acts[i].begin
        if abs(gap) >= 2 * MEMORY and (acts[j].begin > acts[i].begin) != (gap > 0):
            found.append(("order", what(acts[i]), what(acts[j])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_go_as_simulated(size: int) -> None:
    orders = list(get_args(Order))
    for told in run_world(slept, size, size, orders, timeout=200):
        for order in orders:
            c = replace(CHAIN, ranks=size, order=order)
            assert disagreements(c, told[order]) == [], order


@pytest.mark.parametrize("order", get_args(Order))
def test_what_another_order_does_is_not_as_simulated(order: Order) -> None:
    c = replace(CHAIN, ranks=4, order=order)
    acts = list(simulate(c).acts)
    assert disagreements(c, acts) == []
    for other in get_args(Order):
        here, there = replace(c, order=other), c
        if [program(here, r) for r in range(4)] != [program(there, r) for r in range(4)]:
            assert disagreements(here, acts), other
    early = [replace(a, begin=a.begin - 0.2, end=a.end - 0.2) if a.rank == 1 else a for a in acts]
    assert disagreements(c, early)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("order", ["FB", "FFBB", "skewed"])
def test_an_order_that_may_hang_is_warned_of(caplog, order: str, device: str) -> None:
    """Once, where sends may wait for their receives."""
    layout = Layout(2, ParallelConfig.model_validate({"context": 2, "order": order}), 1, 1)
    for rank in (0, 1):
        with mock.patch.object(dist, "get_rank", lambda: rank):  # noqa: B023
            Schedule([], layout, torch.device(device), rank)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (order == "skewed" and device == "cuda")
    assert all("parallel.order=skewed" in message for message in said)
