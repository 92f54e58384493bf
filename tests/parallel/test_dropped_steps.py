"""A step that must change nothing leaves nothing behind, in every layout: those that follow are
bitwise what they would have been."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.parallel.parity import parity_config
from tests.parallel.test_zero import LAYOUTS, WELL_CONDITIONED
from tests.parallel.through_zero import batches_of, start
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import DivergedError
from titans_pretrain.step import TrainStep

GIVEN = {
    "gradient": lambda head: head.register_full_backward_hook(
        lambda m, given, out: (given[0] * math.inf,)
    ),
    "loss": lambda head: head.register_forward_hook(lambda m, args, out: out * math.nan),
}


def drop(step: TrainStep, batches: Any, number: int, why: str) -> str:
    """Does a step that is refused: by its loss, or because the last rank makes it not finite."""
    handle = None
    if why in GIVEN and step.world.rank == step.world.size - 1:
        handle = GIVEN[why](step.stages[-1].model.head)
    seen: list[float] = []

    def judge(loss: float) -> str:
        seen.append(loss)
        return "too high" if why == "judge" else ""

    try:
        step(batches, number, judge)
    except DivergedError as e:
        assert (why == "judge") <= (len(seen) == 1)
        return str(e)
    finally:
        if handle is not None:
            handle.remove()
    raise AssertionError(f"the step with a bad {why} was done")


def trained(config: RunConfig, dropped: bool) -> tuple[Any, list[str]]:
    """(losses, gradient norms, what this rank owns) after four steps; before the last three of
    them others are dropped."""
    world, step = start(config)
    figures, told = [], []
    for number, why in enumerate(("", "judge", "gradient", "loss"), 1):
        if dropped and why:
            told.append(drop(step, batches_of(config, 10 + number, world), number, why))
        report = step(batches_of(config, number, world), number)
        figures.append((report.loss, report.grad_norm))
    owned = [
        (f.name, {k: t.clone() for k, t in f.tensors.items()}) for f in step.optimizer.fragments()
    ]
    world.shut_down()
    return (figures, owned), told


CASES = [
    *((name, "fp32") for name in ("DP2 Z1", "DP2 Z2", "DP2 Z3", "DP2 Z3, all divided", "CP2")),
    *((name, "bf16") for name in ("DP2 Z1", "DP2 Z2", "DP2 Z3, all divided")),
    *((name, "fp32") for name in ("DP2 Z1 offloaded", "DP2 Z2 offloaded", "DP2 Z3 offloaded")),
    *((name, "bf16") for name in ("DP2 Z1 offloaded", "DP2 Z2 offloaded", "DP2 Z3 offloaded")),
    *((name, "fp32") for name in ("DP2 Z2 overlapped", "PP2 x 2", "TP2 PP2+SP", "CP2 PP2")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_dropped_steps_leave_nothing_behind(layout: str, precision: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_config("transformer", parallel, train__precision=precision, **WELL_CONDITIONED)
    plain = run_world(trained, ranks, config, False)
    for (expected, _), (found, told) in zip(plain, run_world(trained, ranks, config, True)):
        assert found[0] == expected[0]
        for (name, tensors), (same, others) in zip(expected[1], found[1], strict=True):
            assert name == same
            for key, tensor in tensors.items():
                assert torch.equal(others[key], tensor), f"{key} of {name}"
        judged, *rest = told
        assert judged.startswith("step 2: loss") and ", too high; samples " in judged
        assert [t.split(":")[0] for t in rest] == ["step 3", "step 4"]
        assert plain[0][0][0] == expected[0], "ranks differ in what they report"
