"""What one rank has of a step: blocks of a pipeline stage, rows and tokens, ZeRO's buffers.

Parameters, gradients and optimizer state follow DeepSpeed's buffers to the byte (a group of
parameters is flattened and padded).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from titans_pretrain.config import ModelConfig, RunConfig, ZeroConfig
from titans_pretrain.cut import cut_blocks
from titans_pretrain.model.shapes import kind, parameter_shapes
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.plan import AXIS, plan_of, styles

ELEMENT = {"bf16": 2, "fp32": 4}
MASTER = 12  # bytes of an element's fp32 weight and two moments
ALIGNED = 2  # DeepSpeed pads a group to so many elements on each rank

Numels = dict[str, tuple[int, ...]]  # optimizer group -> elements of each of its parameters


@dataclass(frozen=True)
class Shards:
    """Elements of what a tensor-parallel rank holds of the model."""

    block: Numels
    before: Numels  # the embedding
    after: Numels  # the final norm and the head
    tied: bool

    @staticmethod
    @lru_cache(maxsize=256)
    def of(config: ModelConfig, tensor: int, sequence: bool) -> Shards:
        one = config.model_copy(update={"blocks": 1})
        shapes = parameter_shapes(one)
        style = styles(plan_of(one, sequence=sequence), shapes, tensor)
        found: dict[str, dict[str, list[int]]] = {"block": {}, "before": {}, "after": {}}
        for path, shape in shapes.items():
            place = {"blocks": "block", "embedding": "before"}.get(path.split(".")[0], "after")
            size = math.prod(shape) // (tensor if AXIS[style[path]] is not None else 1)
            found[place].setdefault(kind(path), []).append(size)
        parts = {k: {g: tuple(n) for g, n in groups.items()} for k, groups in found.items()}
        return Shards(**parts, tied=config.tied_embeddings)

    def piece(self, blocks: int, *, first: bool, last: bool) -> Numels:
        """Of so many blocks; with what stands before the first and behind the last."""
        parts: list[Mapping[str, tuple[int, ...]]] = [
            {group: sizes * blocks for group, sizes in self.block.items()}
        ]
        if first or (last and self.tied):  # a tied head on another stage is a copy
            parts.append(self.before)
        if last:
            parts.append(self.after)
        groups = dict.fromkeys(group for part in parts for group in part)
        return {g: tuple(n for part in parts for n in part.get(g, ())) for g in groups}


@dataclass(frozen=True)
class Engine:
    """What ZeRO holds of a rank's parameters. `ranks`: those that divide them, with other data or
    other tokens."""

    numels: Numels
    ranks: int
    element: int  # bytes, of the model's dtype
    zero: ZeroConfig

    @cached_property
    def total(self) -> int:
        return sum(map(sum, self.numels.values()))

    @cached_property
    def padded(self) -> list[int]:
        """Elements of each flattened group."""
        unit = ALIGNED * self.ranks
        return [-(-sum(sizes) // unit) * unit for sizes in self.numels.values()]

    @cached_property
    def parts(self) -> list[int]:
        """Stage 3: elements of each parameter's part on a rank."""
        return [-(-n // self.ranks) for sizes in self.numels.values() for n in sizes]

    @cached_property
    def parameters(self) -> int:
        if self.zero.stage < 3:
            return self.element * sum(self.padded)
        whole = (n for sizes in self.numels.values() for n in sizes if n <= self.zero.whole_below)
        return self.element * (sum(self.parts) + sum(whole))

    @cached_property
    def gradients(self) -> int:
        """In fp32, as they are accumulated over a step's backwards: whole in stage 1."""
        if self.zero.stage == 3:
            return 4 * sum(self.parts)
        if self.zero.stage == 2:
            return 4 * (sum(self.padded) // self.ranks)
        return 4 * (sum(self.padded) if self.element < 4 else self.total)

    @cached_property
    def optimizer(self) -> int:
        """Masters and moments; and of each group AdamW's count of steps."""
        owned = self.parts if self.zero.stage == 3 else [n // self.ranks for n in self.padded]
        return MASTER * sum(owned) + 4 * len(self.numels)

    @cached_property
    def buffers(self) -> int:
        """Stage 1 and 2: the bucket of a reduction; beside it the largest group's gradient as the
        update reads it. Stage 3: likewise, its bucket kept for good; gathered weights apart."""
        bucket = 4 * min(self.zero.bucket, self.total) * (2 if self.zero.overlap else 1)
        if self.zero.stage == 1 and self.element < 4:
            return bucket
        owned = max(self.padded, default=0) // self.ranks
        return bucket + 4 * owned


class Portion(NamedTuple):
    """A rank of a pipeline stage in one forward and its backward, of which a step has `passes`."""

    config: RunConfig
    layout: Layout
    stage: int
    blocks: int
    engine: Engine

    @property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it has the head and the loss."""
        return self.stage == self.layout.pipeline - 1

    @property
    def element(self) -> int:
        """Bytes of the model's dtype."""
        return self.engine.element

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.config.train.micro_batch

    @property
    def length(self) -> int:
        """Tokens of a row that come at once: of a context rank, in one of the row's segments."""
        p = self.config.parallel
        return self.config.data.sequence_length // (p.context * p.segments)

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def passes(self) -> int:
        """Micro-batches, each in all of its segments."""
        return self.layout.micro_batches * self.config.parallel.segments

    @property
    def handed(self) -> bool:
        """Whether memories begin with what another rank, or segment, handed on."""
        return self.config.parallel.context * self.config.parallel.segments > 1

    @property
    def again(self) -> bool:
        """Whether each block is computed again for its backward."""
        return self.config.train.recompute == "blocks"


def portion_of(config: RunConfig, layout: Layout, stage: int) -> Portion:
    """Of the ranks of a pipeline stage."""
    p = config.parallel
    blocks, engine = _engine(
        config.model, p.tensor, p.sequence, p.zero, layout.pieces, layout.pipeline, stage,
        layout.data_parallel * layout.context, ELEMENT[config.train.precision],
        config.data.sequence_length,
    )  # fmt: skip
    return Portion(config, layout, stage, blocks, engine)


def ends(config: RunConfig, layout: Layout) -> list[Portion]:
    """Of the first stage, which has most forwards alive, and of the last, which has the head: one
    of them holds most and takes longest."""
    return [portion_of(config, layout, stage) for stage in sorted({0, layout.pipeline - 1})]


_cut = lru_cache(maxsize=256)(cut_blocks)


@lru_cache(maxsize=8192)
def _engine(
    model: ModelConfig,
    tensor: int,
    sequence: bool,
    zero: ZeroConfig,
    pieces: int,
    pipeline: int,
    stage: int,
    ranks: int,
    element: int,
    sequence_length: int,
) -> tuple[int, Engine]:
    """Blocks of a stage, and what ZeRO holds of them."""
    blocks = sum(map(len, _cut(model, pieces, sequence_length)[stage::pipeline]))
    numels = Shards.of(model, tensor, sequence).piece(
        blocks, first=stage == 0, last=stage == pipeline - 1
    )
    return blocks, Engine(numels, ranks, element, zero)
