"""The wirings: what mixes tokens inside a block, one entry in VARIANTS each.

A variant is two things: `plan`, which reads the documents off the positions once a forward, and
`mixer`, a module `(x, plan, state, carry) -> (x, state)` on the pre-normed block input [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.blocks import Attention, rotate
from titans_pretrain.model.packing import AttentionPlan, attention_plan

ModelState = Mapping[str, Any]  # block name -> what its mixer carries on


@dataclass(frozen=True)
class AttentionState:
    """Keys and values that later tokens of the open documents can see."""

    k: Tensor  # [B, H, S, d], rotated
    v: Tensor  # [B, H, S, d]
    positions: Tensor  # [B, S]


class TransformerMixer(nn.Module):
    """Transformer++: causal attention inside each document, whole or by a sliding window."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.head_width, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, plan: AttentionPlan, state: AttentionState | None, carry: bool
    ) -> tuple[Tensor, AttentionState | None]:
        a = self.attention
        q = rotate(a.heads(a.q(x)), plan.rotation)
        k = rotate(a.heads(a.k(x)), plan.rotation)
        v = a.heads(a.v(x))
        if state is not None:
            k = torch.cat((state.k, k), dim=2)
            v = torch.cat((state.v, v), dim=2)
        y = a.attend(q, k, v, plan.mask, causal=plan.mask is None)
        if not carry:
            return y, None
        return y, AttentionState(k[:, :, plan.keep :], v[:, :, plan.keep :], plan.positions)

    @staticmethod
    def plan(
        config: ModelConfig, positions: Tensor, state: ModelState | None, dtype: torch.dtype
    ) -> AttentionPlan:
        past = None if not state else next(iter(state.values())).positions
        return attention_plan(
            positions,
            past,
            window=config.window,
            head_width=config.head_width,
            rope_base=config.rope_base,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Variant:
    mixer: Callable[..., nn.Module]  # (config, device=, dtype=)
    plan: Callable[[ModelConfig, Tensor, ModelState | None, torch.dtype], Any]


VARIANTS: dict[str, Variant] = {
    "transformer": Variant(TransformerMixer, TransformerMixer.plan),
}
