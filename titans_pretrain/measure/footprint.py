"""Bytes that training holds: by kind, counted; and those that a step works with, predicted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.config import RunConfig
from titans_pretrain.measure.made import DTYPES
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM

if TYPE_CHECKING:
    from titans_pretrain.step import TrainStep

TOKENS = 512  # of a row that is tried; longer rows count in proportion


def held(step: TrainStep) -> dict[str, list[Tensor]]:
    """This rank's parameters, gradients and optimizer state; some may share a storage."""
    parameters = list(step.model.parameters())
    # ZeRO-3: a rank's part of each, beside what it has gathered.
    parts = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    flats = step.optimizer.masters
    gradients = [p.grad for p in (*parameters, *flats) if p.grad is not None]
    gradients += step.optimizer.gradient_buffers()
    states = [t for s in step.optimizer.adamw.state.values() for t in s.values()]
    return {
        "parameters": [*parameters, *parts],
        "gradients": gradients,
        "optimizer state": [*flats, *states],  # fp32 masters and moments
    }


def held_bytes(step: TrainStep) -> dict[str, int]:
    """Bytes of what is held, by kind, each storage once."""
    seen: set[int] = set()
    return {kind: _bytes(tensors, seen) for kind, tensors in held(step).items()}


def release(step: TrainStep) -> None:
    """Gives back what is held, and ends the step's use: DeepSpeed keeps an engine that nobody else
    knows alive, by its hooks. A storage that numpy has seen stays."""
    for tensors in held(step).values():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.resizable():
                storage.resize_(0)


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def working_bytes(config: RunConfig, *, training: bool = True) -> int:
    """Peak bytes of what forward and backward of one micro-batch make: activations, the memories'
    states, gradients where they are whole. Not `training`: forward alone, as in validation.

    Predicted, without the memory: the model runs on the meta device, whose tensors have shapes
    alone, with one and with two blocks; each further block adds as much as the second. Within a few
    percent of what is measured (attention as by a fused kernel); in proportion beyond 512 tokens.
    """
    one, two = (_peak(config, blocks, training) for blocks in (1, 2))
    tokens = _tried(config)
    whole = one + (config.model.blocks - 1) * (two - one)
    return whole * config.data.sequence_length // tokens


def _tried(config: RunConfig) -> int:
    align = config.model.alignment
    if config.model.variant == "mac":
        align = config.model.segment
    most = max(1, TOKENS // align) * align
    return min(config.data.sequence_length, most)


def _peak(config: RunConfig, blocks: int, training: bool) -> int:
    rows, tokens = config.train.micro_batch, _tried(config)
    # Documents begin at a row's first token: the longest, which need most.
    positions = torch.arange(tokens).expand(rows, tokens)
    with torch.device("meta"):
        model = TitansLM(
            config.model.model_copy(update={"blocks": blocks}),
            dtype=DTYPES[config.train.precision],
        )
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
    model.recompute = config.train.recompute == "blocks"
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused_attention  # type: ignore[assignment]
    try:
        with LiveBytes() as live, torch.set_grad_enabled(training):
            logits, _ = model(ids, positions, carry=False)
            loss = token_loss(logits, ids).sum()
            del logits
            if training:
                torch.autograd.backward(loss)
    finally:
        F.scaled_dot_product_attention = original
    return live.peak


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attention on the meta device with the memory that a fused kernel takes: no score is kept.
    Left to itself torch would choose there what it never chooses for a real tensor."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]
    return out
