"""Numbers to watch while a memory trains: is a chunk's inner learning stable? (MATH.md, section 7)

Gates are [.., C]: those of one chunk; or [..] with `chunk`, the mean of each standing for all C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pretrain.memory.coefficients import coefficients


def stability_radius(theta: Tensor, alpha: Tensor, eta: Tensor, chunk: int | None = None) -> Tensor:
    """Spectral radius of what one chunk does to an error and its momentum, (29).

    For identical unit keys and the summed squared error: the inner learning converges iff it is
    below 1, whatever the input. theta <= (1 - eta) / C keeps it there. Returns the gates' leading
    shape, [..].
    """
    write, carry = _end_of_chunk(theta, alpha, eta, chunk)
    m = carry.clone()
    m[..., 0] += 2 * write.sum(-2)  # row 0: weights, row 1: momentum; column 0: from the error
    half = 0.5 * (m[..., 0, 0] + m[..., 1, 1])
    determinant = m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]
    square = half * half - determinant
    real = half.abs() + square.clamp(min=0).sqrt()
    return torch.where(square >= 0, real, determinant.clamp(min=0).sqrt())


def write_strength(theta: Tensor, alpha: Tensor, eta: Tensor, chunk: int | None = None) -> Tensor:
    """sum_i theta_i Q[C, i]: the step that a chunk's gradients make together. Returns [..]."""
    write, _ = _end_of_chunk(theta, alpha, eta, chunk)
    return -write[..., 0].sum(-1)


def _end_of_chunk(
    theta: Tensor, alpha: Tensor, eta: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """The chunk's final coefficients: write [.., C, 2], carry [.., 2, 2]."""
    if chunk is not None:
        theta, alpha, eta = (g[..., None].expand(*g.shape, chunk) for g in (theta, alpha, eta))
    shape, c = theta.shape[:-1], theta.shape[-1]
    theta, alpha, eta = (g.reshape(1, -1, c) for g in (theta, alpha, eta))
    co = coefficients(theta, alpha, eta, None, exclusive=False)
    return co.write.view(*shape, c, 2), co.carry.view(*shape, 2, 2)
