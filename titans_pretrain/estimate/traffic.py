"""Collectives of a step, as one rank sees them: what, among whom, how often, how many bytes.

Bytes are those of one tensor on a rank: of what is summed, of what was gathered, of what a
reduce-scatter leaves, of what is sent. None lies inside the memory's update or read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from titans_pretrain.estimate.held import REUSED
from titans_pretrain.estimate.portion import Portion
from titans_pretrain.memory.sizes import TAIL
from titans_pretrain.model.counts import memory_elements

Group = Literal["world", "model", "tensor", "context", "pipeline", "data"]
Way = Literal["all_reduce", "all_gather", "reduce_scatter", "send", "recv"]


class Transfer(NamedTuple):
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
    portion: Portion, context: int = 0, segments: Mapping[int, int] | None = None
) -> Iterator[Transfer]:
    """Of a step after the first, without validation, at place `context` of the ranks' chain.

    segments: MAC: how many steps of its plans, of all micro-batches together, have so many tokens;
    default: each row is one document.
    """
    yield from _step(portion)
    yield from _zero(portion)
    if portion.layout.tensor > 1:
        yield from _tensor(portion, _whole(portion) if segments is None else segments)
    if portion.layout.context > 1:
        yield from _context(portion, context)
    if portion.layout.pipeline > 1:
        yield from _pipeline(portion)


def _step(portion: Portion) -> Iterator[Transfer]:
    yield Transfer("all_reduce", "world", "labels of the step", 1, 1, 8)
    yield Transfer("all_reduce", "world", "nats, labels, penalty", 1, 3, 8)
    engine = portion.engine
    groups = len(engine.numels)
    wide = 8 if engine.zero.stage == 3 else 4
    if engine.zero.stage == 1 and engine.element < 4:  # DeepSpeed's bf16 optimizer: of all at once
        yield Transfer("all_reduce", "world", "gradient norm", 1, 1, wide)
        return
    yield Transfer("all_reduce", "data", "gradient norm", groups, 1, wide)
    if portion.layout.tensor * portion.layout.pipeline > 1:
        yield Transfer("all_reduce", "model", "gradient norm", groups, 1, wide)


def _zero(portion: Portion) -> Iterator[Transfer]:
    """Gradients are summed over the ranks with other data, each rank's part of the weights is
    gathered: once a step, or (2: gradients; 3: both, in parts) in every micro-batch."""
    engine = portion.engine
    n, ranks = engine.total, engine.ranks
    wide = 2 if portion.element == 2 and engine.zero.reduce == "bf16" else 4
    if engine.zero.stage == 3:
        # Once more for the backward those that were given up after the forward.
        again = max(0.0, 1 - REUSED / (2 * n))
        gathers = round(portion.passes * (1 + again))
        yield Transfer("all_gather", "data", "weights", gathers, n, engine.element)
        yield Transfer("reduce_scatter", "data", "gradients", portion.passes, n / ranks, wide)
        return
    sums = portion.passes if engine.zero.stage == 2 else 1
    yield Transfer("all_reduce", "data", "gradients", sums, n, wide)
    if ranks > 1:
        for size in engine.padded:
            yield Transfer("all_gather", "data", "weights", 1, size, engine.element)


def _whole(portion: Portion) -> dict[int, int]:
    """Of rows that are one document each."""
    G, rows = portion.config.model.segment, portion.rows
    full, rest = divmod(portion.length, G)
    found = {rows * G: portion.passes * full, rows * rest: portion.passes * bool(rest)}
    return {n: times for n, times in found.items() if times}


def _tensor(portion: Portion, segments: Mapping[int, int]) -> Iterator[Transfer]:
    """Into mixers, MLPs and the head the stream's gradient is summed, out of them (and of the
    embedding) the stream. Under sequence parallelism a reduce-scatter sums, and before what needs
    all tokens an all-gather brings them together. A block that is computed again sums again what
    its mixer gives; what its MLP gives nobody reads."""
    model, train, ranks = portion.config.model, portion.config.train, portion.layout.tensor
    e, passes, tokens, blocks = portion.element, portion.passes, portion.tokens, portion.blocks
    stream, prefix = tokens * model.width, model.persistent_tokens * model.width
    again, ends = blocks * portion.again, portion.first + portion.last
    if portion.config.parallel.sequence:
        # Forward: out of mixer and MLP, and of the embedding; backward: into each, and the head.
        sums = ends + 4 * blocks + again
        gathers = ends + 4 * blocks + 2 * again
        yield Transfer("reduce_scatter", "tensor", "stream", passes * sums, stream / ranks, e)
        yield Transfer("all_gather", "tensor", "stream", passes * gathers, stream, e)
        gains = passes * (2 * blocks + portion.last)
        yield Transfer("all_reduce", "tensor", "gains of norms", gains, model.width, e)
    else:
        sums = ends + 4 * blocks + again
        yield Transfer("all_reduce", "tensor", "stream", passes * sums, stream, e)
    if portion.last:
        # Of each token the highest logit, the label's, the sum of exponentials; for z-loss the
        # first and the last.
        times = passes * (3 + 2 * bool(train.z_loss))
        yield Transfer("all_reduce", "tensor", "loss", times, tokens, 4)
    if model.variant in ("mac", "mag", "mal") and prefix:
        yield Transfer("all_reduce", "tensor", "persistent tokens", passes * blocks, prefix, e)
    if model.variant == "mal":  # attention reads all that the memory says; there and back
        times = passes * (2 * blocks + again)
        yield Transfer("all_reduce", "tensor", "memory to attention", times, stream, e)
        if prefix:
            yield Transfer("all_reduce", "tensor", "memory to attention", times, prefix, e)
    if model.variant == "mac" and model.memory.projections == "dense":
        for n, times in ((n * model.width, times) for n, times in segments.items()):
            gathers, sums = times * (blocks + again), times * (2 * blocks + again)
            yield Transfer("all_gather", "tensor", "h of all heads", gathers, n, e)
            yield Transfer(
                "reduce_scatter", "tensor", "h of all heads", times * blocks, n / ranks, e
            )
            yield Transfer("all_reduce", "tensor", "Y", sums, n, e)


def _context(portion: Portion, index: int) -> Iterator[Transfer]:
    """States go from rank to rank, their gradients back; each message is of this rank's heads.
    Where a row comes in segments, the last rank's go round to the first one, those of all blocks of
    a piece at once, behind their length; without gradients."""
    segments, last = portion.config.parallel.segments, portion.layout.context - 1
    rows = portion.layout.micro_batches * portion.blocks
    to = handed(portion, index)  # the next rank
    of = handed(portion, index - 1) if index else {}  # this one
    for what, size in to.items():
        if index < last:  # a state to the next one, its gradient back
            yield Transfer("send", "context", what, rows * segments, size, 1)
            yield Transfer("recv", "context", what, rows * segments, size, 1)
        if index > 0:  # from the one before, and back
            yield Transfer("recv", "context", what, rows * segments, of[what], 1)
            yield Transfer("send", "context", what, rows * segments, of[what], 1)
    if segments > 1 and index in (0, last):
        way: Way = "send" if index else "recv"
        pieces = portion.config.parallel.interleave
        times = portion.layout.micro_batches * (segments - 1) * pieces
        size = sum(handed(portion, last).values()) * portion.blocks / pieces
        yield Transfer(way, "context", "length of the states", times, 1, 8)
        yield Transfer(way, "context", "states of a segment", times, size, 1)


def handed(portion: Portion, index: int) -> dict[str, float]:
    """Bytes of each message in which context rank `index` hands on a block's state of a
    micro-batch, of a tensor-parallel rank's heads. Weights, momentum and tails are fp32."""
    model, e = portion.config.model, portion.element
    tails = 4 * TAIL * model.width
    weights = 4 * memory_elements(model)
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
        before = (index + 1) * portion.length
        seen = min((model.attention_window or before + 1) - 1, before)
        found["keys and values"] = 2 * e * model.kv_width * seen
    return {what: portion.rows * size / portion.layout.tensor for what, size in found.items()}


def _pipeline(portion: Portion) -> Iterator[Transfer]:
    p, layout = portion.config.parallel, portion.layout
    stream = portion.tokens * portion.config.model.width / (p.tensor if p.sequence else 1)
    mine = range(portion.stage, layout.pieces, layout.pipeline)
    # A piece that follows another one receives the stream and sends its gradient back; likewise
    # the other way round.
    times = portion.passes * sum((n > 0) + (n + 1 < layout.pieces) for n in mine)
    yield Transfer("send", "pipeline", "stream", times, stream, portion.element)
    yield Transfer("recv", "pipeline", "stream", times, stream, portion.element)
