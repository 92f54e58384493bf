"""What a plan says a rank holds, beside what ranks of real layouts hold."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.saved import Saved
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.estimate import held
from titans_pretrain.estimate.options import legal
from titans_pretrain.estimate.portion import ends, portion_of
from titans_pretrain.measure.footprint import held_bytes
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.pipeline import Stage

Layouts = dict[str, tuple[int, dict[str, Any]]]
ALL_DIVIDED = {"stage": 3, "whole_below": 0}

LAYOUTS: Layouts = {
    "alone": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP4": (4, {"tensor": 4}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "DP2 Z1": (2, {}),
    "DP4 Z1": (4, {}),
    "DP2 Z2": (2, {"zero": {"stage": 2}}),
    "DP2 Z3": (2, {"zero": {"stage": 3}}),
    "DP2 Z3, all divided": (2, {"zero": ALL_DIVIDED}),
    "TP2 DP2 Z2": (4, {"tensor": 2, "zero": {"stage": 2}}),
    "TP2 DP2 Z3": (4, {"tensor": 2, "zero": ALL_DIVIDED}),
    "TP2 PP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP4": (4, {"context": 4}),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}),
    "CP2 DP2": (4, {"context": 2}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2}),
}


def found_and_expected(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Of this rank: gradients right before the last reduction of a step, the rest after it."""
    world, step = start(config)
    storages: dict[int, int] = {}
    reduce = step.optimizer.engine.allreduce_gradients

    def look(*args: Any, **kwargs: Any) -> Any:
        kept = (t.untyped_storage() for t in step.optimizer.gradient_buffers())
        storages.update({s._cdata: s.nbytes() for s in kept})
        return reduce(*args, **kwargs)

    step(batches_of(config, 1, world), 1)
    step.optimizer.engine.allreduce_gradients = look
    step(batches_of(config, 2, world), 2)
    seen = {**held_bytes(step), "gradients": sum(storages.values())}
    expected = held.held_by(portion_of(config, world.layout, world.place.pipeline))
    world.shut_down()
    kinds = (expected.parameters, expected.gradients, expected.optimizer)
    return seen, dict(zip(("parameters", "gradients", "optimizer state"), kinds))


# In fp32 ZeRO's buffers are others, and the same whatever divides the model.
EXACT = [(name, "bf16") for name in LAYOUTS]
EXACT += [(name, "fp32") for name in LAYOUTS if "DP" in name or name in ("alone", "TP2", "CP2")]


@pytest.mark.parametrize(("layout", "precision"), EXACT)
def test_parameters_gradients_and_optimizer_are_exact(layout: str, precision: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_config("mac", parallel, train__precision=precision)
    stage = parallel.get("zero", {}).get("stage", 1)
    for found, expected in run_world(found_and_expected, ranks, config):
        if stage == 2 and precision == "fp32":  # accumulated in the bucket: a buffer of the plan
            del found["gradients"], expected["gradients"]
        assert found == expected


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mag", "mal"])
def test_they_are_in_every_variant(variant: str) -> None:
    tied = {"model__tied_embeddings": True, "train__precision": "bf16"}
    config = parity_config(variant, {"tensor": 2, "pipeline": 2}, **tied)
    for found, expected in run_world(found_and_expected, 4, config):
        assert found == expected


WIDE = {
    "model__width": 128,
    "model__mlp_width": 256,
    "model__memory__expansion": 2,
    "data__sequence_length": 128,
}


def kept(config: RunConfig) -> tuple[int, float]:
    """Bytes that the forward of one micro-batch, or segment, keeps on this rank, and what a plan
    says."""
    world, step = start(config)
    (batch,) = batches_of(config, 1, world)
    # One document that fills the row.
    batch.positions.copy_(batch.positions.new_tensor(range(batch.positions.shape[1])))
    with Saved(step.model.parameters()) as saved:
        step.schedule.run(step._shares([batch]), tokens_in_step=100)
    if step.link is not None:
        step.link.drain()
    expected = sum(held.kept(portion_of(config, world.layout, world.place.pipeline)).values())
    # A plan counts the rank that holds most: one with a rank before it.
    first = config.parallel.context > 1 and world.place.context == 0
    world.shut_down()
    return saved.bytes() // config.parallel.segments, 0.0 if first else expected


# Stage 3 gathers weights, which autograd then keeps; interleaved stages are below.
KEPT = [("mac", name) for name in LAYOUTS if " x " not in name and "Z3" not in name]
SIMPLE = ("alone", "TP2", "TP2+SP", "PP2", "CP2")
KEPT += [(variant, name) for variant in ("transformer", "lmm", "mag", "mal") for name in SIMPLE]
SEGMENTED: Layouts = {"2 segments": (1, {"segments": 2})}
KEPT += [(variant, name) for variant in ("mac", "mag") for name in SEGMENTED]


@pytest.mark.parametrize(("variant", "layout"), KEPT)
def test_what_a_forward_keeps_is_within_five_percent(variant: str, layout: str) -> None:
    ranks, parallel = (LAYOUTS | SEGMENTED)[layout]
    data = ranks
    for degree in ("tensor", "pipeline", "context"):
        data //= parallel.get(degree, 1)
    times = max(1, parallel.get("context", 1) // 2) * parallel.get("segments", 1)
    length = {**WIDE, "data__sequence_length": 128 * times}
    config = parity_config(variant, parallel, train__global_batch=data, **length)
    for found, expected in run_world(kept, ranks, config):
        assert not expected or expected == pytest.approx(found, rel=0.05), expected / found


def most_alive(config: RunConfig) -> tuple[float, float]:
    """Forwards whose backward has not begun, at most, in micro-batches; and what a plan says."""
    now = most = 0
    forward = Stage.forward

    def counted(self: Stage, *args: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        out = forward(self, *args)

        def begun(gradient: Any) -> None:
            nonlocal now
            now -= 1

        out.register_hook(begun)
        return out

    Stage.forward = counted  # type: ignore[method-assign]
    world, step = start(config)
    step.schedule.run(step._shares(batches_of(config, 1, world)), tokens_in_step=100)
    if step.link is not None:
        step.link.drain()
    expected = held.alive(portion_of(config, world.layout, world.place.pipeline))
    index = world.place.context
    world.shut_down()
    return most / config.parallel.interleave, expected if index == 0 else most


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"pipeline": 2}),
        (4, {"pipeline": 4}),
        (2, {"pipeline": 2, "interleave": 2}),
        (4, {"pipeline": 4, "interleave": 2}),
        (2, {"context": 2}),
        (2, {"context": 2, "order": "FFBB"}),
        (4, {"context": 4, "order": "skewed"}),
        (2, {"context": 2, "segments": 2, "order": "FFBB"}),
        (1, {"segments": 2}),
        (4, {"context": 2, "pipeline": 2}),
    ],
    ids=str,
)
def test_as_many_forwards_are_alive_as_a_plan_says(ranks: int, parallel: dict[str, Any]) -> None:
    config = parity_config("lmm", parallel, train__global_batch=8)
    for found, expected in run_world(most_alive, ranks, config):
        assert found == expected


def test_the_first_stage_or_the_last_holds_most() -> None:
    config = parity_config("mac", {}, model__blocks=8, train__global_batch=64)
    checked = 0
    for _, candidate, layout in legal(config, 16):
        if layout.pipeline > 2:
            everywhere = (portion_of(candidate, layout, s) for s in range(layout.pipeline))
            every = max(h.device for h in map(held.held_by, everywhere))
            assert held.most(ends(candidate, layout)).device == every
            checked += 1
    assert checked > 20


def test_a_plan_counts_recompute_and_offload() -> None:
    def of(**changes: Any) -> held.Held:
        config = parity_config("mac", {"zero": changes.pop("zero", {})}, **changes)
        return held.most(ends(config, plan_layout(config, 2)))

    whole, again = of(model__blocks=8), of(model__blocks=8, train__recompute="blocks")
    assert again.activations < whole.activations / 2
    offloaded = of(zero={"offload": True})
    assert (offloaded.optimizer, offloaded.host) == (0, of().optimizer)
