"""Mixers of one kind alone: attention over the document, and the memory by itself.

A mixer is a module `(x, plan, state, carry) -> (x, state)` on the pre-normed block input [B, T, D];
its `plan` reads the documents off the positions, once a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.chunked import begin_backward
from titans_pretrain.memory.layer import ConvPlan, MemoryLayer
from titans_pretrain.memory.packing import PackingPlan, plan_documents
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState
from titans_pretrain.model.blocks import Attention, rotate
from titans_pretrain.model.packing import AttentionPlan, attention_plan
from titans_pretrain.model.seams import Seam

ModelState = Mapping[str, Any]  # block name -> what its mixer carries on


@dataclass(frozen=True)
class AttentionState:
    """Keys and values that later tokens of the open documents can see."""

    k: Tensor  # [B, K, S, d], rotated; K heads of keys and values
    v: Tensor  # [B, K, S, d]
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
        self.attention = Attention(
            config.width, config.head_width, config.kv_width, device=device, dtype=dtype
        )
        self.seam = Seam()

    def forward(
        self, x: Tensor, plan: AttentionPlan, state: AttentionState | None, carry: bool
    ) -> tuple[Tensor, AttentionState | None]:
        y, after = attend(self.attention, x, plan, state, carry, self.seam)
        return self.attention.project(y), after

    @staticmethod
    def plan(
        config: ModelConfig,
        positions: Tensor,
        state: ModelState | None,
        like: Tensor,
        before: Tensor | None = None,
    ) -> AttentionPlan:
        return plan_attention(config, positions, first_block(state), like, before)


def attend(
    a: Attention,
    x: Tensor,
    plan: AttentionPlan,
    state: AttentionState | None,
    carry: bool,
    seam: Seam,
    prefix: Tensor | None = None,
) -> tuple[Tensor, AttentionState | None]:
    """What x [B, T, D] reads [B, T, H*d], not yet projected, and what the rows carry on.

    prefix [1, P, D]: rows before every document, seen from all of it and without a position.
    """
    q = rotate(a.heads(a.q(x)), plan.rotation)
    k = rotate(a.heads(a.k(x)), plan.rotation)
    v = a.heads(a.v(x))
    past = None if state is None else (state.k, state.v)
    k, past = seam.take("keys", k, past, lambda: _blank_keys(k, plan.before))
    if past is not None:
        k = torch.cat((past[0], k), dim=2)
        v = torch.cat((past[1], v), dim=2)
    k = seam.give("keys", k, (k[:, :, plan.reach :], v[:, :, plan.reach :]))
    after = None
    if carry:
        after = AttentionState(k[:, :, plan.keep :], v[:, :, plan.keep :], plan.positions)
    if prefix is not None:
        before = (a.heads(m(prefix)).expand(len(x), -1, -1, -1) for m in (a.k, a.v))
        k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
    return a.read(q, k, v, plan.mask, causal=plan.mask is None), after


def _blank_keys(like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Room for keys and values of so many tokens, each [B, K, rows, d]."""
    shape = (*like.shape[:2], rows, like.shape[3])
    return like.new_empty(shape), like.new_empty(shape)


def plan_attention(
    config: ModelConfig,
    positions: Tensor,
    state: AttentionState | None,
    like: Tensor,
    before: Tensor | None,
    prefix: int = 0,
) -> AttentionPlan:
    """What `attend` needs to know of the documents. before [B, P]: positions of tokens whose keys
    are handed over; of them the window's are."""
    window = config.attention_window
    past = None if state is None else state.positions
    if before is not None:
        past = before if window is None else before[:, max(0, before.shape[1] - (window - 1)) :]
    return attention_plan(
        positions,
        past,
        window=window,
        prefix=prefix,
        head_width=config.head_width,
        rope_base=config.rope_base,
        dtype=like.dtype,
        device=like.device,
    )


def first_block(state: ModelState | None) -> Any:
    """The state of the first block: positions are the same in all."""
    return next(iter(state.values())) if state else None


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
        config.width,
        config.heads,
        spec,
        eps=config.norm_eps,
        output_gate=output_gate,
        own_features=c.projections == "block_diagonal",
        **where,
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
        self.seam = Seam()

    def forward(
        self, x: Tensor, plan: LmmPlan, state: LmmState | None, carry: bool
    ) -> tuple[Tensor, LmmState | None]:
        y, after = remember(self.memory, x, plan, state, self.seam)
        return gated(self.memory, y, x), after if carry else None

    @staticmethod
    def plan(
        config: ModelConfig,
        positions: Tensor,
        state: ModelState | None,
        like: Tensor,
        before: Tensor | None = None,
    ) -> LmmPlan:
        return plan_memory(config, positions, like)


def remember(
    m: MemoryLayer,
    x: Tensor,
    plan: LmmPlan,
    state: LmmState | None,
    seam: Seam,
    start: MemoryState | None = None,
) -> tuple[Tensor, LmmState]:
    """Writes x [B, T, D], reads it [B, H, T, d] token by token; what the rows carry on.

    start: what documents start from; default the memory's first weights.
    """
    rows = len(x)
    tails = None if state is None else state.tails
    q, k, v = m.q(x), m.k(x), m.v(x)
    q, tails = seam.take("tails", q, tails, lambda: (m.tail(rows),) * 3)
    q_before, k_before, v_before = (None, None, None) if tails is None else tails
    q, q_tail = m.queries(q, plan.rows, q_before)
    k, k_tail = m.keys(k, plan.rows, k_before)
    v, v_tail = m.values(v, plan.rows, v_before)
    tails = (q_tail, k_tail, v_tail)
    q = seam.give("tails", q, tails)

    rates = m.rates(x)
    before = None if state is None else state.memory
    q, before = seam.take("memory", q, before, lambda: m.start(rows))
    y, after = m.write(q, k, v, rates, plan.memory, before, start)
    # Where a document goes on elsewhere, it stands on a chunk boundary: there is no anchor.
    handed_on = MemoryState(after.weights, after.momentum)
    y = seam.give("memory", y, handed_on, begin_backward(y))
    return y, LmmState(after, tails)


def gated(m: MemoryLayer, y: Tensor, x: Tensor) -> Tensor:
    """out(norm(y) * silu(gate x)): what was read [B, H, T, d] at x -> [B, T, D]."""
    assert m.output_gate is not None
    return m.out(m.normed(y).to(x.dtype) * F.silu(m.output_gate(x)))


def plan_memory(config: ModelConfig, positions: Tensor, like: Tensor) -> LmmPlan:
    """What `remember` needs to know of the documents."""
    positions = positions.cpu()
    return LmmPlan(
        ConvPlan.of(positions, like.device),
        plan_documents(positions, config.memory.chunk, like.device),
    )
