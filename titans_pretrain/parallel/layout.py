"""Degrees and ranges: which work and which piece of each tensor a rank owns. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from titans_pretrain.config import RunConfig
from titans_pretrain.errors import ConfigError

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in an unsharded tensor


@dataclass(frozen=True)
class Layout:
    """How the ranks share one training step."""

    world_size: int
    data_parallel: int
    micro_batches: int  # forward-backward passes of each rank in a step of global_batch rows


def plan_layout(config: RunConfig, world_size: int) -> Layout:
    """Data-parallel degree and micro-batch count for `world_size` ranks. Raises ConfigError."""
    train = config.train
    per_round = train.micro_batch * world_size
    if train.global_batch % per_round:
        raise ConfigError(
            f"train.global_batch={train.global_batch}, train.micro_batch={train.micro_batch}, "
            f"{world_size} data-parallel ranks",
            "global_batch is a multiple of micro_batch x ranks, so that all ranks do equal work",
            f"try train.global_batch={max(1, round(train.global_batch / per_round)) * per_round}",
        )
    if train.ramp is not None and train.ramp.start % per_round:
        raise ConfigError(
            f"train.ramp.start={train.ramp.start}, train.micro_batch={train.micro_batch}, "
            f"{world_size} data-parallel ranks",
            "the first batch is a multiple of micro_batch x ranks, so that all ranks do equal work",
            f"make train.ramp.start a multiple of {per_round}, or lower train.micro_batch",
        )
    return Layout(world_size, world_size, train.global_batch // per_round)


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
