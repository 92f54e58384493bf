"""What a chunk's gates make of its state and its gradients: (6)-(9) of MATH.md and their adjoint.

Letters: L memory layers, B chunks times heads, C chunk. Products of gates are only ever
multiplied up, never divided: exact at gates of 0, no underflow turns into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """How each token reads, and what the chunk leaves behind."""

    scores: Tensor  # [L, B, C, C] P: weight of gradient i in the weights that token t reads
    read: Tensor  # [L, B, C, 2] (b, c): weight of the entry weights and of the entry momentum
    write: Tensor  # [L, B, C, 2] weight of gradient i in the final weights and momentum
    carry: Tensor  # [L, B, 2, 2] final (weights, momentum) from the entry's: ((b, c), (0, h))
    # for the adjoint
    theta: Tensor  # [L, B, C]
    retained: Tensor  # [L, B, C, C] products of 1 - alpha, (6)
    coasted: Tensor  # [L, B, C, C] products of eta, (6)
    both: Tensor  # [L, B, C, C] Q, (7)
    b: Tensor  # [L, B, C]
    c: Tensor
    h: Tensor
    last: Tensor | None  # [B] slot of the last token; None: C - 1
    exclusive: bool


def coefficients(
    theta: Tensor, alpha: Tensor, eta: Tensor, last: Tensor | None, exclusive: bool
) -> Coefficients:
    """Gates [L, B, C] of whole chunks -> their coefficients."""
    keep = 1 - alpha
    retained, coasted = segment_products(keep), segment_products(eta)
    both = retained @ coasted
    b, h = keep.cumprod(-1), eta.cumprod(-1)
    c = (retained @ h[..., None])[..., 0]
    scores = -theta[..., None, :] * both

    end_b, end_c, end_h = (_row(x, last) for x in (b, c, h))
    write = torch.stack([_row(scores, last), -theta * _row(coasted, last)], -1)
    carry = torch.stack([end_b, end_c, torch.zeros_like(end_h), end_h], -1).unflatten(-1, (2, 2))
    read = torch.stack([b, c], -1)
    if exclusive:  # token t reads what token t - 1 left
        scores = torch.cat([torch.zeros_like(scores[..., :1, :]), scores[..., :-1, :]], -2)
        before = torch.stack([torch.ones_like(b[..., :1]), torch.zeros_like(b[..., :1])], -1)
        read = torch.cat([before, read[..., :-1, :]], -2)
    return Coefficients(
        scores, read, write, carry, theta, retained, coasted, both, b, c, h, last, exclusive
    )


def coefficients_adjoint(
    co: Coefficients, d_scores: Tensor, d_read: Tensor, d_write: Tensor, d_carry: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of theta, alpha, eta [L, B, C] from those of the coefficients; (21)-(23).

    Entries of d_scores above the diagonal may hold anything finite: each meets a structural zero.
    """
    if co.exclusive:
        d_scores = torch.cat([d_scores[..., 1:, :], torch.zeros_like(d_scores[..., :1, :])], -2)
        d_read = torch.cat([d_read[..., 1:, :], torch.zeros_like(d_read[..., :1, :])], -2)
    else:
        d_scores, d_read = d_scores.clone(), d_read.clone()
    d_b, d_c = d_read.unbind(-1)
    d_h = torch.zeros_like(co.h)
    _add_row(d_scores, d_write[..., 0], co.last)
    _add_row(d_b, d_carry[..., 0, 0], co.last)
    _add_row(d_c, d_carry[..., 0, 1], co.last)
    _add_row(d_h, d_carry[..., 1, 1], co.last)

    d_coast = d_write[..., 1]
    d_theta = -(d_scores * co.both).sum(-2) - d_coast * _row(co.coasted, co.last)
    d_both = d_scores.mul_(-co.theta[..., None, :])
    # (22): the reverse scans are products with the transposes, all columns at once.
    columns = torch.cat([d_both, d_c[..., None], d_b[..., None]], -1)
    columns = reverse_scan(co.retained, columns)
    d_keep = (columns[..., 1:, :-2] * co.both[..., :-1, :]).sum(-1)
    d_keep += columns[..., 1:, -2] * co.c[..., :-1] + columns[..., 1:, -1] * co.b[..., :-1]
    d_keep = torch.cat([columns[..., :1, -1], d_keep], -1)  # b before the first token is 1

    columns = columns[..., :-1].clone()
    columns[..., -1] += d_h
    _add_row(columns[..., :-1], -co.theta * d_coast, co.last)
    columns = reverse_scan(co.coasted, columns)
    d_eta = (columns[..., 1:, :-1] * co.coasted[..., :-1, :]).sum(-1)
    d_eta += columns[..., 1:, -1] * co.h[..., :-1]
    d_eta = torch.cat([columns[..., :1, -1], d_eta], -1)
    return d_theta, -d_keep, d_eta


def segment_products(gate: Tensor) -> Tensor:
    """[.., C] -> [.., C, C]: entry (t, j) is the product of gate over j < r <= t; 0 above."""
    c = gate.shape[-1]
    below = torch.ones(c, c, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(below, gate[..., :, None], 1).cumprod(-2).tril()


def reverse_scan(products: Tensor, columns: Tensor) -> Tensor:
    """Runs d[t-1] += gate_t d[t] backward over the rows of `columns`."""
    return products.transpose(-1, -2) @ columns


def _row(x: Tensor, last: Tensor | None) -> Tensor:
    """The row of each chunk's last token: [L, B, C, ..] -> [L, B, ..]."""
    return x[:, :, -1] if last is None else x[:, torch.arange(len(last), device=x.device), last]


def _add_row(x: Tensor, value: Tensor, last: Tensor | None) -> None:
    if last is None:
        x[:, :, -1] += value
    else:
        x[:, torch.arange(len(last), device=x.device), last] += value  # one row a chunk: no clash
