"""What a divided model writes is what one process with the same weights writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.evaluate.generate import generate
from titans_pretrain.parallel.together import Together
from titans_pretrain.step import build_model

PROMPTS = [[1, 7, 30, 11, 5, 9, 20], [1, 40], [1, *range(20, 45)]]  # across a segment's end
TOKENS = 10


class Noting(torch.nn.Module):
    """A model, and the logits after each text that it has been asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.logits = model, []

    def forward(self, tokens: Any, positions: Any, state: Any = None) -> Any:
        logits, state = self.model(tokens, positions, state)
        self.logits.append(logits[positions >= 0].detach().clone())
        return logits, state


def write(model: torch.nn.Module) -> tuple[list[list[int]], list[torch.Tensor]]:
    noting = Noting(model)
    return generate(noting, PROMPTS, TOKENS, temperature=0), noting.logits


def divided(config: RunConfig, writes: bool) -> Any:
    """On a rank: what rank 0 wrote, twice; the loss of a step after that; whether it took part."""
    world, step = start(config)
    told: list[Any] = []
    model = step.whole_model
    if writes and model is not None:
        assert isinstance(model, Together)
        for _ in range(2):
            if world.rank == 0:
                with model.leading():
                    told.append(write(model))
            else:
                model.follow()
    assert step.model.training
    loss = step(batches_of(config, 1, world), 1).loss
    world.shut_down()
    return told, loss, model is not None


LAYOUTS: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # variant, ranks, that take part
    "TP2": ("lmm", 2, 2, {"tensor": 2}),
    "TP2+SP": ("mac", 2, 2, {"tensor": 2, "sequence": True}),
    "PP2": ("mac", 2, 2, {"pipeline": 2}),
    "PP2 x 2": ("mal", 2, 2, {"pipeline": 2, "interleave": 2}),
    "CP2": ("mac", 2, 1, {"context": 2}),
    "3 segments": ("mag", 1, 1, {"segments": 3}),
    "DP2 Z3": ("mac", 2, 2, {"zero": {"stage": 3}}),
    "TP2+SP DP2 Z3": ("mag", 4, 4, {"tensor": 2, "sequence": True, "zero": {"stage": 3}}),
    "TP2 PP2": ("transformer", 4, 4, {"tensor": 2, "pipeline": 2}),
    "PP2 CP2": ("mac", 4, 2, {"pipeline": 2, "context": 2}),
}


SLOW = ("TP2", "PP2", "TP2+SP DP2 Z3", "TP2 PP2", "PP2 CP2")


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_what_is_written_equals_one_process(layout: str) -> None:
    variant, ranks, together, parallel = LAYOUTS[layout]
    config = parity_config(variant, parallel, model__heads=4, train__precision="fp32")
    alone = build_model(
        config.model,
        seed=config.train.seed,
        dtype=torch.float32,
        device=torch.device("cpu"),
        recompute=False,
    )
    expected, logits = write(alone)
    assert len({tuple(text) for text in expected}) == 3
    assert all(len(text) == TOKENS for text in expected)
    results = run_world(divided, ranks, config, True, timeout=100)
    assert sum(part for *_, part in results) == together
    told = results[0][0]
    assert len(told) == 2
    for texts, seen in told:
        assert texts == expected
        for mine, theirs in zip(seen, logits, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["PP2 x 2", "CP2", "DP2 Z3"])
def test_training_goes_on_as_if_nothing_was_written(layout: str) -> None:
    variant, ranks, _, parallel = LAYOUTS[layout]
    config = parity_config(variant, parallel, model__heads=4, train__precision="fp32")
    with_text, without = (run_world(divided, ranks, config, w, timeout=100) for w in (True, False))
    assert [loss for _, loss, _ in with_text] == [loss for _, loss, _ in without]
    assert with_text[0][0] and not without[0][0]
