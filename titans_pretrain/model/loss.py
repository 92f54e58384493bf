"""Cross entropy of each token, and the penalty on its partition function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.model.blocks import wide


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], in nats: [B, T, V], [B, T] -> [B, T] in float32 (float64 stays).

    Every label must be a token of the vocabulary; which of them count is the caller's mask.
    """
    flat = logits.flatten(0, -2).to(wide(logits.dtype))
    return F.cross_entropy(flat, labels.flatten(), reduction="none").view_as(labels)


def z_penalty(logits: Tensor) -> Tensor:
    """(log sum exp logits)^2, [B, T, V] -> [B, T] in float32 (float64 stays).

    0 where the logits are log-probabilities already (PaLM, arXiv 2204.02311, section 5).
    """
    return torch.logsumexp(logits.to(wide(logits.dtype)), dim=-1).square()
