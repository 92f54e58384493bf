"""The loss and its penalty by hand."""

import math

import pytest
import torch

from titans_pretrain.model.loss import token_loss, z_penalty

LOGITS = [0.0, 1.0, 2.0]


def test_penalty_value_and_gradient_by_hand() -> None:
    logits = torch.tensor([[LOGITS, [3.0, 3.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    z = z_penalty(logits)
    log_sum = math.log(sum(map(math.exp, LOGITS)))
    assert z[0].tolist() == pytest.approx([log_sum**2, (3 + math.log(3)) ** 2], rel=1e-14)
    (g,) = torch.autograd.grad(z[0, 0], logits)
    softmax = [math.exp(x - log_sum) for x in LOGITS]
    assert g[0, 0].tolist() == pytest.approx([2 * log_sum * p for p in softmax], rel=1e-14)
    assert not g[0, 1].any()


def test_log_probabilities_are_not_punished_and_bf16_is_summed_in_float32() -> None:
    logits = torch.log_softmax(torch.tensor(LOGITS, dtype=torch.float64), 0)
    assert z_penalty(logits).item() < 1e-28
    half = z_penalty(torch.tensor([[LOGITS]], dtype=torch.bfloat16))
    assert half.dtype == torch.float32 and half.item() == pytest.approx(5.796, rel=1e-3)
    labels = torch.tensor([[2]])
    shifted = (
        torch.tensor([[LOGITS]]) + 5
    )  # the cross entropy does not see a shift; the penalty does
    assert token_loss(shifted, labels).item() == pytest.approx(0.40760596, rel=1e-6)
    assert z_penalty(shifted).item() == pytest.approx(7.40760596**2, rel=1e-6)
