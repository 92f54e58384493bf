"""Which degrees go together: each rule with its reason, as data.

README's table of legal layouts is made from RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from titans_pretrain.config import ParallelConfig, RunConfig


@dataclass(frozen=True)
class Asked:
    """What a rule looks at."""

    config: RunConfig
    ranks: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def model_parallel(self) -> int:
        return self.parallel.tensor * self.parallel.context * self.parallel.pipeline

    @property
    def data_parallel(self) -> int:
        return max(1, self.ranks // self.model_parallel)


Refused = tuple[str, str]  # the value, the remedy


@dataclass(frozen=True)
class Rule:
    """What a layout must keep. `broken` gives the value and the remedy, or None."""

    rule: str
    why: str
    broken: Callable[[Asked], Refused | None]


def _stage_exists(a: Asked) -> Refused | None:
    if a.parallel.zero.stage == 0:
        return "parallel.zero.stage=0", "use parallel.zero.stage=1: it costs no more"
    return None


def _fills_the_world(a: Asked) -> Refused | None:
    if a.ranks % a.model_parallel == 0:
        return None
    p = a.parallel
    degrees = {"tensor": p.tensor, "context": p.context, "pipeline": p.pipeline}
    asked = ", ".join(f"parallel.{k}={n}" for k, n in degrees.items() if n > 1)
    remedy = f"use a multiple of {a.model_parallel} ranks"
    if sum(n > 1 for n in degrees.values()) == 1:
        [(name, n)] = [(k, n) for k, n in degrees.items() if n > 1]
        remedy += f", or parallel.{name}={gcd(n, a.ranks)}"
    return f"{asked}, {a.ranks} ranks", remedy


def _whole_heads(a: Asked) -> Refused | None:
    model, tensor = a.config.model, a.parallel.tensor
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
            return f"{name}={size}, parallel.tensor={tensor}", remedy
    return None


def _sequence_splits(a: Asked) -> Refused | None:
    p, length = a.parallel, a.config.data.sequence_length
    if not p.sequence:
        return None
    if p.tensor == 1:
        return (
            "parallel.sequence=true, parallel.tensor=1",
            "set parallel.sequence=false, or parallel.tensor above 1",
        )
    unit = p.tensor * p.context * p.segments
    if length % unit:
        return (
            f"data.sequence_length={length}, parallel.tensor={p.tensor}, "
            f"parallel.context={p.context}, parallel.segments={p.segments}, "
            "parallel.sequence=true",
            f"use a sequence_length that {unit} divides, or parallel.sequence=false",
        )
    return None


def _blocks_suffice(a: Asked) -> Refused | None:
    p, blocks = a.parallel, a.config.model.blocks
    pieces = p.pipeline * p.interleave
    if pieces <= blocks:
        return None
    return (
        f"parallel.pipeline={p.pipeline}, parallel.interleave={p.interleave}, "
        f"model.blocks={blocks}",
        f"lower them until pipeline x interleave is at most {blocks}",
    )


def _interleaved(a: Asked) -> Refused | None:
    p = a.parallel
    if p.interleave == 1 or p.pipeline > 1:
        return None
    return (
        f"parallel.interleave={p.interleave}, parallel.pipeline=1",
        "set parallel.interleave=1, or parallel.pipeline above 1",
    )


def _zero_alone(key: str, needed: int | str = 1) -> Callable[[Asked], Refused | None]:
    """ZeRO stages 2 and 3 only where `key` of the parallel section has this value."""

    def broken(a: Asked) -> Refused | None:
        stage, value = a.parallel.zero.stage, getattr(a.parallel, key)
        if stage < 2 or value == needed:
            return None
        return (
            f"parallel.zero.stage={stage}, parallel.{key}={value}",
            f"use parallel.zero.stage=1, or parallel.{key}={needed}",
        )

    return broken


def _overlap_needs_buckets(a: Asked) -> Refused | None:
    zero = a.parallel.zero
    if not zero.overlap or zero.stage >= 2:
        return None
    return (
        f"parallel.zero.overlap=true, parallel.zero.stage={zero.stage}",
        "set parallel.zero.overlap=false, or parallel.zero.stage=2",
    )


def _copies(a: Asked) -> Refused | None:
    zero = a.parallel.zero
    if zero.copy_within == 1:
        return None
    if zero.stage != 3:
        return (
            f"parallel.zero.copy_within={zero.copy_within}, parallel.zero.stage={zero.stage}",
            "set parallel.zero.copy_within=1, or parallel.zero.stage=3",
        )
    if a.data_parallel % zero.copy_within:
        return (
            f"parallel.zero.copy_within={zero.copy_within}, {a.data_parallel} data-parallel ranks",
            f"use parallel.zero.copy_within={gcd(zero.copy_within, a.data_parallel)}",
        )
    return None


def _context_splits(a: Asked) -> Refused | None:
    context, segments = a.parallel.context, a.parallel.segments
    align, length = a.config.model.alignment, a.config.data.sequence_length
    unit = context * segments * align
    if context * segments == 1 or length % unit == 0:
        return None
    chunk = f", model.memory.chunk={align}" if align > 1 else ""  # a transformer has none
    return (
        f"data.sequence_length={length}, parallel.context={context}, "
        f"parallel.segments={segments}{chunk}",
        f"use data.sequence_length={max(1, round(length / unit)) * unit}",
    )


def _order_is_ours(a: Asked) -> Refused | None:
    p = a.parallel
    if p.order == "FB":
        return None
    if p.pipeline > 1:
        return (
            f"parallel.order={p.order}, parallel.pipeline={p.pipeline}",
            "set parallel.order=FB, or parallel.pipeline=1",
        )
    if p.order == "skewed" and p.segments > 1:
        return (
            f"parallel.order=skewed, parallel.segments={p.segments}",
            "set parallel.order=FFBB, or parallel.segments=1",
        )
    return None


def _whole_micro_batches(a: Asked) -> Refused | None:
    train, data_parallel = a.config.train, a.data_parallel
    per_round = train.micro_batch * data_parallel
    if train.global_batch % per_round == 0:
        return None
    return (
        f"train.global_batch={train.global_batch}, train.micro_batch={train.micro_batch}, "
        f"{data_parallel} data-parallel ranks",
        f"try train.global_batch={max(1, round(train.global_batch / per_round)) * per_round}",
    )


def _whole_ramp(a: Asked) -> Refused | None:
    train, per_round = a.config.train, a.config.train.micro_batch * a.data_parallel
    if train.ramp is None or train.ramp.start % per_round == 0:
        return None
    return (
        f"train.ramp.start={train.ramp.start}, train.micro_batch={train.micro_batch}, "
        f"{a.data_parallel} data-parallel ranks",
        f"make train.ramp.start a multiple of {per_round}, or lower train.micro_batch",
    )


def _rounds_of_stages(a: Asked) -> Refused | None:
    p, train = a.parallel, a.config.train
    if p.interleave == 1:
        return None
    per_round = train.micro_batch * a.data_parallel
    unit = per_round * p.pipeline
    for name, rows in (
        ("train.global_batch", train.global_batch),
        ("train.ramp.start", train.ramp.start if train.ramp else unit),
    ):
        if rows % unit:
            return (
                f"{name}={rows}, train.micro_batch={train.micro_batch}, {a.data_parallel} "
                f"data-parallel ranks: {rows // per_round} micro-batches; "
                f"parallel.pipeline={p.pipeline}, parallel.interleave={p.interleave}",
                f"make {name} a multiple of {unit}, or set parallel.interleave=1",
            )
    return None


# In the order in which they are asked; the README's table of legal layouts is made from them.
RULES = (
    Rule(
        "the ZeRO stage is 1, 2 or 3",
        "stage 0 accumulates bf16 gradients in bf16 and reports no gradient norm",
        _stage_exists,
    ),
    Rule(
        "tensor x context x pipeline divides the number of ranks",
        "data parallelism takes what is left of the world",
        _fills_the_world,
    ),
    Rule(
        "tensor divides the model's heads, MLP width and vocabulary",
        "ranks that share a layer hold equal parts of it: whole heads, nothing padded silently",
        _whole_heads,
    ),
    Rule(
        "sequence needs tensor above 1, which divides the tokens of a context rank",
        "the ranks that share a layer split the tokens between layers evenly",
        _sequence_splits,
    ),
    Rule(
        "pipeline x interleave is at most the number of blocks",
        "each piece of the model holds a block or more; they are cut by their FLOPs, evenly or not",
        _blocks_suffice,
    ),
    Rule(
        "interleave above 1 needs pipeline above 1",
        "one stage has nobody to interleave with",
        _interleaved,
    ),
    Rule(
        "ZeRO stages 2 and 3 need pipeline=1",
        "they reduce gradients inside each backward, which stages run at different times: "
        "DeepSpeed crashes (2) or hangs (3)",
        _zero_alone("pipeline"),
    ),
    Rule(
        "ZeRO stages 2 and 3 need context=1",
        "their collectives inside the layer loop span the context ranks, which wait for one "
        "another's memory state: they deadlock",
        _zero_alone("context"),
    ),
    Rule(
        "ZeRO stages 2 and 3 need order=FB",
        "they reduce gradients inside each backward, and let no second backward come before the "
        "next forward: DeepSpeed crashes",
        _zero_alone("order", "FB"),
    ),
    Rule(
        "overlap needs ZeRO stage 2 or 3",
        "stage 1 reduces once, after the last backward",
        _overlap_needs_buckets,
    ),
    Rule(
        "copy_within needs ZeRO stage 3 and divides the data-parallel ranks",
        "only stage 3 gathers parameters, from groups of equal size",
        _copies,
    ),
    Rule(
        "context x segments x memory.chunk divides the sequence length",
        "each context rank holds whole chunks of each segment",
        _context_splits,
    ),
    Rule(
        "orders other than FB need pipeline=1; the skewed one needs segments=1",
        "stages have an order of their own; the last context rank ends a segment before the first "
        "begins the next",
        _order_is_ours,
    ),
    Rule(
        "global_batch is a multiple of micro_batch x data-parallel ranks",
        "all ranks do equal work",
        _whole_micro_batches,
    ),
    Rule(
        "ramp.start is a multiple of micro_batch x data-parallel ranks",
        "all ranks do equal work from the first step on",
        _whole_ramp,
    ),
    Rule(
        "with interleave, the micro-batches of each step are a multiple of pipeline",
        "the interleaved schedule goes round the stages with as many micro-batches at a time",
        _rounds_of_stages,
    ),
)


def table() -> str:
    """The rules in Markdown."""
    lines = ["| a legal layout | because |", "|---|---|"]
    return "\n".join([*lines, *(f"| {rule.rule} | {rule.why} |" for rule in RULES)])
