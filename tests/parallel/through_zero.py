"""Steps of any layout through Megatron's schedule and DeepSpeed ZeRO, and what they gave, whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.tiny import PlainRun, micro_batches
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.parallel.layout import Box, Fragment, plan_layout
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.step import TrainStep

Owned = list[tuple[str, bool, list[tuple[Box, torch.Tensor]]]]  # name, first, pieces


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


def run_steps(config: RunConfig, reference: dict[int, Any], steps: list[int]) -> Any:
    """Runs `steps`; before a step that `reference` knows, takes its weights and moments."""
    world, step = start(config)
    out = {}
    for s in steps:
        if s in reference:
            weights, moments = reference[s]
            for f in step.optimizer.fragments():
                cut = slice(f.start, f.start + f.numel)
                f.tensors["weight"].copy_(f.shard.of(weights[f.name]).reshape(-1)[cut])
                for k in ("exp_avg", "exp_avg_sq"):
                    f.tensors[k].copy_(f.shard.of(moments[f.name][k]).reshape(-1)[cut])
            step.optimizer.weights_loaded(s - 1)
        seen: list[Fragment] = []
        handle = step.optimizer.on_reduced_gradients(
            lambda owned: seen.extend(_copied(f) for f in owned.values())  # noqa: B023
        )
        report = step(batches_of(config, s, world), s)
        handle.remove()
        clip = max(1.0, (report.grad_norm + 1e-6) / config.optim.clip)
        out[s] = (report.loss, report.grad_norm, pieces(seen, "gradient", clip))
    weights = pieces(step.optimizer.fragments(), "weight")
    model = {}
    if config.parallel.zero.stage < 3:
        shards = step.pieces.shards
        model = {
            path: (shards[path], p.detach().clone()) for path, p in step.model.named_parameters()
        }
    world.shut_down()
    return out, weights, model, step.schedule.calls, step.optimizer.engine.global_steps


def _copied(f: Fragment) -> Fragment:
    tensors = {k: t.clone() for k, t in f.tensors.items()}
    return Fragment(f.shard, f.start, f.numel, tensors, f.first)


def assert_equals_one_plain_process(config: RunConfig, ranks: int) -> None:
    """Gradients of steps 1, 5, 10, 20 (weights and moments of the plain process put in before),
    then 20 steps on end: losses, gradient norms, and how far each tensor moved."""
    plain = PlainRun(config)
    begin = plain.weights()
    reference: dict[int, Any] = {}
    expected = {}
    for s in range(1, 21):
        if s in (5, 10, 20):
            reference[s] = (plain.weights(), plain.moments())
        expected[s] = plain.step(s)
    end = plain.weights()

    results = run_world(run_steps, ranks, config, reference, [1, 5, 10, 20])
    for s in (1, 5, 10, 20):
        loss, norm, gradients = expected[s]
        assert results[0][0][s][0] == pytest.approx(loss, rel=1e-5)
        assert results[0][0][s][1] == pytest.approx(norm, rel=1e-5)
        got = assemble([r[0][s][2] for r in results], gradients)
        worst = {n: relative(got[n], g) for n, g in gradients.items()}
        assert max(worst.values()) < 1e-5, sorted(worst.items(), key=lambda x: -x[1])[:3]

    results = run_world(run_steps, ranks, config, {}, list(range(1, 21)))
    for s in range(1, 21):
        assert results[0][0][s][0] == pytest.approx(expected[s][0], rel=1e-5)
        assert results[0][0][s][1] == pytest.approx(expected[s][1], rel=1e-5)
    got = assemble([r[1] for r in results], end)
    for name, weight in end.items():
        moved = (weight - begin[name]).norm()
        assert (got[name] - weight).norm() <= 1e-3 * moved, (
            f"{name}: {(got[name] - weight).norm() / moved:.1e} of its way"
        )
    for result in results:  # the model that the next forward uses is the assembled one
        for shard, weight in result[2].values():
            assert torch.equal(weight, shard.of(got[shard.name])), shard.name
    for result in results:  # every step went once through the schedule and once through ZeRO
        assert result[3] == 20 and result[4] == 20
