"""The fast models against the same models written token by token."""

import pytest
import torch

from tests.model.helpers import (
    CASES,
    config_of,
    gradients,
    hot_model,
    inert,
    labels_of,
    loss_of,
    losses_of,
    tokens_like,
    worst_gradient,
)
from tests.model.reference import reference_logits
from titans_pretrain.model.loss import token_loss

LENGTH = 19


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_every_gradient_equal_the_token_by_token_model(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = torch.arange(LENGTH)[None]
    tokens = tokens_like(positions)
    logits, _ = model(tokens, positions)
    expected = reference_logits(config, dict(model.named_parameters()), tokens[0].tolist())
    assert (logits[0] - expected).abs().max() < 1e-10

    loss = token_loss(expected, labels_of(tokens[0])).sum()
    actual = gradients(model, loss_of(model, tokens, positions))
    reference = gradients(model, loss)
    for name, gradient in reference.items():
        assert gradient is not None and gradient.abs().max() > 1e-9, name
    assert worst_gradient(actual, reference) < (1e-10, "")


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("transformer")])
def test_the_memory_of_the_tested_models_matters(case: str) -> None:
    """Otherwise the tests of this folder would pass with a memory that does nothing."""
    model = hot_model(config_of(case))
    positions = torch.arange(LENGTH)[None]
    tokens = tokens_like(positions)
    losses = losses_of(model, tokens, positions)
    moved = losses_of(inert(model), tokens, positions) - losses
    assert moved.abs().sum() > 0.05 * losses.sum()
