"""MAG and MAL: memory and sliding-window attention over whole documents, side by side or stacked.

Both read [P | X]: N persistent tokens P, each layer's own, before every document. The memory runs
over P's rows once a forward, from its first weights, and every document starts from what they
leave; chunks count from the document's first token, and neither convolutions nor rotations reach
into P. In attention P's rows are seen from everywhere, whatever the window.

Shape letters: B rows, T tokens of a row, P persistent tokens, D model width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.layer import HeadNorm
from titans_pretrain.memory.state import MemoryState
from titans_pretrain.model.blocks import Attention, wide
from titans_pretrain.model.mixers import (
    AttentionState,
    LmmPlan,
    LmmState,
    ModelState,
    attend,
    first_block,
    gated,
    memory_layer,
    plan_attention,
    plan_memory,
    remember,
)
from titans_pretrain.model.packing import AttentionPlan
from titans_pretrain.model.seams import Seam


@dataclass(frozen=True)
class HybridPlan:
    attention: AttentionPlan
    memory: LmmPlan


@dataclass(frozen=True)
class HybridState(LmmState):
    """What the memory, its convolutions and the window carry on."""

    attention: AttentionState

    @staticmethod
    def of(memory: LmmState, attention: AttentionState | None) -> HybridState | None:
        """None where attention carries nothing on: then neither does the mixer."""
        if attention is None:
            return None
        return HybridState(memory.memory, memory.tails, attention)


class _Hybrid(nn.Module):
    """What MAG and MAL have in common: the attention, the memory and P [P, D]."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        output: bool,
        output_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = Attention(
            config.width, config.head_width, config.kv_width, output=output, **where
        )
        self.memory = memory_layer(config, output_gate=output_gate, **where)
        self.seam = Seam()
        self.persistent = None
        if config.persistent_tokens:
            shape = (config.persistent_tokens, config.width)
            self.persistent = nn.Parameter(torch.empty(shape, **where))

    def begin(self) -> tuple[Tensor | None, Tensor | None, MemoryState | None]:
        """P's rows [1, P, D], what the memory reads there [1, H, P, d], and what it starts from."""
        if self.persistent is None:
            return None, None, None
        rows = self.persistent[None]
        return (rows, *self.memory.begin(rows))

    @staticmethod
    def plan(
        config: ModelConfig,
        positions: Tensor,
        state: ModelState | None,
        like: Tensor,
        before: Tensor | None = None,
    ) -> HybridPlan:
        kept: HybridState | None = first_block(state)
        past = None if kept is None else kept.attention
        return HybridPlan(
            plan_attention(config, positions, past, like, before, config.persistent_tokens),
            plan_memory(config, positions, like),
        )


class MagMixer(_Hybrid):
    """Memory as gate (Titans, equations 26-28): attention and memory read [P | X] side by side,
    out(norm(A) * silu(norm(M))), each norm and the product within a head."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(config, output=False, output_gate=False, **where)
        heads, d = config.heads, config.head_width
        self.attention_norm = HeadNorm(heads, d, config.norm_eps, **where)

    def forward(
        self, x: Tensor, plan: HybridPlan, state: HybridState | None, carry: bool
    ) -> tuple[Tensor, HybridState | None]:
        prefix, _, start = self.begin()
        past = None if state is None else state.attention
        a, window = attend(self.attention, x, plan.attention, past, carry, self.seam, prefix)
        y, memory = remember(self.memory, x, plan.memory, state, self.seam, start)
        a = self.attention_norm(self.attention.heads(a).transpose(1, 2).to(wide(x.dtype)))
        both = a.flatten(-2) * F.silu(self.memory.normed(y))
        return self.memory.out(both.to(x.dtype)), HybridState.of(memory, window)


class MalMixer(_Hybrid):
    """Memory as layer (Titans, equations 29-31): attention over what LMM makes of [P | X]. LMM's
    output for P is the window's prefix."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, output=True, output_gate=True, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, plan: HybridPlan, state: HybridState | None, carry: bool
    ) -> tuple[Tensor, HybridState | None]:
        rows, read, start = self.begin()
        prefix = None if rows is None or read is None else gated(self.memory, read, rows)
        y, memory = remember(self.memory, x, plan.memory, state, self.seam, start)
        y = gated(self.memory, y, x)
        past = None if state is None else state.attention
        a, window = attend(self.attention, y, plan.attention, past, carry, self.seam, prefix)
        return self.attention.project(a), HybridState.of(memory, window)
