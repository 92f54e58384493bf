"""Collectives of a step, as one rank sees them: what, among whom, how often, how many bytes.

Bytes are those of one tensor on a rank: of what is summed, of what was gathered, of what a
reduce-scatter leaves, of what is sent. None lies inside the memory's update or read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from titans_pretrain.config import RunConfig
from titans_pretrain.estimate.held import ELEMENT, REUSED, Engine, blocks_of_pieces
from titans_pretrain.memory.sizes import TAIL
from titans_pretrain.model.counts import memory_shapes
from titans_pretrain.parallel.layout import Layout

Group = Literal["world", "model", "tensor", "context", "pipeline", "data"]
Way = Literal["all_reduce", "all_gather", "reduce_scatter", "send", "recv"]


@dataclass(frozen=True)
class Transfer:
    """`calls` collectives of `elements` each, in a step.

    model: ranks that hold other pieces of the model. data: those that divide the optimizer state,
    with other rows or other tokens.
    """

    way: Way
    group: Group
    what: str
    calls: int
    elements: float
    element: int  # bytes

    @property
    def bytes(self) -> float:
        return self.calls * self.elements * self.element


def total(transfers: Iterable[Transfer]) -> dict[str, dict[str, int]]:
    """Way -> calls and bytes."""
    found: dict[str, dict[str, int]] = {}
    for t in transfers:
        here = found.setdefault(t.way, {"calls": 0, "bytes": 0})
        here["calls"] += t.calls
        here["bytes"] += round(t.bytes)
    return found


def transfers(
    config: RunConfig,
    layout: Layout,
    engine: Engine,
    stage: int = 0,
    context: int = 0,
    segments: Sequence[Sequence[int]] | None = None,
) -> Iterator[Transfer]:
    """Of a step after the first, without validation, on a rank of pipeline stage `stage` and place
    `context` in its chain.

    segments: MAC: tokens of each step of the plan of each micro-batch; default: whole rows.
    """
    yield from _step(config, layout, engine)
    yield from _zero(layout, engine, config)
    passes = layout.micro_batches * config.parallel.segments
    if layout.tensor > 1:
        yield from _tensor(config, layout, stage, segments or [_whole(config)] * passes)
    if layout.context > 1:
        yield from _context(config, layout, stage, context)
    if layout.pipeline > 1:
        yield from _pipeline(config, layout, stage)


def _step(config: RunConfig, layout: Layout, engine: Engine) -> Iterator[Transfer]:
    yield Transfer("all_reduce", "world", "labels of the step", 1, 1, 8)
    yield Transfer("all_reduce", "world", "nats, labels, penalty", 1, 3, 8)
    groups = len(engine.numels)
    wide = 8 if engine.zero.stage == 3 else 4
    if engine.zero.stage == 1 and engine.element < 4:  # DeepSpeed's bf16 optimizer: of all at once
        yield Transfer("all_reduce", "world", "gradient norm", 1, 1, wide)
        return
    yield Transfer("all_reduce", "data", "gradient norm", groups, 1, wide)
    if layout.tensor * layout.pipeline > 1:
        yield Transfer("all_reduce", "model", "gradient norm", groups, 1, wide)


def _zero(layout: Layout, engine: Engine, config: RunConfig) -> Iterator[Transfer]:
    """Gradients are summed over the ranks with other data, each rank's part of the weights is
    gathered: once a step, or (2: gradients; 3: both, in parts) in every micro-batch."""
    n, ranks, times = engine.total, engine.ranks, layout.micro_batches * config.parallel.segments
    narrow = config.train.precision == "bf16" and config.parallel.zero.reduce == "bf16"
    wide = 2 if narrow else 4
    if engine.zero.stage == 3:
        # Once more for the backward those that were given up after the forward.
        again = max(0.0, 1 - REUSED / (2 * n))
        gathers = round(times * (1 + again))
        yield Transfer("all_gather", "data", "weights", gathers, n, engine.element)
        yield Transfer("reduce_scatter", "data", "gradients", times, n / ranks, wide)
        return
    sums = times if engine.zero.stage == 2 else 1
    yield Transfer("all_reduce", "data", "gradients", sums, n, wide)
    if ranks > 1:
        for size in engine.padded:
            yield Transfer("all_gather", "data", "weights", 1, size, engine.element)


def _whole(config: RunConfig) -> list[int]:
    """Tokens of the steps of MAC's plan, where each row of a micro-batch is one document."""
    p, G, rows = config.parallel, config.model.segment, config.train.micro_batch
    tokens = config.data.sequence_length // (p.context * p.segments)
    return [rows * min(G, tokens - begin) for begin in range(0, tokens, G)]


def _tensor(
    config: RunConfig, layout: Layout, stage: int, segments: Sequence[Sequence[int]]
) -> Iterator[Transfer]:
    """Into mixers, MLPs and the head the stream's gradient is summed, out of them (and of the
    embedding) the stream. Under sequence parallelism a reduce-scatter sums, and before what needs
    all tokens an all-gather brings them together. A block that is computed again sums again what
    its mixer gives; what its MLP gives nobody reads."""
    model, ranks, p = config.model, layout.tensor, config.parallel
    e, passes = ELEMENT[config.train.precision], len(segments)
    tokens = config.train.micro_batch * config.data.sequence_length // (p.context * p.segments)
    stream, prefix = tokens * model.width, model.persistent_tokens * model.width
    mine = [n for n in range(layout.pieces) if n % layout.pipeline == stage]
    first, last = 0 in mine, layout.pieces - 1 in mine
    blocks = _blocks(config, layout, stage)
    again = blocks if config.train.recompute == "blocks" else 0
    ends = first + last
    if p.sequence:
        # Forward: out of mixer and MLP, and of the embedding; backward: into each, and the head.
        sums = ends + 4 * blocks + again
        gathers = ends + 4 * blocks + 2 * again
        yield Transfer("reduce_scatter", "tensor", "stream", passes * sums, stream / ranks, e)
        yield Transfer("all_gather", "tensor", "stream", passes * gathers, stream, e)
        gains = passes * (2 * blocks + last)
        yield Transfer("all_reduce", "tensor", "gains of norms", gains, model.width, e)
    else:
        sums = ends + 4 * blocks + again
        yield Transfer("all_reduce", "tensor", "stream", passes * sums, stream, e)
    if last:
        # Of each token the highest logit, the label's, the sum of exponentials; for z-loss the
        # first and the last.
        times = passes * (3 + 2 * bool(config.train.z_loss))
        yield Transfer("all_reduce", "tensor", "loss", times, tokens, 4)
    if model.variant in ("mac", "mag", "mal") and prefix:
        yield Transfer("all_reduce", "tensor", "persistent tokens", passes * blocks, prefix, e)
    if model.variant == "mal":  # attention reads all that the memory says; there and back
        times = passes * (2 * blocks + again)
        yield Transfer("all_reduce", "tensor", "memory to attention", times, stream, e)
        if prefix:
            yield Transfer("all_reduce", "tensor", "memory to attention", times, prefix, e)
    if model.variant == "mac" and model.memory.projections == "dense":
        counts = Counter(n for steps in segments for n in steps)
        for n, times in ((n * model.width, times) for n, times in counts.items()):
            gathers, sums = times * (blocks + again), times * (2 * blocks + again)
            yield Transfer("all_gather", "tensor", "h of all heads", gathers, n, e)
            yield Transfer(
                "reduce_scatter", "tensor", "h of all heads", times * blocks, n / ranks, e
            )
            yield Transfer("all_reduce", "tensor", "Y", sums, n, e)


def _blocks(config: RunConfig, layout: Layout, stage: int) -> int:
    return sum(blocks_of_pieces(config, layout)[stage :: layout.pipeline])


def _context(config: RunConfig, layout: Layout, stage: int, index: int) -> Iterator[Transfer]:
    """States go from rank to rank, their gradients back; each message is of this rank's heads.
    Where a row comes in segments, the last rank's go round to the first one, without gradients."""
    segments, last = config.parallel.segments, layout.context - 1
    rows = layout.micro_batches * _blocks(config, layout, stage)
    to, of = (handed(config, layout, at) for at in (index, index - 1))  # the next rank, this one
    for what, size in to.items():
        if index < last:  # a state to the next one, its gradient back
            yield Transfer("send", "context", what, rows * segments, size, 1)
            yield Transfer("recv", "context", what, rows * segments, size, 1)
        if index > 0:  # from the one before, and back
            yield Transfer("recv", "context", what, rows * segments, of[what], 1)
            yield Transfer("send", "context", what, rows * segments, of[what], 1)
        if segments > 1 and index in (0, last):
            way: Way = "send" if index else "recv"
            round_ = handed(config, layout, last)[what]
            yield Transfer(way, "context", what, rows * (segments - 1), round_, 1)


def handed(config: RunConfig, layout: Layout, index: int) -> dict[str, float]:
    """Bytes of each message in which context rank `index` hands on a block's state of a
    micro-batch, of a tensor-parallel rank's heads. Weights, momentum and tails are fp32."""
    model, rows, e = config.model, config.train.micro_batch, ELEMENT[config.train.precision]
    tails = 4 * TAIL * model.width
    weights = 4 * model.heads * sum(a * o for a, o in memory_shapes(model))
    found: dict[str, float] = {}
    if model.variant == "mac":
        if model.memory.pool is not None:
            found["queries' tail"] = tails
        # Of the open segment: the memory now and as it was at the segment's start; its keys and
        # values, and those of its memory tokens; the last query.
        pool = model.memory.pool
        slots = model.segment + (model.segment // pool if pool else 0)
        found["segment"] = 3 * weights + 3 * tails + 2 * e * model.kv_width * slots
        found["segment"] += 4 * model.width
    elif model.variant != "transformer":
        found["tails"], found["memory"] = 3 * tails, 2 * weights
    if model.variant in ("transformer", "mag", "mal"):
        p = config.parallel
        before = (index + 1) * config.data.sequence_length // (p.context * p.segments)
        seen = min((model.attention_window or before + 1) - 1, before)
        found["keys and values"] = 2 * e * model.kv_width * seen
    return {what: rows * size / layout.tensor for what, size in found.items()}


def _pipeline(config: RunConfig, layout: Layout, stage: int) -> Iterator[Transfer]:
    p, passes = config.parallel, layout.micro_batches * config.parallel.segments
    tokens = config.train.micro_batch * config.data.sequence_length // (p.context * p.segments)
    stream = tokens * config.model.width / (p.tensor if p.sequence else 1)
    mine = range(stage, layout.pieces, layout.pipeline)
    # A piece that follows another one receives the stream and sends its gradient back; likewise
    # the other way round.
    times = passes * sum((n > 0) + (n + 1 < layout.pieces) for n in mine)
    e = ELEMENT[config.train.precision]
    yield Transfer("send", "pipeline", "stream", times, stream, e)
    yield Transfer("recv", "pipeline", "stream", times, stream, e)
