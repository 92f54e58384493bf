"""The wirings: what mixes tokens inside a block, one entry in VARIANTS each.

A variant is two things: `plan`, which reads the documents off the positions once a forward, and
`mixer`, a module `(x, plan, state, carry) -> (x, state)` on the pre-normed block input [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.layer import ConvPlan, MemoryLayer
from titans_pretrain.memory.packing import PackingPlan, plan_documents
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState
from titans_pretrain.model.blocks import Attention, rotate
from titans_pretrain.model.mac import MacMixer
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
        config: ModelConfig, positions: Tensor, state: ModelState | None, like: Tensor
    ) -> AttentionPlan:
        past = None if not state else next(iter(state.values())).positions
        return attention_plan(
            positions,
            past,
            window=config.window,
            head_width=config.head_width,
            rope_base=config.rope_base,
            dtype=like.dtype,
            device=like.device,
        )


def memory_layer(config: ModelConfig, *, output_gate: bool, **where: Any) -> MemoryLayer:
    """The memory that `config` describes."""
    c = config.memory
    spec = MemorySpec(
        depth=c.depth,
        expansion=c.expansion,
        activation=c.activation,
        residual_norm=c.residual_norm,
        chunk=c.chunk,
        decay_to=c.decay_to,
        read=c.read,
    )
    return MemoryLayer(
        config.width, config.heads, spec, eps=config.norm_eps, output_gate=output_gate, **where
    )


@dataclass(frozen=True)
class LmmPlan:
    rows: ConvPlan
    memory: PackingPlan


@dataclass(frozen=True)
class LmmState:
    """What the memory and its convolutions carry on."""

    memory: MemoryState
    tails: tuple[Tensor, Tensor, Tensor]  # of queries, keys, values, each [B, 3, D]


class LmmMixer(nn.Module):
    """The memory alone: out(norm(y) * silu(gate x)), y read from a memory that was written with
    the document so far (Titans, equations 8-15)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.memory = memory_layer(config, output_gate=True, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, plan: LmmPlan, state: LmmState | None, carry: bool
    ) -> tuple[Tensor, LmmState | None]:
        m = self.memory
        tails = (None, None, None) if state is None else state.tails
        q, q_tail = m.queries(x, plan.rows, tails[0])
        k, k_tail = m.keys(x, plan.rows, tails[1])
        v, v_tail = m.values(x, plan.rows, tails[2])
        before = None if state is None else state.memory
        y, after = m.write(q, k, v, m.rates(x), plan.memory, before)
        assert m.output_gate is not None
        out = m.out(m.normed(y).to(x.dtype) * F.silu(m.output_gate(x)))
        return out, LmmState(after, (q_tail, k_tail, v_tail)) if carry else None

    @staticmethod
    def plan(
        config: ModelConfig, positions: Tensor, state: ModelState | None, like: Tensor
    ) -> LmmPlan:
        positions = positions.cpu()
        return LmmPlan(
            ConvPlan.of(positions, like.device),
            plan_documents(positions, config.memory.chunk, like.device),
        )


def mac_mixer(config: ModelConfig, **where: Any) -> MacMixer:
    return MacMixer(config, memory_layer(config, output_gate=False, **where), **where)


@dataclass(frozen=True)
class Variant:
    mixer: Callable[..., nn.Module]  # (config, device=, dtype=)
    # (config, positions, state, a tensor of the device and dtype that blocks work in)
    plan: Callable[[ModelConfig, Tensor, ModelState | None, Tensor], Any]


VARIANTS: dict[str, Variant] = {
    "transformer": Variant(TransformerMixer, TransformerMixer.plan),
    "lmm": Variant(LmmMixer, LmmMixer.plan),
    "mac": Variant(mac_mixer, MacMixer.plan),
}
