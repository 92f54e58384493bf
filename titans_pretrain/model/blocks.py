"""The parts of a block: RMSNorm, SwiGLU, rotary embedding, attention.

Written for one device. Head counts are read off the tensors (`view(B, T, -1, d)`), so that the
linear layers can be replaced by head-sharded ones from outside.

Shape letters: B rows, T tokens of a row, S of its keys, D model width, H heads, K heads of keys and
values, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [B, 1, T, d/2]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, gates, rotations, memory and loss: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis [.., D]; statistics in float32."""

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        w = wide(x.dtype)
        return F.rms_norm(x.to(w), x.shape[-1:], self.weight.to(w), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotation(positions: Tensor, head_width: int, base: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of the rotary embedding for positions [B, T] (pads, -1, count as 0).

    Angles are formed in float64: position 2e6 times a float32 frequency is off by 0.1 rad.
    """
    exponent = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float64)
    frequency = base ** (-exponent / head_width)
    angle = (positions.clamp(min=0).to(torch.float64)[..., None] * frequency).unsqueeze(1)
    return angle.cos().to(wide(dtype)), angle.sin().to(wide(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotates the pairs (i, i + d/2) of x [B, H, T, d]."""
    cos, sin = by
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """The projections of softmax attention; which keys a query sees, the caller says.

    With fewer heads of keys and values than of queries (kv_width below width), neighbouring heads
    of queries share one (grouped queries, arXiv 2305.13245). `output` False leaves out the output
    projection, for a mixer that has its own.
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        kv_width: int,
        *,
        output: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.q = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        self.k = nn.Linear(width, kv_width, bias=False, device=device, dtype=dtype)
        self.v = nn.Linear(width, kv_width, bias=False, device=device, dtype=dtype)
        self.o: nn.Module | None = None
        if output:
            self.o = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H*d] -> [B, H, T, d]"""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """softmax(q k^T / sqrt(d)) v: q [B, H, T, d], k, v [B, K, S, d] -> [B, T, H*d].

        mask [B or 1, 1, T, S] is added to the scores: -inf where a query does not see a key; each
        query must see one at least.
        """
        shared = q.shape[1] // k.shape[1]
        if shared > 1:  # written out: with a mask, not every kernel takes grouped heads
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return y.transpose(1, 2).flatten(-2)

    def project(self, y: Tensor) -> Tensor:
        """The output projection [B, T, H*d] -> [B, T, D]."""
        assert self.o is not None
        return self.o(y)
