"""`titans-pretrain inspect CONFIG`: what a run would be, without starting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from titans_pretrain.config import ModelConfig, RunConfig, dump_config, load_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.model.saved import saved_bytes
from titans_pretrain.parallel.layout import plan_layout

GPUS = (1, 8, 64, 512)


def describe_config(path: Path, overrides: Sequence[str] = ()) -> str:
    """Sizes, work, layouts, and the resolved tree, in lines. Raises ConfigError."""
    config = load_config(path, list(overrides))
    lines = [f"config {path}", *_model(config.model), ""]
    lines += [*_parts(config), "", *_kept(config), "", *_tokens(config), "", *_layouts(config)]
    return "\n".join([*lines, "", "resolved", *_indented(dump_config(config))])


def _model(m: ModelConfig) -> Iterator[str]:
    heads = f"{m.heads} heads of {m.head_width}"
    yield f"  {m.variant}, {m.blocks} blocks, width {m.width}, {heads}, MLP {m.mlp_hidden}"
    if m.vocab_size is None:
        yield "  model.vocab_size comes with the data: embedding and head are not counted here"


def _parts(config: RunConfig) -> Iterator[str]:
    """Parameters, and FLOPs of training: forward once, backward twice that."""
    parameters = parameter_count(config.model)
    forward = flops_per_token(config.model, config.data.sequence_length)
    yield f"  {'part':<16}{'parameters':>16}{'training MFLOP a token':>26}"
    for part in dict.fromkeys([*parameters, *forward]):
        if parameters.get(part) or forward.get(part):
            yield _row(part, parameters.get(part, 0), 3 * forward.get(part, 0.0))
    work = 3 * sum(forward.values())
    yield _row("all", sum(parameters.values()), work)
    if config.train.recompute == "blocks":
        yield _row("with recompute", None, work * 4 / 3)


def _row(part: str, parameters: int | None, flops: float) -> str:
    number = "" if parameters is None else f"{parameters:,}"
    return f"  {part:<16}{number:>16}{flops / 1e6:>26,.2f}"


def _kept(config: RunConfig) -> Iterator[str]:
    """What one micro-batch's forward keeps for its backward on the rank that holds most of it."""
    p, m = config.parallel, config.model
    element = {"bf16": 2, "fp32": 4}[config.train.precision]
    tokens = config.data.sequence_length // (p.context * p.segments)
    blocks = -(-m.blocks // p.pipeline)
    at_once = 1 if config.train.recompute == "blocks" else blocks
    kept = saved_bytes(
        m,
        config.train.micro_batch,
        tokens,
        element,
        blocks=at_once,
        tensor=p.tensor,
        sequence=p.sequence,
        handed=p.context * p.segments > 1,
    )
    if at_once < blocks:  # of the others their inputs alone
        inputs = (blocks - 1) * config.train.micro_batch * tokens * m.width * element
        kept["stream"] += inputs / (p.tensor if p.sequence else 1)
    yield f"  {'kept for backward':<22}{'MiB a micro-batch':>18}"
    for kind, size in [*kept.items(), ("sum", sum(kept.values()))]:
        if size:
            yield f"  {kind:<22}{size / 2**20:>18,.1f}"


def _tokens(config: RunConfig) -> Iterator[str]:
    length, steps = config.data.sequence_length, config.train.steps
    total = config.train.all_rows() * length
    step = config.train.global_batch * length
    yield f"  {steps:,} steps of {step:,} tokens: {total:,} in all, pads included"


def _layouts(config: RunConfig) -> Iterator[str]:
    yield f"  {'GPUs':>4}  micro-batches of {_rows(config)}, layout"
    for gpus in GPUS:
        try:
            layout = plan_layout(config, gpus)
        except ConfigError as e:
            yield f"  {gpus:>4}  no: {e.value}; {e.remedy}"
            continue
        yield f"  {gpus:>4}  {layout.micro_batches:>13}          {layout.describe()}"


def _rows(config: RunConfig) -> str:
    n = config.train.micro_batch
    return f"{n} row{'s' if n > 1 else ''}"


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
