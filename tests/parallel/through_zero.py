"""Steps of any layout through Megatron's schedule and DeepSpeed ZeRO, and what they gave, whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from tests.model.helpers import inert
from tests.parallel.parity import values_of
from tests.parallel.tiny import PlainRun, micro_batches
from tests.worlds import run_world
from titans_pretrain.config import ParallelConfig, RunConfig
from titans_pretrain.data.batch import concatenate
from titans_pretrain.model.loss import token_loss
from titans_pretrain.parallel.layout import Box, Fragment, Shard, plan_layout
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.parallel.zero import MOMENTS
from titans_pretrain.step import TrainStep

Owned = list[tuple[str, bool, list[tuple[Box, torch.Tensor]]]]  # name, first, pieces
Tensors = dict[str, torch.Tensor]
Before = dict[int, tuple[Tensors, dict[str, Tensors]]]  # step -> weights and moments before it
APART = (5, 10, 20)  # steps compared on their own, beside the first


def start(config: RunConfig) -> tuple[World, TrainStep]:
    layout = plan_layout(config, world_size())
    world = start_world(config.train, layout)
    return world, TrainStep(config, layout, world)


def batches_of(config: RunConfig, step: int, world: World) -> Any:
    return micro_batches(config, step, world.place.data, world.layout.data_parallel)


def pieces(fragments: list[Fragment], key: str, scale: float = 1.0) -> Owned:
    """Each fragment's tensor by the boxes of the unsharded parameter that it fills."""
    found = []
    for f in fragments:
        at, boxes = 0, []
        for box in f.boxes():
            n = int(torch.Size(box[1]).numel())
            boxes.append((box, f.tensors[key][at : at + n].clone() * scale))
            at += n
        found.append((f.name, f.first, boxes))
    return found


def assemble(parts: list[Owned], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces. What is `first` covers every element exactly once;
    other copies must be equal to it."""
    whole = {name: torch.full_like(t, torch.nan) for name, t in like.items()}
    covered = {name: torch.zeros_like(t) for name, t in like.items()}
    for wanted in (True, False):
        for part in parts:
            for name, first, boxes in part:
                for (offsets, sizes), tensor in boxes if first == wanted else ():
                    where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                    if wanted:
                        whole[name][where] = tensor.view(sizes)
                        covered[name][where] += 1
                    else:
                        off = (whole[name][where] - tensor.view(sizes)).abs().max()
                        assert off <= 1e-6 * whole[name].abs().max(), f"{name}: copies differ"
    for name, times in covered.items():
        assert (times == 1).all(), name
    return whole


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()


def heated(config: RunConfig, heat: float) -> PlainRun:
    """A plain process that begins with weights at which the memory is heard; 0: as initialised."""
    plain = PlainRun(config)
    if heat:
        values = values_of(config, heat)
        with torch.no_grad():
            for name, p in plain.model.named_parameters():
                p.copy_(values[name])
    return plain


def beginning(plain: PlainRun) -> Before:
    """What a layout has to load before step 1 to begin as a plain process does."""
    weights = plain.weights()
    nothing = {k: {n: torch.zeros_like(w) for n, w in weights.items()} for k in MOMENTS}
    return {1: (weights, {n: {k: nothing[k][n] for k in MOMENTS} for n in weights})}


def load(step: TrainStep, before: Before, number: int) -> None:
    """The weights and moments that the plain process had before a step."""
    weights, moments = before[number]
    for f in step.optimizer.fragments():
        cut = slice(f.start, f.start + f.numel)
        f.tensors["weight"].copy_(f.shard.of(weights[f.name]).reshape(-1)[cut])
        for k in MOMENTS:
            f.tensors[k].copy_(f.shard.of(moments[f.name][k]).reshape(-1)[cut])
    step.optimizer.weights_loaded(number - 1)


def observed(step: TrainStep, number: int) -> tuple[float, float, Owned]:
    """Does a step: loss, gradient norm, and the gradients before clipping that this rank owns."""
    seen: list[Fragment] = []
    handle = step.optimizer.on_reduced_gradients(
        lambda owned: seen.extend(_copied(f) for f in owned.values())
    )
    report = step(batches_of(step.config, number, step.world), number)
    handle.remove()
    clip = max(1.0, (report.grad_norm + 1e-6) / step.config.optim.clip)
    return report.loss, report.grad_norm, pieces(seen, "gradient", clip)


@dataclass
class Done:
    """What a rank saw. on_end, apart: step -> loss, gradient norm, gradients before clipping."""

    on_end: dict[int, tuple[float, float, Owned]]
    apart: dict[int, tuple[float, float, Owned]]
    weights: Owned  # masters, after the steps on end
    model: dict[str, tuple[Shard, torch.Tensor]]  # what forwards use then; not in stage 3
    calls: int  # of Megatron's schedule
    updates: int  # of DeepSpeed


def run_steps(config: RunConfig, steps: list[int], before: Before | None = None) -> Done:
    """Runs `steps` on end; then those of APART that `before` knows, each from there. It also says
    from where the first step begins; else the model is as it is built."""
    world, step = start(config)
    before = before or {}
    if steps[0] in before:
        load(step, before, steps[0])
    on_end = {s: observed(step, s) for s in steps}
    weights, model = pieces(step.optimizer.fragments(), "weight"), {}
    if config.parallel.zero.stage < 3:
        shards = step.pieces.shards
        model = {
            path: (shards[path], p.detach().clone()) for path, p in step.model.named_parameters()
        }
    apart = {}
    for s in APART:
        if s in before:
            load(step, before, s)
            apart[s] = observed(step, s)
    world.shut_down()
    calls, updates = step.schedule.calls, step.optimizer.engine.global_steps
    return Done(on_end, apart, weights, model, calls, updates)


def _copied(f: Fragment) -> Fragment:
    tensors = {k: t.clone() for k, t in f.tensors.items()}
    return Fragment(f.shard, f.start, f.numel, tensors, f.first)


@dataclass
class Plain:
    """Twenty steps of one plain process."""

    before: Before  # each of the steps that are compared
    steps: dict[int, tuple[float, float, Tensors]]  # loss, gradient norm, gradients
    end: Tensors


@lru_cache(maxsize=8)
def twenty_plain_steps(said: str, heat: float) -> Plain:
    """Shared by all layouts of a model: the config (JSON) has none."""
    config = RunConfig.model_validate_json(said)
    plain = heated(config, heat)
    if heat and config.model.variant != "transformer":
        assert heard(plain) > 0.01
    before, steps = beginning(plain), {}
    for s in range(1, 21):
        if s in APART:
            before[s] = plain.weights(), plain.moments()
        steps[s] = plain.step(s)
    return Plain(before, steps, plain.weights())


def heard(plain: PlainRun) -> float:
    """By how much a label's loss in step 1 changes on average, as a share of it, where the memory
    never learns: with an inert memory layouts would agree whatever they do to it."""
    batch = concatenate(micro_batches(plain.config, 1, 0, 1))
    with torch.no_grad():
        losses, without = (
            token_loss(m(batch.tokens, batch.positions)[0], batch.labels)[batch.loss_mask]
            for m in (plain.model, inert(plain.model))
        )
    return float((losses - without).abs().mean() / losses.mean())


def assert_equals_one_plain_process(config: RunConfig, ranks: int, heat: float = 0.0) -> None:
    """Twenty steps on end: losses, gradient norms, how far each tensor moved, and the first
    gradients; then the gradients of steps 5, 10, 20 from the plain process's weights and moments.

    heat: of the weights that both begin with; 0: as each side initialises them."""
    one = config.model_copy(update={"parallel": ParallelConfig()})
    plain = twenty_plain_steps(one.model_dump_json(), heat)
    before = {s: b for s, b in plain.before.items() if s > 1 or heat}
    results = run_world(run_steps, ranks, config, list(range(1, 21)), before)
    first = results[0]
    for s, (loss, norm, _) in plain.steps.items():
        for found in (first.on_end[s], *((first.apart[s],) if s in APART else ())):
            assert found[0] == pytest.approx(loss, rel=1e-5)
            assert found[1] == pytest.approx(norm, rel=1e-5)
    for s in (1, *APART):
        expected = plain.steps[s][2]
        got = assemble([(r.apart.get(s) or r.on_end[s])[2] for r in results], expected)
        worst = {n: relative(got[n], g) for n, g in expected.items()}
        assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda x: -x[1])[:3]

    got = assemble([r.weights for r in results], plain.end)
    for name, weight in plain.end.items():
        moved = (weight - plain.before[1][0][name]).norm()
        assert (got[name] - weight).norm() <= 1e-3 * moved, (
            f"{name}: {(got[name] - weight).norm() / moved:.1e} of its way"
        )
    for result in results:  # the model that the next forward uses is the assembled one
        for shard, weight in result.model.values():
            assert torch.equal(weight, shard.of(got[shard.name])), shard.name
    for result in results:  # every step went once through the schedule and once through ZeRO
        assert result.calls == result.updates == 20 + len(APART)
