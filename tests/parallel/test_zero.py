"""Every layout and ZeRO stage through Megatron and DeepSpeed against one plain process, in fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import (
    Done,
    assemble,
    assert_equals_one_plain_process,
    batches_of,
    beginning,
    heated,
    run_steps,
    start,
)
from tests.parallel.tiny import PlainRun
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import DivergedError
from titans_pretrain.measure.footprint import held_bytes

# With heads of 4 features, as in the float64 tests, and the usual rate of 1e-2, the plain process
# itself, its weights changed by 1e-7, goes 3e-3 of its way elsewhere in 20 steps; so it is 2e-4,
# with the gradient norms within 1e-6.
WELL_CONDITIONED = {"model__width": 64, "model__heads": 4, "optim__lr": 1e-3}

# Small parameters stay whole by default, and these models have no others.
ALL_DIVIDED = {"stage": 3, "whole_below": 0}

# Ranks and degrees.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2 Z1": (2, {"zero": {"stage": 1}}),
    "DP4 Z1": (4, {}),
    "DP2 Z2": (2, {"zero": {"stage": 2}}),
    "DP2 Z3": (2, {"zero": {"stage": 3}}),
    "DP2 Z3, all divided": (2, {"zero": ALL_DIVIDED}),
    "DP2 Z1 offloaded": (2, {"zero": {"stage": 1, "offload": True}}),
    "DP2 Z2 offloaded": (2, {"zero": {"stage": 2, "offload": True}}),
    "DP2 Z3 offloaded": (2, {"zero": {"stage": 3, "offload": True}}),
    "DP2 Z3 offloaded, all divided": (2, {"zero": {**ALL_DIVIDED, "offload": True}}),
    "DP2 Z3 overlapped, all divided": (
        2,
        {"zero": {**ALL_DIVIDED, "overlap": True, "bucket": 5000}},
    ),
    "DP4 Z3 in pairs": (4, {"zero": {**ALL_DIVIDED, "copy_within": 2}}),
    "DP2 Z2 overlapped": (2, {"zero": {"stage": 2, "overlap": True, "bucket": 5000}}),
    "TP2 DP2 Z3 in pairs": (4, {"tensor": 2, "zero": {**ALL_DIVIDED, "copy_within": 2}}),
    "TP2 DP2 Z1": (4, {"tensor": 2}),
    "TP2 DP2 Z2": (4, {"tensor": 2, "zero": {"stage": 2}}),
    "TP2 DP2 Z3": (4, {"tensor": 2, "zero": ALL_DIVIDED}),
    "TP2+SP DP2 Z3": (4, {"tensor": 2, "sequence": True, "zero": ALL_DIVIDED}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "TP2 PP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "CP2 DP2": (4, {"context": 2}),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2}),
}


# The weights that both sides begin with: the memory is heard, and rounding grows little.
HEAT = 0.6


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mag", "mal"])
def test_twenty_steps_of_every_variant_under_zero_3(variant: str) -> None:
    config = parity_config(variant, {"zero": ALL_DIVIDED}, **WELL_CONDITIONED)
    assert_equals_one_plain_process(config, 2, HEAT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_mac(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    assert_equals_one_plain_process(parity_config("mac", parallel, **WELL_CONDITIONED), ranks, HEAT)


@pytest.mark.slow
def test_twenty_steps_of_mac_in_three_directions() -> None:
    config = parity_config("mac", {"tensor": 2, "pipeline": 2}, **WELL_CONDITIONED)
    assert_equals_one_plain_process(config, 8, HEAT)


def some_steps(ranks: int, parallel: dict[str, Any], **changes: Any) -> list[Done]:
    config = parity_config("mac", parallel, **WELL_CONDITIONED, **changes)
    return run_world(run_steps, ranks, config, [1, 2, 3], beginning(heated(config, HEAT)))


def assert_same(one: list[Done], other: list[Done], rel: float, of_its_way: float) -> None:
    """Losses, gradient norms and how far each tensor moved; copies are equal."""
    for s, (loss, norm, _) in one[0].on_end.items():
        assert other[0].on_end[s][:2] == pytest.approx((loss, norm), rel=rel), s
    begin = heated(parity_config("mac", {}, **WELL_CONDITIONED), HEAT).weights()
    expected, got = (assemble([rank.weights for rank in ranks], begin) for ranks in (one, other))
    for name, weight in expected.items():
        moved = (weight - begin[name]).norm()
        assert (got[name] - weight).norm() <= of_its_way * moved, name


@pytest.fixture(scope="module")
def bf16() -> list[Done]:
    return some_steps(2, {}, train__precision="bf16")


@pytest.mark.parametrize(
    "zero", [{"stage": 1, "offload": True}, {"stage": 2}, ALL_DIVIDED], ids=str
)
def test_bf16_is_the_same_in_every_stage(bf16: list[Done], zero: dict[str, Any]) -> None:
    """Gradients are accumulated and summed in float32 in all of them."""
    other = some_steps(2, {"zero": zero}, train__precision="bf16")
    assert_same(bf16, other, rel=1e-6, of_its_way=1e-4)


def fused_steps(*args: Any) -> tuple[Any, int]:
    """`run_steps` with the update that a GPU has; and how often its kernel ran."""
    from titans_pretrain.parallel import zero

    kernel, calls = torch._fused_adamw_, []

    def counted(*args: Any, **options: Any) -> None:
        calls.append(args)
        kernel(*args, **options)

    zero.fuses = lambda model, of: True
    torch._fused_adamw_ = counted
    return run_steps(*args), len(calls)


def test_the_fused_update_goes_on_from_a_loaded_state() -> None:
    config = parity_config("lmm", {}, **WELL_CONDITIONED)
    plain = PlainRun(config)
    plain.step(1), plain.step(2)
    begin, reference = plain.weights(), {3: (plain.weights(), plain.moments())}
    plain.step(3), plain.step(4)
    ((result, calls),) = run_world(fused_steps, 1, config, [3, 4], reference)
    assert calls > 0
    got = assemble([result.weights], begin)
    for name, weight in plain.weights().items():
        moved = (weight - begin[name]).norm()
        assert (got[name] - weight).norm() <= 1e-3 * moved, name


def poisoned(config: RunConfig) -> tuple[str, bool, list[int]]:
    """A gradient that is not finite on the last rank, in step 2: the message, whether weights and
    moments are what they were, the rank's samples."""
    world, step = start(config)
    step(batches_of(config, 1, world), 1)
    before = [{k: t.clone() for k, t in f.tensors.items()} for f in step.optimizer.fragments()]
    if world.rank == world.size - 1:
        head = step.stages[-1].model.head
        head.register_full_backward_hook(lambda m, given, out: (given[0] * float("inf"),))
    batches, message = batches_of(config, 2, world), ""
    try:
        step(batches, 2)
    except DivergedError as e:
        message = str(e)
    after = step.optimizer.fragments()
    same = all(
        torch.equal(f.tensors[k], t) for f, old in zip(after, before) for k, t in old.items()
    )
    world.shut_down()
    return message, same, [s for b in batches for s in b.samples.tolist()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_poisoned_step_changes_nothing_where_gradients_are_divided(
    stage: int, precision: str
) -> None:
    config = parity_config(
        "lmm", {"zero": {"stage": stage}}, train__precision=precision, **WELL_CONDITIONED
    )
    for message, same, samples in run_world(poisoned, 2, config):
        assert message.startswith("step 2: loss")
        assert str(samples[0]) in message
        assert same, "a weight or a moment changed"


def held(config: RunConfig) -> tuple[dict[str, int], int]:
    world, step = start(config)
    step(batches_of(config, 1, world), 1)
    bytes_by_kind = held_bytes(step)
    whole = sum(math.prod(s.shape) for s in step.pieces.shards.values())
    world.shut_down()
    return bytes_by_kind, whole


@pytest.mark.parametrize(
    ("parallel", "ranks", "kept", "divided"),
    [
        ({"zero": {"stage": 1}}, 2, 1, 2),
        ({"zero": {"stage": 2}}, 2, 1, 2),
        ({"zero": {"stage": 3}}, 2, 2, 2),
        ({"zero": ALL_DIVIDED}, 2, 2, 2),
        ({"tensor": 2}, 4, 2, 4),
    ],
)
def test_bytes_a_rank_holds_are_those_of_the_arithmetic(
    parallel: dict[str, Any], ranks: int, kept: int, divided: int
) -> None:
    """fp32: 4 bytes a parameter, 12 more for the master weight and two moments. Norms and what else
    is not divided among tensor-parallel ranks, and padding, make up the rest."""
    config = parity_config("lmm", parallel, model__width=128, model__heads=4, model__mlp_width=512)
    for found, whole in run_world(held, ranks, config):
        gathered = 4 * whole if parallel.get("zero") == {"stage": 3} else 0
        assert found["parameters"] - gathered == pytest.approx(4 * whole / kept, rel=0.02)
        assert found["optimizer state"] == pytest.approx(12 * whole / divided, rel=0.02)
