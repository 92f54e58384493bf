"""Recompute changes nothing; lower precision stays near; pads stay finite."""

import pytest
import torch

from tests.live_bytes import LiveBytes
from tests.model.helpers import (
    CASES,
    VOCAB,
    config_of,
    gradients,
    hot_model,
    labels_of,
    loss_of,
    packed,
    tokens_like,
)
from titans_pretrain.config import ModelConfig
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, initialise

ROWS = [[5, 9], [14], [3]]


@pytest.mark.parametrize("case", CASES)
def test_recompute_gives_the_same_bits(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = packed(ROWS, config.alignment)
    tokens = tokens_like(positions)
    kept = gradients(model, loss_of(model, tokens, positions))
    calls = []
    hook = model.blocks["1"].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    again = gradients(model, loss_of(model, tokens, positions))
    hook.remove()
    assert len(calls) == 2
    for name, g in kept.items():
        assert torch.equal(g, again[name]), name


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mac", "mag", "mal"])
def test_recompute_keeps_little_more_than_each_blocks_input(variant: str) -> None:
    """Live bytes after forward, and at the peak of forward and backward."""
    shape = {"blocks": 6, "width": 32, "heads": 2, "mlp_width": 96, "vocab_size": VOCAB}
    memory = {"chunk": 16, "expansion": 2}
    tree = {"variant": variant, "segment": 32, "persistent_tokens": 4, "memory": memory, **shape}
    model = TitansLM(ModelConfig.model_validate(tree))
    initialise(model, 0)
    positions = torch.arange(128).expand(2, 128)
    tokens = tokens_like(positions)
    held, peak = {}, {}
    for recompute in (False, True):
        model.recompute = recompute
        with LiveBytes() as live:
            loss = token_loss(model(tokens, positions, carry=False)[0], tokens).sum()
            held[recompute] = live.now
            loss.backward()
        peak[recompute] = live.peak
        model.zero_grad()
    entries = 6 * 2 * 128 * 32 * 4  # the blocks' inputs
    assert entries <= held[True] < held[False] / 4
    assert peak[True] < peak[False] / 2


@pytest.mark.parametrize("case", CASES)
def test_carrying_changes_no_output(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = packed(ROWS, config.alignment)
    tokens = tokens_like(positions)
    carried, state = model(tokens, positions)
    plain, none = model(tokens, positions, carry=False)
    assert torch.equal(carried, plain) and none is None and set(state) == {"0", "1"}


@pytest.mark.parametrize(
    ("dtype", "output", "gradient"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 0.03, 0.1)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_follows_float64(
    case: str, dtype: torch.dtype, output: float, gradient: float
) -> None:
    """Relative error of all outputs and of all gradients; heads of 16 features or more, since a
    LayerNorm over 4 nearly equal ones magnifies any rounding."""
    config = config_of(case, width=48)
    exact = TitansLM(config, dtype=torch.float64)
    initialise(exact, 0)
    model = TitansLM(config, dtype=dtype)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the same rounded weights
    positions = packed(ROWS, config.alignment)
    tokens = tokens_like(positions)
    real = positions >= 0
    a, _ = exact(tokens, positions)
    b, state = model(tokens, positions)
    assert b.dtype == dtype
    assert (a - b)[real].norm() < output * a[real].norm()
    loss = token_loss(b, labels_of(tokens))[real].sum()
    assert loss.dtype == torch.float32
    rounded, true = gradients(model, loss), gradients(exact, loss_of(exact, tokens, positions))
    assert all(g.dtype == dtype for g in rounded.values())
    error = torch.cat([(rounded[n] - g).flatten() for n, g in true.items()])
    assert error.norm() < gradient * torch.cat([g.flatten() for g in true.values()]).norm()
    if config.variant != "transformer":
        memory = next(iter(state.values())).memory
        assert all(w.dtype == torch.float32 for w in memory.weights)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_pads_are_finite_and_give_no_gradient(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = packed([[9], [1]], config.alignment)
    tokens = tokens_like(positions)
    one = gradients(model, loss_of(model, tokens, positions))
    more = torch.cat((positions, torch.full_like(positions, -1)))
    doubled = tokens.repeat(2, 1)
    two = gradients(model, loss_of(model, doubled, more))
    for name, g in one.items():
        assert (g - two[name]).abs().max() <= 1e-12 * g.abs().max(), name
    logits, _ = model(doubled, more)
    assert torch.isfinite(logits).all()
    nothing, _ = model(tokens, torch.full_like(positions, -1))
    assert torch.isfinite(nothing).all()


def test_loss_is_the_cross_entropy_in_nats() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]], dtype=torch.bfloat16)
    loss = token_loss(logits, torch.tensor([[2, 0]]))
    expected = [-2 + torch.logsumexp(torch.tensor([0.0, 1.0, 2.0]), 0).item(), 1.0986123]
    assert loss.dtype == torch.float32 and loss[0].tolist() == pytest.approx(expected, rel=1e-6)
