"""Degrees and ranges: which work and which piece of each tensor a rank owns. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from titans_pretrain.config import ParallelConfig, RunConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.legal import RULES, Asked

if TYPE_CHECKING:
    import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in an unsharded tensor


@dataclass(frozen=True)
class Place:
    """The coordinates of a rank in each direction."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """How the ranks share one training step: world_size = tensor x context x data x pipeline."""

    world_size: int
    parallel: ParallelConfig
    data_parallel: int
    micro_batches: int  # forward-backward passes of each rank in a step of global_batch rows

    @property
    def tensor(self) -> int:
        return self.parallel.tensor

    @property
    def context(self) -> int:
        return self.parallel.context

    @property
    def pipeline(self) -> int:
        return self.parallel.pipeline

    @property
    def pieces(self) -> int:
        """Pieces that the blocks are cut into: interleave on each pipeline stage."""
        return self.pipeline * self.parallel.interleave

    @property
    def whole(self) -> bool:
        """Whether each rank holds the whole model, and computes whole rows with it."""
        whole_rows = self.context * self.parallel.segments == 1
        return whole_rows and self.tensor * self.pipeline == 1 and self.parallel.zero.stage < 3

    def place(self, rank: int) -> Place:
        """Neighbouring ranks differ in tensor first, then context, data, pipeline (Megatron's
        order "tp-cp-ep-dp-pp")."""
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data_parallel)
        return Place(tensor, context, data, pipeline)

    def describe(self) -> str:
        """E.g. "TP 2 + SP, PP 2 x 2, CP 1, DP 4, ZeRO-1"."""
        p = self.parallel
        pipeline = f"{p.pipeline} x {p.interleave}" if p.interleave > 1 else str(p.pipeline)
        return (
            f"TP {p.tensor}{' + SP' if p.sequence else ''}, PP {pipeline}, CP {p.context}, "
            f"DP {self.data_parallel}, ZeRO-{p.zero.stage}{' offloaded' if p.zero.offload else ''}"
            f"{f', {p.segments} segments' if p.segments > 1 else ''}"
        )


def plan_layout(config: RunConfig, world_size: int) -> Layout:
    """The degrees and the micro-batch count for `world_size` ranks. Raises ConfigError."""
    if world_size < 1:
        raise ConfigError(f"{world_size} ranks", "a run has a rank at least", "ask for 1 or more")
    asked = Asked(config, world_size)
    for rule in RULES:
        if (refused := rule.broken(asked)) is not None:
            value, remedy = refused
            raise ConfigError(value, f"{rule.rule}: {rule.why}", remedy)
    per_round = config.train.micro_batch * asked.data_parallel
    micro_batches = config.train.global_batch // per_round
    return Layout(world_size, config.parallel, asked.data_parallel, micro_batches)


def split_blocks(costs: Sequence[float], head: float, pieces: int) -> list[range]:
    """Cuts the blocks into consecutive pieces, one block or more each, so that the dearest piece is
    as cheap as can be; among equals, the first pieces are filled first.

    Args:
        costs: of each block, e.g. FLOPs a token; head: of what follows the last block.
    """
    blocks = len(costs)
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)

    def dearness(begin: int, end: int) -> float:
        return ends[end] - ends[begin] + (head if end == blocks else 0.0)

    # best[k][n]: the least possible dearest of k pieces of the last n blocks, and its first cut.
    best: list[list[tuple[float, int]]] = [[(float("inf"), 0)] * (blocks + 1) for _ in range(2)]
    best[1] = [(dearness(blocks - n, blocks), blocks) for n in range(blocks + 1)]
    for k in range(2, pieces + 1):
        row = [(float("inf"), 0)] * (blocks + 1)
        for n in range(k, blocks + 1):
            begin = blocks - n
            options = (
                (max(dearness(begin, cut), best[k - 1][blocks - cut][0]), -cut)
                for cut in range(begin + 1, blocks - k + 2)
            )
            worst, cut = min(options)
            row[n] = (worst, -cut)
        best.append(row)
    found, begin = [], 0
    for k in range(pieces, 0, -1):
        end = best[k][blocks - begin][1]
        found.append(range(begin, end))
        begin = end
    return found


@dataclass(frozen=True)
class Shard:
    """The piece of one unsharded parameter that a rank holds: part `index` of `parts` along `dim`
    (None: all of it)."""

    name: str
    shape: tuple[int, ...]  # unsharded
    dim: int | None = None
    index: int = 0
    parts: int = 1

    @property
    def box(self) -> Box:
        """Offsets and sizes of the piece in the unsharded parameter."""
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        if self.dim is not None:
            sizes[self.dim] //= self.parts
            offsets[self.dim] = self.index * sizes[self.dim]
        return tuple(offsets), tuple(sizes)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The piece of an unsharded tensor, a view."""
        for dim, (offset, size) in enumerate(zip(*self.box)):
            whole = whole.narrow(dim, offset, size)
        return whole


@dataclass(frozen=True)
class Fragment:
    """The elements [start, start + numel) of a flattened shard, whose master weight and moments
    this rank owns under ZeRO."""

    shard: Shard
    start: int
    numel: int
    tensors: dict[str, torch.Tensor]  # "weight", "exp_avg", "exp_avg_sq": 1-D views of `numel`
    # Whether this copy stands for the parameter where several ranks hold equal ones: it alone is
    # saved and counted.
    first: bool = True

    @property
    def name(self) -> str:
        """Unsharded parameter name."""
        return self.shard.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Unsharded shape."""
        return self.shard.shape

    def boxes(self) -> list[Box]:
        """The boxes of the unsharded parameter that the elements fill, in order."""
        origin, shape = self.shard.box
        found = flat_range_boxes(shape, self.start, self.start + self.numel)
        return [(tuple(a + b for a, b in zip(origin, o)), size) for o, size in found]


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
