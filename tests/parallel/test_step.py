"""The step through Megatron's schedule and DeepSpeed ZeRO-1 against one plain process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.through_zero import assert_equals_one_plain_process, start
from tests.parallel.tiny import PlainRun, batch_of, micro_batches, tiny_config
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import DivergedError
from titans_pretrain.model.shapes import kind


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("variant", ["transformer", "tied", "z-loss", "lmm", "mac", "mag", "mal"])
def test_every_gradient_and_update_equals_one_plain_process(ranks: int, variant: str) -> None:
    config = tiny_config(
        model__variant="transformer" if variant in ("tied", "z-loss") else variant,
        model__tied_embeddings=variant == "tied",
        train__z_loss=0.1 if variant == "z-loss" else 0.0,
    )
    assert_equals_one_plain_process(config, ranks)


def engine_calls(config: RunConfig, steps: int) -> list[str]:
    """The engines' own functions, in the order in which `steps` steps called them."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from megatron.core.pipeline_parallel import schedules

    calls: list[str] = []

    def noted(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(what)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    noted(schedules, "forward_backward_no_pipelining", "schedule")
    noted(schedules, "forward_step", "forward")
    noted(schedules, "backward_step", "backward")
    noted(DeepSpeedEngine, "step", "zero")
    world, step = start(config)
    for s in range(1, steps + 1):
        step(micro_batches(config, s, world.rank, world.size), s)
    world.shut_down()
    return calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_step_passes_once_through_each_engine(ranks: int) -> None:
    """Seen by the engines: each micro-batch forward and backward in Megatron, then one ZeRO step.

    Megatron runs the last micro-batch by the same two functions as the others.
    """
    micro = 4 // ranks
    one_step = ["schedule", *["forward", "backward"] * micro, "zero"]
    for calls in run_world(engine_calls, ranks, tiny_config(), 3):
        assert calls == one_step * 3


def first_update(config: RunConfig) -> Any:
    world, step = start(config)
    before = {f.name: f.tensors["weight"].clone() for f in step.optimizer.fragments()}
    step(micro_batches(config, 1, world.rank, world.size), 1)
    after = {f.name: f.tensors["weight"].clone() for f in step.optimizer.fragments()}
    world.shut_down()
    return {name: (before[name], after[name]) for name in before}


def test_each_decay_group_has_its_own_rate_and_decay_in_the_engine() -> None:
    """AdamW's first update moves a weight w by rate * (decay * w + sign of its gradient)."""
    rates = {"decay": 1.0, "no_decay": 1.0, "gate": 0.5, "fast_init": 0.25}
    decays = {"decay": 0.2, "no_decay": 0.0, "gate": 0.3, "fast_init": 0.4}
    config = tiny_config(
        model__variant="lmm",
        optim__warmup_steps=0,
        optim__schedule="constant",
        optim__weight_decay=decays["decay"],
        optim__gate_lr_scale=rates["gate"],
        optim__gate_weight_decay=decays["gate"],
        optim__init_lr_scale=rates["fast_init"],
        optim__init_weight_decay=decays["fast_init"],
    )
    seen = set()
    for rank in run_world(first_update, 2, config):
        for name, (before, after) in rank.items():
            group = kind(name)
            seen.add(group)
            moved = (before - after) / (config.optim.lr * rates[group]) - decays[group] * before
            # Small gradients drown in AdamW's epsilon; the largest of each tensor does not.
            assert float(moved.abs().max()) == pytest.approx(1, abs=2e-3), name
    assert seen == set(rates)


def poisoned(config: RunConfig, where: str) -> Any:
    world, step = start(config)
    step(micro_batches(config, 1, world.rank, world.size), 1)
    before = [{k: v.clone() for k, v in f.tensors.items()} for f in step.optimizer.fragments()]
    model = [p.detach().clone() for p in step.model.parameters()]
    batches = micro_batches(config, 2, world.rank, world.size)
    if where == "loss" and world.rank == world.size - 1:
        handle = step.model.final_norm.register_forward_hook(lambda m, a, out: out * float("nan"))
    elif where == "gradient" and world.rank == world.size - 1:
        weight = step.model.blocks["1"].mlp.down.weight
        handle = weight.register_hook(lambda g: g * float("inf"))
    message = ""
    try:
        step(batches, 2)
    except DivergedError as e:
        message = str(e)
    if world.rank == world.size - 1:
        handle.remove()
    after = step.optimizer.fragments()
    same = all(
        torch.equal(f.tensors[k], v) for f, old in zip(after, before) for k, v in old.items()
    ) and all(torch.equal(p, q) for p, q in zip(step.model.parameters(), model))
    adam = [
        float(step.optimizer.adamw.state[g["params"][0]]["step"])
        for g in step.optimizer.adamw.param_groups
    ]
    samples = [s for b in batches for s in b.samples.tolist()]
    world.shut_down()
    return message, same, adam, samples


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_poisoned_step_changes_nothing_and_names_the_culprit(where: str, precision: str) -> None:
    results = run_world(poisoned, 2, tiny_config(train__precision=precision), where)
    for message, same, adam, _ in results:
        assert same, "a weight or moment changed"
        assert set(adam) == {1.0}
        assert message.startswith("step 2: loss")
        assert "rank 1" in message and "rank 0" not in message
        assert ", ".join(str(s) for s in results[1][3]) in message
        if where == "gradient":
            assert "blocks.1.mlp.down.weight" in message
    assert results[0][0] == results[1][0]


def kinds_of_tensors(config: RunConfig) -> Any:
    world, step = start(config)
    step(micro_batches(config, 1, world.rank, world.size), 1)
    fragments = step.optimizer.fragments()
    owned = {key: {f.tensors[key].dtype for f in fragments} for key in fragments[0].tensors}
    rounded = all(
        parameter.dtype == torch.bfloat16
        and torch.equal(
            parameter.detach().view(-1)[f.start : f.start + f.numel],
            f.tensors["weight"].bfloat16(),
        )
        for f in fragments
        for parameter in (step.model.get_parameter(f.name),)
    )
    finer = any((f.tensors["weight"] != f.tensors["weight"].bfloat16()).any() for f in fragments)
    world.shut_down()
    return owned, rounded, finer


def test_bf16_masters_and_moments_are_fp32() -> None:
    for owned, rounded, finer in run_world(
        kinds_of_tensors, 2, tiny_config(train__precision="bf16")
    ):
        assert owned == {key: {torch.float32} for key in ("weight", "exp_avg", "exp_avg_sq")}
        assert rounded, "the model computes with the masters, rounded"
        assert finer, "the masters hold what bf16 cannot"


def losses(config: RunConfig) -> list[tuple[float, float]]:
    world, step = start(config)
    reports = [step(micro_batches(config, s, world.rank, world.size), s) for s in range(1, 5)]
    world.shut_down()
    return [(r.loss, r.grad_norm) for r in reports]


def test_bf16_keeps_fp32_masters_and_stays_near_fp32() -> None:
    (exact,) = run_world(losses, 1, tiny_config())
    for ranks in (1, 2):
        near = run_world(losses, ranks, tiny_config(train__precision="bf16"))[0]
        for (a, na), (b, nb) in zip(near, exact, strict=True):
            assert a == pytest.approx(b, rel=1e-2) and a != b
            assert na == pytest.approx(nb, rel=5e-2)


def test_recompute_changes_nothing() -> None:
    (plain,) = run_world(losses, 1, tiny_config())
    (again,) = run_world(losses, 1, tiny_config(train__recompute="blocks"))
    assert plain == again


def z_losses(config: RunConfig) -> Any:
    world, step = start(config)
    batches = micro_batches(config, 1, world.rank, world.size)
    before = step.evaluate(batches)
    report = step(batches, 1)
    world.shut_down()
    return before, report.loss, report.z_loss, report.grad_norm


@pytest.mark.parametrize("ranks", [1, 2])
def test_z_loss_is_reported_beside_the_loss_and_never_in_it(ranks: int) -> None:
    plain = PlainRun(tiny_config(train__global_batch=8))
    batch = batch_of(list(range(8, 16)))  # the samples of step 1
    with torch.no_grad():
        logits = plain.model(batch.tokens, batch.positions)[0][batch.loss_mask]
    expected = 0.25 * logits.exp().sum(-1).log().square().mean().item()
    assert expected > 0.1
    (with_z, *_), (without, *_) = (
        run_world(z_losses, ranks, tiny_config(train__z_loss=z)) for z in (0.25, 0.0)
    )
    assert with_z[:2] == without[:2]  # what is validated and reported: the cross entropy
    assert with_z[1] == pytest.approx(with_z[0][0], rel=1e-6)
    assert with_z[2] == pytest.approx(expected, rel=1e-5) and without[2] == 0
    assert abs(with_z[3] / without[3] - 1) > 1e-3
