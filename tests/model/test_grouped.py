"""Grouped queries: the same as attention whose keys and values are repeated for each group."""

import pytest
import torch

from tests.model.helpers import (
    CASES,
    config_of,
    gradients,
    hot_model,
    loss_of,
    packed,
    tokens_like,
    worst_gradient,
)
from titans_pretrain.model.titans import TitansLM


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("-grouped")])
def test_repeated_keys_and_values_give_the_same(case: str) -> None:
    config = config_of(case)
    d, kv_heads = config.head_width, config.kv_heads
    grouped = hot_model(config)
    full = TitansLM(config.model_copy(update={"kv_heads": None}), dtype=torch.float64)
    weights = grouped.state_dict()
    theirs = [n for n in weights if n.endswith(("attention.k.weight", "attention.v.weight"))]
    for name in theirs:
        by_head = weights[name].view(kv_heads, d, -1)
        assert full.get_parameter(name).shape == (config.width, config.width)
        weights[name] = by_head.repeat_interleave(config.heads // kv_heads, 0).flatten(0, 1)
    full.load_state_dict(weights)

    positions = packed([[9, 5], [13]], config.alignment)
    tokens = tokens_like(positions)
    with torch.no_grad():
        a, state = grouped(tokens, positions)
        b, _ = full(tokens, positions)
    assert (a - b)[positions >= 0].abs().max() < 1e-12
    mine = gradients(grouped, loss_of(grouped, tokens, positions))
    summed = gradients(full, loss_of(full, tokens, positions))
    for name in theirs:
        by_head = summed[name].view(kv_heads, -1, d, config.width)
        summed[name] = by_head.sum(1).flatten(0, 1)
    assert worst_gradient(mine, summed) < (1e-10, "")

    kept = state["0"]
    window = kept if config.variant == "transformer" else getattr(kept, "attention", None)
    keys = kept.segment[0] if window is None else window.k
    assert keys.shape[1] == kv_heads  # what is carried stays small
