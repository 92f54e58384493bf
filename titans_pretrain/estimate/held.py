"""Bytes that each rank of a layout holds while it trains, by kind, from the config alone.

Parameters, gradients and optimizer state follow DeepSpeed's buffers to the byte (a group of
parameters is flattened and padded); what a forward keeps follows model/saved.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from titans_pretrain.config import ModelConfig, RunConfig, ZeroConfig
from titans_pretrain.cut import cut_blocks
from titans_pretrain.model.counts import memory_shapes
from titans_pretrain.model.saved import saved_bytes
from titans_pretrain.model.shapes import kind, parameter_shapes
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.plan import AXIS, plan_of, styles
from titans_pretrain.parallel.wavefront import Chain, Task, most_alive, program

ELEMENT = {"bf16": 2, "fp32": 4}
MASTER = 12  # bytes of an element's fp32 weight and two moments
REUSED = 1_000_000_000  # elements between two uses of a weight that stage 3 keeps it for
ALIGNED = 2  # DeepSpeed pads a group to so many elements on each rank

Numels = dict[str, tuple[int, ...]]  # optimizer group -> elements of each of its parameters


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, at the time of a step when it holds most."""

    parameters: int
    gradients: int
    optimizer: int
    host: int  # of the optimizer's state where it is offloaded
    buffers: int  # of collectives: buckets, gathered parameters
    activations: float  # the stream, mixers, MLPs, masks
    states: float  # of memories: boundaries inside a row, and between segments and ranks
    logits: float
    working: float  # the largest passing thing: a block's backward, the logits' gradient

    @property
    def device(self) -> float:
        """Of the GPU's memory. Activations and a reduction's buffers live one after the other, but
        buckets that DeepSpeed never gives back are counted beside them."""
        fixed = self.parameters + self.gradients + self.optimizer
        return fixed + self.buffers + self.kept + self.working

    @property
    def kept(self) -> float:
        """By forwards for their backwards."""
        return self.activations + self.states + self.logits

    def by_kind(self) -> dict[str, float]:
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "memory states": self.states,
            "logits": self.logits,
            "buffers": self.buffers,
            "working": self.working,
        }


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


def stages(config: RunConfig, layout: Layout) -> Iterator[Held]:
    """What a rank of each pipeline stage holds; of its context ranks the one that holds most."""
    for stage in range(layout.pipeline):
        yield of_stage(config, layout, stage)


def blocks_of_pieces(config: RunConfig, layout: Layout) -> tuple[int, ...]:
    """How many blocks each piece of the model has."""
    return _cut(config.model, layout.pieces, config.data.sequence_length)


@lru_cache(maxsize=256)
def _cut(model: ModelConfig, pieces: int, sequence_length: int) -> tuple[int, ...]:
    return tuple(map(len, cut_blocks(model, pieces, sequence_length)))


kept_bytes = lru_cache(maxsize=8192)(saved_bytes)


def most(config: RunConfig, layout: Layout) -> Held:
    """Of the rank that holds most: of the first stage, which has most forwards alive, or of the
    last, which has the head."""
    ends = {0, layout.pipeline - 1}
    return max((of_stage(config, layout, s) for s in ends), key=lambda held: held.device)


def of_stage(config: RunConfig, layout: Layout, stage: int) -> Held:
    blocks = sum(blocks_of_pieces(config, layout)[stage :: layout.pipeline])
    first, last = stage == 0, stage == layout.pipeline - 1
    engine = engine_of(config, layout, blocks, first=first, last=last)
    kept = _kept(config, layout, blocks, stage, last)
    return Held(
        parameters=engine.parameters,
        gradients=engine.gradients,
        optimizer=0 if engine.zero.offload else engine.optimizer,
        host=engine.optimizer if engine.zero.offload else 0,
        buffers=engine.buffers + _gathered(config, layout),
        activations=kept["activations"],
        states=kept["memory states"],
        logits=kept["logits"],
        working=_working(config, layout, last),
    )


def engine_of(config: RunConfig, layout: Layout, blocks: int, *, first: bool, last: bool) -> Engine:
    """Of a rank with so many blocks. first, last: whether it has what stands before and behind."""
    p, ranks = config.parallel, layout.data_parallel * layout.context
    element = ELEMENT[config.train.precision]
    return _engine(config.model, p.tensor, p.sequence, p.zero, blocks, first, last, ranks, element)


@lru_cache(maxsize=8192)
def _engine(
    model: ModelConfig,
    tensor: int,
    sequence: bool,
    zero: ZeroConfig,
    blocks: int,
    first: bool,
    last: bool,
    ranks: int,
    element: int,
) -> Engine:
    shards = Shards.of(model, tensor, sequence)
    return Engine(shards.piece(blocks, first=first, last=last), ranks, element, zero)


def _gathered(config: RunConfig, layout: Layout) -> int:
    """Stage 3: weights that a rank has gathered and not given up, since it will use them again."""
    if config.parallel.zero.stage < 3:
        return 0
    engine = engine_of(config, layout, config.model.blocks, first=True, last=True)
    return engine.element * min(engine.total, REUSED)


def alive(config: RunConfig, layout: Layout, stage: int) -> float:
    """Forwards of the stage's pieces whose backwards are to come, at most: in pieces over the
    number of pieces, i.e. 1 for a micro-batch in all of them."""
    p = config.parallel
    passes = layout.micro_batches * p.segments
    if p.interleave > 1:  # Megatron's warm-up, in pieces
        ahead = 2 * (p.pipeline - stage - 1) + (p.interleave - 1) * p.pipeline
        return min(ahead + 1, passes * p.interleave) / p.interleave
    nothing = Task(0, 0, 0)
    chain = Chain(p.context, passes, 1, nothing, nothing, p.order, p.pipeline, p.segments)
    # The first context rank has most forwards ahead.
    return most_alive(program(chain, 0, stage))


def _kept(
    config: RunConfig, layout: Layout, blocks: int, stage: int, last: bool
) -> dict[str, float]:
    """Of all forwards that are alive at once, by kind."""
    train, p = config.train, config.parallel
    tokens = config.data.sequence_length // (p.context * p.segments)
    again = train.recompute == "blocks"
    at_once = min(blocks, 1) if again else blocks
    one = dict(
        kept_bytes(
            config.model,
            train.micro_batch,
            tokens,
            ELEMENT[train.precision],
            blocks=at_once,
            head=last,
            tensor=p.tensor,
            sequence=p.sequence,
            handed=p.context * p.segments > 1,
        )
    )
    masks, logits, states = one.pop("masks"), one.pop("logits"), one.pop("memory states")
    many = alive(config, layout, stage)
    # A pipeline's last forward ends in its own backward; under FFBB, and ahead of a skewed chain,
    # others wait with their logits.
    heads = many if p.pipeline == 1 else 1.0
    if again:  # a block at a time; of the others, and of other forwards, the inputs
        stream = tokens * config.model.width / (p.tensor if p.sequence else 1)
        inputs = blocks * train.micro_batch * stream * ELEMENT[train.precision]
        taken = states_handed(config) * blocks if p.context * p.segments > 1 else 0.0
        return {
            "activations": sum(one.values()) + masks * many + inputs * many,
            "memory states": states + taken * many,
            "logits": logits * heads,
        }
    return {
        "activations": (sum(one.values()) + masks) * many,
        "memory states": states * many,
        "logits": logits * heads,
    }


def states_handed(config: RunConfig) -> float:
    """Bytes of a block's state from the tokens before, (W, S) in fp32, on a tensor-parallel rank:
    what a block that is computed again keeps of it."""
    model = config.model
    if model.variant == "transformer":
        return 0.0
    elements = model.heads * sum(a * o for a, o in memory_shapes(model))
    return 2.0 * 4 * config.train.micro_batch * elements / config.parallel.tensor


def _working(config: RunConfig, layout: Layout, last: bool) -> float:
    """The logits' gradient and softmax in fp32; or the gradients of a block's widest tensors, and
    one part's states of the memory's backward with their gradients."""
    model, p, e = config.model, config.parallel, ELEMENT[config.train.precision]
    n = config.train.micro_batch * config.data.sequence_length // (p.context * p.segments)
    head = (2 * 4 + e) * n * (model.vocab_size or 0) / p.tensor if last else 0.0
    mlp = 4 * n * model.mlp_hidden * e / p.tensor
    mixer = 8 * 4 * n * model.width / p.tensor
    return max(head, mlp + mixer)
