"""Degrees and ranges: which work and which piece of each tensor a rank owns. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

from titans_pretrain.config import ModelConfig, RunConfig
from titans_pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in an unsharded tensor


@dataclass(frozen=True)
class Layout:
    """How the ranks share one training step: world_size = data_parallel x tensor."""

    world_size: int
    tensor: int  # neighbouring ranks that hold one copy of the model between them
    data_parallel: int
    micro_batches: int  # forward-backward passes of each rank in a step of global_batch rows


def plan_layout(config: RunConfig, world_size: int) -> Layout:
    """The degrees and the micro-batch count for `world_size` ranks. Raises ConfigError."""
    tensor, train = config.parallel.tensor, config.train
    if world_size % tensor:
        raise ConfigError(
            f"parallel.tensor={tensor}, {world_size} ranks",
            "tensor-parallel groups fill the world: tensor divides the number of ranks",
            f"use a multiple of {tensor} ranks, or parallel.tensor={gcd(tensor, world_size)}",
        )
    _require_even_shares(config.model, tensor)
    data_parallel = world_size // tensor
    per_round = train.micro_batch * data_parallel
    if train.global_batch % per_round:
        raise ConfigError(
            f"train.global_batch={train.global_batch}, train.micro_batch={train.micro_batch}, "
            f"{data_parallel} data-parallel ranks",
            "global_batch is a multiple of micro_batch x ranks, so that all ranks do equal work",
            f"try train.global_batch={max(1, round(train.global_batch / per_round)) * per_round}",
        )
    if train.ramp is not None and train.ramp.start % per_round:
        raise ConfigError(
            f"train.ramp.start={train.ramp.start}, train.micro_batch={train.micro_batch}, "
            f"{data_parallel} data-parallel ranks",
            "the first batch is a multiple of micro_batch x ranks, so that all ranks do equal work",
            f"make train.ramp.start a multiple of {per_round}, or lower train.micro_batch",
        )
    return Layout(world_size, tensor, data_parallel, train.global_batch // per_round)


def _require_even_shares(model: ModelConfig, tensor: int) -> None:
    """Each rank of a tensor-parallel group holds whole heads (of queries, of keys and values, of
    the memory), equally many MLP columns and equally many rows of the vocabulary: the model's,
    which may be wider than the tokenizer's. Nothing is padded silently."""
    for name, size, widen in (
        ("model.heads", model.heads, False),
        ("model.kv_heads", model.kv_heads, False),
        ("model.mlp_width", model.mlp_hidden, True),
        ("model.vocab_size", model.vocab_size, True),
    ):
        if size is not None and size % tensor:
            remedy = f"use parallel.tensor={gcd(tensor, size)}"
            if widen:
                remedy += f", or {name}={-(-size // tensor) * tensor}"
            raise ConfigError(
                f"{name}={size}, parallel.tensor={tensor}",
                "ranks that share a layer hold equal parts of it: tensor divides the model's "
                "heads, MLP width and vocabulary",
                remedy,
            )


def require_built(config: RunConfig) -> None:
    """Refuses a layout that is planned for but that training cannot run yet. Raises ConfigError."""
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"parallel.tensor={config.parallel.tensor}",
            "tensor parallel layers are not built yet",
            "set parallel.tensor=1",
        )


@dataclass(frozen=True)
class Fragment:
    """The piece of one parameter whose master weight and moments this rank owns under ZeRO."""

    name: str  # unsharded parameter name
    shape: tuple[int, ...]  # unsharded shape
    start: int  # first element owned, in the flattened parameter
    numel: int
    tensors: dict[str, torch.Tensor]  # "weight", "exp_avg", "exp_avg_sq": 1-D views of `numel`


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes of a tensor of `shape` that its flattened elements [start, stop) fill, in order.

    A contiguous flat range of an n-dimensional tensor is at most 2n-1 boxes, each contiguous in
    memory: what a distributed checkpoint can address.
    """
    if stop <= start:
        return []
    if len(shape) == 0:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = prod(shape[1:])
    boxes: list[Box] = []
    first, last = start // row, stop // row  # rows touched first; row in which the range stops
    if start % row or last == first:  # a partial row at the front
        end = min(stop - first * row, row)
        inner = flat_range_boxes(shape[1:], start - first * row, end)
        boxes += [((first, *o), (1, *s)) for o, s in inner]
        first += 1
    if last > first:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(((first, *zeros), (last - first, *shape[1:])))
    if last >= first and stop % row:
        inner = flat_range_boxes(shape[1:], 0, stop % row)
        boxes += [((last, *o), (1, *s)) for o, s in inner]
    return boxes
