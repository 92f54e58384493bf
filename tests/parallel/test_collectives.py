"""Calls and bytes of each collective in a step, beside the arithmetic; none inside the memory.

Bytes are those of one tensor on a rank: of what is summed, of what was gathered, of what a
reduce-scatter leaves, of what is sent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.parallel.tiny import micro_batches
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.measure.step_benchmark import Collectives
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.memory.sizes import TAIL
from titans_pretrain.model.variants import VARIANTS
from titans_pretrain.parallel.layout import Layout, plan_layout

ROWS = 4  # of a step; a micro-batch is one
Counted = dict[str, dict[str, int]]


class Tally:
    """What the arithmetic expects of a rank."""

    def __init__(self) -> None:
        self.counted: Counted = {}

    def add(self, name: str, elements: float, calls: int = 1, *, each: int = 4) -> None:
        here = self.counted.setdefault(name, {"calls": 0, "bytes": 0})
        here["calls"] += calls
        here["bytes"] += round(calls * elements * each)


def expected(config: RunConfig, layout: Layout, parameters: int) -> Counted:
    """Of a step after the first; `parameters` of the rank's piece of the model."""
    tally = Tally()
    tally.add("allreduce", 1, each=8)  # how many labels the step has
    tally.add("allreduce", 3, each=8)  # nats, labels, penalty
    # Groups of parameters: decay, no decay; of memories, too: gates, first weights. The norm of
    # each is summed over those with other data, and over those with other pieces.
    groups = 2 if config.model.variant == "transformer" else 4
    wide = 8 if layout.parallel.zero.stage == 3 else 4
    tally.add("allreduce", 1, groups * (1 + (layout.tensor * layout.pipeline > 1)), each=wide)
    zero(tally, layout, parameters, groups)
    for row in range(ROWS // layout.data_parallel):
        if layout.tensor > 1:
            tensor(tally, config, layout, row)
        if layout.context > 1:
            context(tally, config)
        if layout.pipeline > 1:
            # Of two stages, each has as many pieces before another as after one, but for the ends.
            stream, cuts = config.data.sequence_length * config.model.width, layout.pieces - 1
            tally.add("send", stream, cuts)
            tally.add("recv", stream, cuts)
    return tally.counted


def zero(tally: Tally, layout: Layout, parameters: int, groups: int) -> None:
    """Gradients are summed over the ranks with other data, each rank's part of the weights is
    gathered: once a step, or (2: gradients; 3: both, in parts) in every micro-batch."""
    ranks, times = layout.data_parallel * layout.context, ROWS // layout.data_parallel
    if layout.parallel.zero.stage == 3:
        tally.add("allgather_base", parameters, times)
        tally.add("reduce_scatter_base", parameters / ranks, times)
        return
    tally.add("allreduce", parameters, times if layout.parallel.zero.stage == 2 else 1)
    if ranks > 1:
        tally.add("allgather_base", parameters / groups, groups)


def tensor(tally: Tally, config: RunConfig, layout: Layout, row: int) -> None:
    """Into mixers, MLPs and the head the stream's gradient is summed, out of them (and of the
    embedding) the stream. Under sequence parallelism a reduce-scatter sums, and before what needs
    all tokens an all-gather brings them together."""
    model, tokens, ranks = config.model, config.data.sequence_length, layout.tensor
    stream, prefix, blocks = tokens * model.width, model.persistent_tokens, model.blocks
    sums = 2 + 4 * blocks
    if layout.parallel.sequence:
        tally.add("reduce_scatter_base", stream / ranks, sums)
        tally.add("allgather_base", stream, sums)
        tally.add("allreduce", model.width, 2 * blocks + 1)  # norms' gains see some of the tokens
    else:
        tally.add("allreduce", stream, sums)
    # Of each token the highest logit, the label's, the sum of exponentials; for z-loss the first
    # and the last.
    tally.add("allreduce", tokens, 3 + 2)
    if model.variant in ("mac", "mag", "mal"):
        tally.add("allreduce", prefix * model.width, blocks)  # gradient of persistent tokens
    if model.variant == "mal":  # attention reads all that the memory says; there and back
        tally.add("allreduce", stream, 2 * blocks)
        tally.add("allreduce", prefix * model.width, 2 * blocks)
    if model.variant == "mac" and model.memory.projections == "dense":
        positions = micro_batches(config, 2, 0, 1)[row].positions
        plan = VARIANTS["mac"].plan(model, positions, None, torch.zeros(1))
        for step in plan.steps:  # all documents' segments of equal number
            segment = step.documents * (step.end - step.begin) * model.width
            tally.add("allgather_base", segment, blocks)  # h; and back
            tally.add("reduce_scatter_base", segment / ranks, blocks)
            tally.add("allreduce", segment, 2 * blocks)  # Y; and back


def context(tally: Tally, config: RunConfig) -> None:
    """Of two ranks, the first sends states, the second their gradients; everything is float32."""
    model = config.model
    width, d = model.width, model.head_width
    kept = 2 * model.heads * model.memory.depth * d * model.memory.expansion * d  # (W, S)
    messages = [3 * TAIL * width, kept]
    if model.variant == "mag":  # keys and values that the window still sees
        messages.append(2 * (model.attention_window - 1) * width)
    for elements in messages:
        tally.add("send", elements, model.blocks)
        tally.add("recv", elements, model.blocks)


def counted(config: RunConfig) -> tuple[Counted, int, int, int]:
    """Of a step after the first; parameters of the piece; calls inside the memory's update and
    read; how often that ran."""
    world, step = start(config)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in step.model.parameters())
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
    world.shut_down()
    return seen.counted, parameters, sum(n["calls"] for n in inside.counted.values()), ran


Case = tuple[str, int, dict[str, Any], dict[str, Any]]
OWN = {"model__memory__projections": "block_diagonal"}
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
    "CP2 lmm": ("lmm", 2, {"context": 2}, {}),
    "CP2 mag": ("mag", 2, {"context": 2}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_of_the_arithmetic(case: str) -> None:
    variant, ranks, parallel, changes = CASES[case]
    config = parity_config(variant, parallel, train__global_batch=ROWS, **changes)
    layout = plan_layout(config, ranks)
    for found, parameters, inside, ran in run_world(counted, ranks, config):
        assert found == expected(config, layout, parameters)
        assert inside == 0
        assert variant == "transformer" or ran
