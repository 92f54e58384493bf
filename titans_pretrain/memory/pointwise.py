"""Activations with two derivatives, and LayerNorm with its transpose, by hand (MATH.md, section 6).

All act on the last dimension or elementwise; x [.., d].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.state import LAYER_NORM_EPS


def activate(x: Tensor, kind: str) -> Tensor:
    """s(x)."""
    return F.gelu(x) if kind == "gelu" else F.silu(x)


def times_slope(upstream: Tensor, x: Tensor, kind: str) -> Tensor:
    """upstream * s'(x), (24): in one fused pass."""
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(upstream, x)
    return torch.ops.aten.silu_backward(upstream, x)


def curvature(x: Tensor, kind: str) -> Tensor:
    """s''(x), (25)."""
    if kind == "gelu":
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    g = torch.sigmoid(x)
    return g * (1 - g) * (2 + x * (1 - 2 * g))


def standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd with the biased variance, and rstd [.., 1]; (26)."""
    xhat, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
    return xhat, rstd


def standardize_transpose(u: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """J u, J the (symmetric) Jacobian of `standardize`; (27)."""
    return (u - u.mean(-1, keepdim=True) - xhat * (u * xhat).mean(-1, keepdim=True)) * rstd


def transpose_curvature(
    w: Tensor, u: Tensor, ju: Tensor, xhat: Tensor, rstd: Tensor, extra: Tensor
) -> Tensor:
    """The gradient of <w, J(x) u> with respect to x, plus J extra; (28). ju = J u."""
    pull = w * (u * xhat).mean(-1, keepdim=True) + u * (w * xhat).mean(-1, keepdim=True)
    straight = standardize_transpose(extra - rstd * pull, xhat, rstd)
    return straight - rstd * (w * ju).mean(-1, keepdim=True) * xhat
