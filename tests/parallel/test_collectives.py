"""Calls and bytes of each collective in a step, beside the arithmetic; none inside the memory.

Bytes are those of one tensor on a rank: of what is summed, of what was gathered, of what a
reduce-scatter leaves, of what is sent.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.parallel.tiny import micro_batches
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.estimate.portion import portion_of
from titans_pretrain.estimate.traffic import total, transfers
from titans_pretrain.measure.step_benchmark import Collectives
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.model.variants import VARIANTS
from titans_pretrain.parallel.layout import Layout

ROWS = 4  # of a step; a micro-batch is one
Counted = dict[str, dict[str, int]]


NAMES = {
    "all_reduce": "allreduce",
    "all_gather": "allgather_base",
    "reduce_scatter": "reduce_scatter_base",
}


def expected(config: RunConfig, layout: Layout, rank: int) -> Counted:
    """Of a step after the first, by the arithmetic of a plan."""
    place = layout.place(rank)
    segments = None
    if config.model.variant == "mac" and layout.context == 1:
        batches = micro_batches(config, 2, place.data, layout.data_parallel)
        segments = Counter(n for batch in batches for n in _segments(config, batch.positions))
    found = total(transfers(portion_of(config, layout, place.pipeline), place.context, segments))
    return {NAMES.get(way, way): counts for way, counts in found.items() if counts["calls"]}


def _segments(config: RunConfig, positions: torch.Tensor) -> list[int]:
    """Tokens of all documents' segments of equal number."""
    plan = VARIANTS["mac"].plan(config.model, positions, None, torch.zeros(1))
    return [step.documents * (step.end - step.begin) for step in plan.steps]


def counted(config: RunConfig) -> tuple[Counted, Counted, int, int]:
    """Of a step after the first; what is expected; calls inside the memory's update and read; how
    often that ran."""
    world, step = start(config)
    step(batches_of(config, 1, world), 1)
    batches = batches_of(config, 2, world)
    inside, write = Collectives(), MemoryLayer.write
    ran = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        with inside:
            return write(*args, **kwargs)

    MemoryLayer.write = watched  # type: ignore[method-assign]
    with Collectives() as seen:
        step(batches, 2)
    arithmetic = expected(config, world.layout, world.rank)
    world.shut_down()
    return seen.counted, arithmetic, sum(n["calls"] for n in inside.counted.values()), ran


Case = tuple[str, int, dict[str, Any], dict[str, Any]]
OWN = {"model__memory__projections": "block_diagonal"}
AGAIN, NARROW = {"train__recompute": "blocks"}, {"train__precision": "bf16"}
CASES: dict[str, Case] = {
    **{f"TP2 {v}": (v, 2, {"tensor": 2}, {}) for v in VARIANTS},
    "TP2 mac, own features": ("mac", 2, {"tensor": 2}, OWN),
    "TP4 lmm": ("lmm", 4, {"tensor": 4}, {}),
    **{f"TP2+SP {v}": (v, 2, {"tensor": 2, "sequence": True}, {}) for v in ("lmm", "mac", "mal")},
    "TP2 DP2 mag": ("mag", 4, {"tensor": 2}, {}),
    "PP2 lmm": ("lmm", 2, {"pipeline": 2}, {}),
    "PP2 x 2 mac": ("mac", 2, {"pipeline": 2, "interleave": 2}, {}),
    "DP2 Z1 mac": ("mac", 2, {"zero": {"stage": 1}}, {}),
    "DP2 Z2 lmm": ("lmm", 2, {"zero": {"stage": 2}}, {}),
    "DP2 Z3 lmm": ("lmm", 2, {"zero": {"stage": 3, "whole_below": 0}}, {}),
    "PP4 lmm": ("lmm", 4, {"pipeline": 4}, {}),
    "PP2 TP2+SP mag": ("mag", 4, {"pipeline": 2, "tensor": 2, "sequence": True}, {}),
    "TP2 mac, recompute": ("mac", 2, {"tensor": 2}, AGAIN),
    "TP2+SP mal, recompute": ("mal", 2, {"tensor": 2, "sequence": True}, AGAIN),
    "CP4 mac": ("mac", 4, {"context": 4}, {}),
    "CP4 transformer": ("transformer", 4, {"context": 4}, {"model__window": None}),
    "CP2 TP2 mac": ("mac", 4, {"context": 2, "tensor": 2}, OWN),
    "CP2 TP2 lmm": ("lmm", 4, {"context": 2, "tensor": 2}, {}),
    "CP2 PP2 lmm": ("lmm", 4, {"context": 2, "pipeline": 2}, {}),
    "CP2 lmm, segments": ("lmm", 2, {"context": 2, "segments": 2}, {}),
    "TP2 lmm bf16": ("lmm", 2, {"tensor": 2}, NARROW),
    "DP2 Z1 lmm bf16": ("lmm", 2, {}, NARROW),
    "CP2 lmm": ("lmm", 2, {"context": 2}, {}),
    "CP2 mag": ("mag", 2, {"context": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_of_the_arithmetic(case: str) -> None:
    variant, ranks, parallel, changes = CASES[case]
    config = parity_config(variant, parallel, train__global_batch=ROWS, **changes)
    for found, arithmetic, inside, ran in run_world(counted, ranks, config):
        assert found == arithmetic
        assert inside == 0
        assert variant == "transformer" or ran
