"""Seconds of a step: work, waits for others, transfers; from counts and a hardware file.

A model, not a measurement: what is assumed stands in the hardware file, figure by figure. A block
takes what its GPU computes and moves through its memory, or what the host takes to launch all that,
if it is longer; transfers that nothing hides are added.

Letters: R context ranks, S pipeline stages, V pieces on each, M micro-batches (times segments).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from titans_pretrain.config import HardwareConfig, ModelConfig
from titans_pretrain.estimate.held import kept_of_a_block
from titans_pretrain.estimate.network import Network
from titans_pretrain.estimate.portion import MASTER, Engine, Portion
from titans_pretrain.estimate.traffic import transfers
from titans_pretrain.memory.sizes import runs
from titans_pretrain.model.counts import flops_per_token

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
# Bytes of a logit that loss and gradient read and write, products with the head aside: counted.
OF_A_LOGIT = {"fp32": 28, "bf16": 40}
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


def pace(found: Sequence[Portion], hardware: HardwareConfig) -> Pace:
    """Of the dearest pipeline stage, in whose time all others work. found: those that can be."""
    config, layout = found[0].config, found[0].layout
    one, network = block(found[0], hardware), Network(layout, hardware)
    stages = (_stage(portion, one, hardware, network) for portion in found)
    parts = max(stages, key=lambda parts: sum(parts.values()))
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
    portion: Portion, one: Block, hardware: HardwareConfig, network: Network
) -> dict[str, float]:
    passes, p = portion.passes, portion.config.parallel
    parts = {part: passes * portion.blocks * s for part, s in one.by_part.items()}
    if portion.last:
        parts["head"] = passes * _head(portion, hardware)
    moved = list(transfers(portion, context=1 if p.context > 2 else 0))
    took: dict[str, float] = defaultdict(float)
    for t in moved:
        took[t.group] += network.seconds(t)
    parts |= {group: took[group] for group in ("tensor", "pipeline") if took[group]}
    work = sum(parts.values())
    if p.context > 1:
        sent = (t.calls for t in moved if t.group == "context" and t.way == "send")
        parts["wave"] = _wave(portion, one, took["context"] / max(sent, default=1))
    if p.pipeline > 1:
        parts["bubble"] = work / passes * (p.pipeline - 1) / p.interleave
    reduced = took["data"] + took["world"] + took["model"]
    parts["reduce and gather"] = _exposed(portion.engine, reduced, sum(parts.values()), hardware)
    parts["update"] = _update(portion.engine, hardware)
    return parts


def block(portion: Portion, hardware: HardwareConfig) -> Block:
    """Of one micro-batch."""
    config = portion.config
    model, tensor = config.model, config.parallel.tensor
    peak = hardware.tflops(config.train.precision) * 1e12
    by_part = flops_of(model, config.data.sequence_length)
    part = portion.tokens / model.blocks / tensor / peak
    dense = ("mlp", "attention_maps", "memory_maps")
    matmul = sum(by_part[k] for k in dense) * part / hardware.matmul.value
    attention = by_part["attention"] * part / hardware.attention.value
    memory = (by_part["memory"] + by_part["retrieval"]) * part / hardware.memory.value
    kept = kept_of_a_block(portion)
    moved = kept["stream"] + kept["mixers"] + kept["mlps"] + kept["memory states"]
    passing = 2 * moved / (hardware.memory_gb_per_s.value * 1e9)  # written; read by what follows
    launch = hardware.launch_us.value * 1e-6
    host_forward, host_backward = (launch * n for n in launches(model, portion.length))
    device = matmul + attention + memory + passing
    forward = max(device, host_forward)
    again = forward if portion.again else 0.0
    backward = max(BACKWARD * device, host_backward) + again
    times = 1 + BACKWARD + portion.again
    told = {
        "matrix products": times * matmul,
        "attention": times * attention,
        "memory": times * memory,
        "memory traffic": times * passing,
    }
    told["launches"] = forward + backward - sum(told.values())
    # MAC's segments wait for the memory before them: all of its mixer lies on the way.
    if model.variant == "mac":
        inside = forward * (1 - by_part["mlp"] * part / hardware.matmul.value / max(device, 1e-30))
    else:
        chunks = chunks_of(model, portion.length)
        inside = max(memory, launch * (OF_A_CHUNK[0] * chunks + OF_A_RUN[0] * len(runs(chunks))))
    ratio = inside / forward if forward else 0.0
    return Block(forward, backward, inside, ratio * (backward - again), told)


def chunks_of(model: ModelConfig, tokens: int) -> int:
    """Chunks of a memory, one after the other, in a document of so many tokens."""
    return 0 if model.variant == "transformer" else -(-tokens // model.memory.chunk)


@lru_cache(maxsize=256)
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


def _head(portion: Portion, hardware: HardwareConfig) -> float:
    """Head and loss of one micro-batch, forward and backward."""
    model, precision = portion.config.model, portion.config.train.precision
    logits = portion.tokens * (model.vocab_size or 0) / portion.config.parallel.tensor
    flops = 2.0 * model.width * logits
    peak = hardware.tflops(precision) * 1e12 * hardware.matmul.value
    moved = OF_A_LOGIT[precision] * logits / (hardware.memory_gb_per_s.value * 1e9)
    return (1 + BACKWARD) * flops / peak + moved


def _wave(portion: Portion, one: Block, hop: float) -> float:
    """Seconds in which a context rank waits for the tokens before: parallel/wavefront.py's formula.
    The skew is paid once a step, in FB once a micro-batch; by forwards also where a segment follows
    another. A hand-over, of `hop` seconds, is part of the way."""
    forwards, backwards = 1 + portion.passes - portion.layout.micro_batches, 1
    if portion.config.parallel.order == "FB":
        forwards = backwards = portion.passes
    skew = forwards * (one.memory_forward + hop) + backwards * (one.memory_backward + hop)
    return (portion.layout.context - 1) * skew


def _exposed(engine: Engine, seconds: float, work: float, hardware: HardwareConfig) -> float:
    """Of what moves gradients and weights among the data-parallel ranks, `seconds`, what does not
    hide behind a step's work."""
    if engine.zero.offload:  # gradients to the host, weights back
        owned = engine.optimizer / MASTER
        seconds += (4 + engine.element) * owned / (hardware.host_gb_per_s.value * 1e9)
    if engine.zero.overlap or engine.zero.stage == 3:
        # DeepSpeed fetches the next block's weights, and reduces, as it computes.
        seconds = max(seconds - HIDING * work, NEVER_HIDDEN * seconds)
    return seconds


def _update(engine: Engine, hardware: HardwareConfig) -> float:
    """AdamW reads and writes weight, moments and gradient. Offloaded, that is the host's work: at
    the pace of the link to it, which eight ranks that share its memory hardly surpass."""
    owned = engine.optimizer / MASTER
    rate = hardware.host_gb_per_s if engine.zero.offload else hardware.memory_gb_per_s
    return owned * (2 * MASTER + 4 + engine.element) / (rate.value * 1e9)
