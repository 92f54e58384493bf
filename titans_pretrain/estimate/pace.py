"""Seconds of a step: work, waits for others, transfers; from counts and a hardware file.

A model, not a measurement: what is assumed stands in the hardware file, figure by figure. A block
takes what its GPU computes and moves through its memory, or what the host takes to launch all that,
if it is longer; transfers that nothing hides are added.

Letters: R context ranks, S pipeline stages, V pieces on each, M micro-batches (times segments).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from titans_pretrain.config import HardwareConfig, ModelConfig, RunConfig
from titans_pretrain.estimate.held import (
    ELEMENT,
    MASTER,
    Engine,
    blocks_of_pieces,
    engine_of,
    kept_bytes,
)
from titans_pretrain.estimate.traffic import Group, Transfer, transfers
from titans_pretrain.memory.sizes import runs
from titans_pretrain.model.counts import flops_per_token
from titans_pretrain.parallel.layout import Layout

# Operations of torch, views aside, that the host launches for a block's forward and backward.
# Counted, see tests/estimate/test_pace.py: of the block itself; of each chunk of the memory, and
# each run of chunks (memory/sizes.py); of MAC's segments.
LAUNCHES = {
    "transformer": (49, 79),
    "lmm": (96, 246),
    "mac": (63, 107),
    "mag": (189, 499),
    "mal": (195, 514),
}
OF_A_CHUNK, OF_A_RUN, OF_A_SEGMENT = (28, 100), (74, 212), (109, 295)
flops_of = lru_cache(maxsize=64)(flops_per_token)
BACKWARD = 2.0  # times the work of a forward
# Where transfers overlap with work: the share of the work that they can hide behind (assumed), and
# of them what never does, the first and the last.
HIDING, NEVER_HIDDEN = 0.7, 0.1


@dataclass(frozen=True)
class Block:
    """Seconds of a block of one micro-batch on one rank."""

    forward: float
    backward: float  # with the forward once more, if it is computed again
    memory_forward: float  # between the state from the tokens before and the one handed on
    memory_backward: float
    by_part: dict[str, float]  # of forward and backward: what takes them

    @property
    def whole(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Pace:
    """What a step takes, part by part; seconds."""

    parts: dict[str, float]
    tokens: int  # of a step
    flops: float  # of a step's training, over all ranks, nothing counted twice
    gpus: int
    peak: float  # FLOP/s of one

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs' data sheet promises."""
        return self.flops / self.seconds / (self.gpus * self.peak)

    @property
    def idle(self) -> dict[str, float]:
        """Shares of the step in which ranks wait: for stages, for the tokens before."""
        return {k: self.parts[k] / self.seconds for k in ("bubble", "wave") if self.parts.get(k)}


def pace(config: RunConfig, layout: Layout, hardware: HardwareConfig) -> Pace:
    """Of the dearest pipeline stage, in whose time all others work."""
    stages = [_stage(config, layout, hardware, s) for s in {0, layout.pipeline - 1}]
    parts = max(stages, key=lambda found: sum(found.values()))
    forward = flops_of(config.model, config.data.sequence_length, useful=True)
    tokens = config.train.global_batch * config.data.sequence_length
    return Pace(
        parts,
        tokens,
        (1 + BACKWARD) * sum(forward.values()) * tokens,
        layout.world_size,
        hardware.tflops(config.train.precision) * 1e12,
    )


def _stage(
    config: RunConfig, layout: Layout, hardware: HardwareConfig, stage: int
) -> dict[str, float]:
    p, passes = config.parallel, layout.micro_batches * config.parallel.segments
    blocks = sum(blocks_of_pieces(config, layout)[stage :: layout.pipeline])
    last = stage == layout.pipeline - 1
    one = block(config, layout, hardware)
    parts = {part: passes * blocks * s for part, s in one.by_part.items()}
    if last:
        parts["head"] = passes * _head(config, layout, hardware)
    engine = engine_of(config, layout, blocks, first=stage == 0, last=last)
    middle = 1 if layout.context > 2 else 0
    moved = list(transfers(config, layout, engine, stage, middle))
    for group in ("tensor", "pipeline"):
        seconds = sum(_seconds(t, config, layout, hardware) for t in moved if t.group == group)
        if seconds:
            parts[group] = seconds
    work = sum(parts.values())
    if layout.context > 1:
        parts["wave"] = _wave(config, layout, one, moved, hardware)
    if layout.pipeline > 1:
        parts["bubble"] = work / passes * (layout.pipeline - 1) / p.interleave
    parts["reduce and gather"] = _exposed(config, layout, hardware, moved, engine, parts)
    parts["update"] = _update(engine, hardware)
    return parts


def block(config: RunConfig, layout: Layout, hardware: HardwareConfig) -> Block:
    """Of one micro-batch."""
    model, train, p = config.model, config.train, config.parallel
    tokens = config.data.sequence_length // (p.context * p.segments)
    n, e = train.micro_batch * tokens, ELEMENT[train.precision]
    peak = hardware.tflops(train.precision) * 1e12
    by_part = flops_of(model, config.data.sequence_length)
    share = n / model.blocks / p.tensor / peak
    dense = ("mlp", "attention_maps", "memory_maps")
    matmul = sum(by_part[k] for k in dense) * share / hardware.matmul.value
    attention = by_part["attention"] * share / hardware.attention.value
    memory = (by_part["memory"] + by_part["retrieval"]) * share / hardware.memory.value
    kept = kept_bytes(
        model, train.micro_batch, tokens, e, blocks=1, head=False, tensor=p.tensor,
        sequence=p.sequence, handed=p.context * p.segments > 1,
    )  # fmt: skip
    moved = 2 * sum(v for k, v in kept.items() if k != "masks")  # written, and read by what follows
    passing = moved / (hardware.memory_gb_per_s.value * 1e9)
    launch = hardware.launch_us.value * 1e-6
    host_forward, host_backward = (launch * n for n in launches(model, tokens))
    device = matmul + attention + memory + passing
    forward = max(device, host_forward)
    again = forward if train.recompute == "blocks" else 0.0
    backward = max(BACKWARD * device, host_backward) + again
    times = 1 + BACKWARD + (1 if again else 0)
    told = {
        "matrix products": times * matmul,
        "attention": times * attention,
        "memory": times * memory,
        "memory traffic": times * passing,
    }
    told["launches"] = forward + backward - sum(told.values())
    # MAC's segments wait for the memory before them: all of its mixer lies on the way.
    if model.variant == "mac":
        inside = forward * (1 - by_part["mlp"] * share / hardware.matmul.value / max(device, 1e-30))
    else:
        chunks = chunks_of(model, tokens)
        inside = max(memory, launch * (OF_A_CHUNK[0] * chunks + OF_A_RUN[0] * len(runs(chunks))))
    ratio = inside / forward if forward else 0.0
    return Block(forward, backward, inside, ratio * (backward - again), told)


def chunks_of(model: ModelConfig, tokens: int) -> int:
    """Chunks of a memory, one after the other, in a document of so many tokens."""
    return 0 if model.variant == "transformer" else -(-tokens // model.memory.chunk)


def launches(model: ModelConfig, tokens: int) -> tuple[int, int]:
    """Operations of a block's forward and backward over one document of so many tokens; they do not
    depend on rows, widths or heads."""
    chunks, calls, segments = chunks_of(model, tokens), 1, 0
    if model.variant == "mac":
        calls = segments = -(-tokens // model.segment)
    work = [(chunks // calls, calls)] if chunks else []
    if model.variant in ("mag", "mal") and model.persistent_tokens:
        work.append((chunks_of(model, model.persistent_tokens), 1))
    forward, backward = (
        LAUNCHES[model.variant][way]
        + segments * OF_A_SEGMENT[way]
        + sum(n * (c * OF_A_CHUNK[way] + len(runs(c)) * OF_A_RUN[way]) for c, n in work)
        for way in (0, 1)
    )
    return forward, backward


def _head(config: RunConfig, layout: Layout, hardware: HardwareConfig) -> float:
    """Head and loss of one micro-batch, forward and backward."""
    model, train, p = config.model, config.train, config.parallel
    n = train.micro_batch * config.data.sequence_length // (p.context * p.segments)
    flops = 2.0 * model.width * (model.vocab_size or 0) * n / p.tensor
    peak = hardware.tflops(train.precision) * 1e12 * hardware.matmul.value
    logits = n * (model.vocab_size or 0) * 4 / p.tensor
    return (1 + BACKWARD) * flops / peak + 6 * logits / (hardware.memory_gb_per_s.value * 1e9)


def _wave(
    config: RunConfig,
    layout: Layout,
    one: Block,
    moved: Iterable[Transfer],
    hardware: HardwareConfig,
) -> float:
    """Seconds in which a context rank waits for the tokens before: parallel/wavefront.py's formula.
    The skew is paid once a step, in FB once a micro-batch. A hand-over is part of the way."""
    sent = [t for t in moved if t.group == "context" and t.way == "send"]
    calls = max((t.calls for t in sent), default=1)
    hop = sum(_seconds(t, config, layout, hardware) for t in sent) / calls
    skew = (layout.context - 1) * (one.memory_forward + one.memory_backward + 2 * hop)
    passes = layout.micro_batches * config.parallel.segments
    return skew * (passes if config.parallel.order == "FB" else 1)


def _exposed(
    config: RunConfig,
    layout: Layout,
    hardware: HardwareConfig,
    moved: Iterable[Transfer],
    engine: Engine,
    parts: dict[str, float],
) -> float:
    """Of gradients and weights over the data-parallel ranks; what overlaps hides behind work."""
    seconds = sum(
        _seconds(t, config, layout, hardware)
        for t in moved
        if t.group in ("data", "world", "model")
    )
    zero = config.parallel.zero
    if zero.offload:  # gradients to the host, weights back
        owned = engine.optimizer / MASTER
        seconds += (4 + engine.element) * owned / (hardware.host_gb_per_s.value * 1e9)
    if zero.overlap or zero.stage == 3:
        # DeepSpeed fetches the next block's weights, and reduces, as it computes.
        seconds = max(seconds - HIDING * sum(parts.values()), NEVER_HIDDEN * seconds)
    return seconds


def _update(engine: Engine, hardware: HardwareConfig) -> float:
    """AdamW reads and writes weight, moments and gradient. Offloaded, that is the host's work: at
    the pace of the link to it, which eight ranks that share its memory hardly surpass."""
    owned = engine.optimizer / MASTER
    rate = hardware.host_gb_per_s if engine.zero.offload else hardware.memory_gb_per_s
    return owned * (2 * MASTER + 4 + engine.element) / (rate.value * 1e9)


def _seconds(t: Transfer, config: RunConfig, layout: Layout, hardware: HardwareConfig) -> float:
    """Of a collective as NCCL's rings do it."""
    ranks, within = _group(t, layout, hardware.gpus_per_node)
    if ranks == 1 or t.way == "recv":
        return 0.0
    inside = within == ranks
    rate = hardware.node_gb_per_s.value
    if not inside:  # each of a node's members has a port of its own
        rate = min(rate, within * hardware.network_gb_per_s.value)
    latency = (hardware.node_latency_us if inside else hardware.network_latency_us).value * 1e-6
    rate *= 1e9 * hardware.links.value
    factor = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": (ranks - 1) / ranks,
        "reduce_scatter": ranks - 1,  # of what is left
        "send": 1.0,
    }[t.way]
    return t.calls * (latency + factor * t.elements * t.element / rate)


def _group(t: Transfer, layout: Layout, node: int) -> tuple[int, int]:
    """(ranks of the group, how many of them share a node)."""
    return _members(
        t.group,
        t.way == "send",
        layout.parallel.tensor,
        layout.parallel.context,
        layout.data_parallel,
        layout.parallel.pipeline,
        node,
    )


@lru_cache(maxsize=4096)
def _members(
    group: Group, send: bool, tensor: int, context: int, data: int, pipeline: int, node: int
) -> tuple[int, int]:
    """Neighbouring ranks differ in tensor first, then context, data, pipeline (layout.py)."""
    size, stride = {
        "tensor": (tensor, 1),
        "context": (context, tensor),
        "data": (context * data, tensor),
        "pipeline": (pipeline, tensor * context * data),
        "model": (tensor * pipeline, 1),
        "world": (tensor * context * data * pipeline, 1),
    }[group]
    if send:  # between neighbours: the slowest pair decides
        return 2, 2 if stride * size <= node else 1
    return size, max(1, min(size, node // stride))
