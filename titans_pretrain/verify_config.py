"""The config as `verify` takes it: what is otherwise than in the run, and the small model."""

from __future__ import annotations

from typing import Any

from titans_pretrain.config import ModelConfig, RunConfig
from titans_pretrain.run.checkpoint import flatten

VOCABULARY = 512  # of made-up tokens, where the config names none
HEAD_WIDTH = 16  # of a shrunk model: with 4, float32 says little
BUCKET = 4096  # elements that ZeRO reduces at once in a shrunk model: several times a step


def verified(asked: RunConfig, ranks: int, shrink: bool) -> RunConfig:
    """The config as it is verified: in float32, all steps full ones, no growing batch."""
    train = {"precision": "fp32", "ramp": None}
    optim = {"warmup_steps": 0, "schedule": "constant"}
    config = asked.model_copy(
        update={
            "train": asked.train.model_copy(update=train),
            "optim": asked.optim.model_copy(update=optim),
        }
    )
    return shrunk(config, ranks) if shrink else config


def shrunk(config: RunConfig, ranks: int) -> RunConfig:
    """The same layout, wiring and heads of a small model: two blocks a piece, heads of 16, four
    chunks (MAC: segments) a context rank and segment, two micro-batches of one row. ZeRO divides
    every parameter, and reduces in several buckets."""
    p, m = config.parallel, config.model
    data_parallel = max(1, ranks // (p.tensor * p.context * p.pipeline))
    chunk = min(m.memory.chunk, 16)
    segment = 2 * chunk
    tensor = p.tensor
    model = {
        "blocks": 2 * p.pipeline * p.interleave,
        "width": m.heads * HEAD_WIDTH,
        "mlp_width": -(-2 * m.heads * HEAD_WIDTH // tensor) * tensor,
        "vocab_size": -(-VOCABULARY // tensor) * tensor,
        "segment": segment,
        "window": None if m.window is None else min(m.window, 3 * chunk),
        "persistent_tokens": min(m.persistent_tokens, 4),
        "memory": m.memory.model_copy(update={"chunk": chunk}),
    }
    train = {
        "micro_batch": 1,
        "global_batch": 2 * data_parallel * max(1, p.pipeline),
    }
    zero = {"whole_below": 0, "bucket": min(p.zero.bucket, BUCKET)}
    length = 4 * segment * p.context * p.segments * tensor
    return config.model_copy(
        update={
            "model": ModelConfig.model_validate({**m.model_dump(), **_dumped(model)}),
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update={"sequence_length": length}),
            "parallel": p.model_copy(update={"zero": p.zero.model_copy(update=zero)}),
        }
    )


def _dumped(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "memory": model["memory"].model_dump()}


def changes(asked: RunConfig, config: RunConfig) -> list[str]:
    """What is verified otherwise than asked, e.g. "train.precision=fp32 (bf16)"."""
    before, after = (flatten(c.model_dump(mode="json")) for c in (asked, config))

    def was(key: str) -> Any:
        within = [f"{k}={v}" for k, v in before.items() if k.startswith(f"{key}.")]
        return ", ".join(within) or before[key]

    return [f"{k}={v} ({was(k)})" for k, v in after.items() if k not in before or before[k] != v]
