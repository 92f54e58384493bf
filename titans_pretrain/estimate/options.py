"""Every legal layout of a config on so many GPUs, and what else decides memory and speed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from titans_pretrain.config import RunConfig
from titans_pretrain.config.section import Section
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import Layout, plan_layout
from titans_pretrain.parallel.legal import RULES, Asked

INTERLEAVE = (1, 2, 4)

Choice = dict[str, Any]  # dotted key -> value; what a candidate sets


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def choices(config: RunConfig, ranks: int, offload: bool = False) -> Iterator[Choice]:
    """Every combination of degrees that could be legal; rows of a micro-batch in powers of two."""
    model, length = config.model, config.data.sequence_length
    tensors = [t for t in divisors(ranks) if model.heads % t == 0]
    for tensor in tensors:
        left = ranks // tensor
        for pipeline in (d for d in divisors(left) if d <= model.blocks):
            for context in divisors(left // pipeline):
                if length % context:
                    continue
                data = left // pipeline // context
                if config.train.global_batch % data:
                    continue
                degrees = {"tensor": tensor, "pipeline": pipeline, "context": context}
                yield from _variants(config, degrees, config.train.global_batch // data, offload)


def _variants(
    config: RunConfig, degrees: dict[str, int], rows: int, offload: bool
) -> Iterator[Choice]:
    """Of these degrees; rows: of a data-parallel rank."""
    alone = degrees["pipeline"] == degrees["context"] == 1
    micro = [m for m in (2**k for k in range(12)) if rows % m == 0]
    for sequence in (False, True) if degrees["tensor"] > 1 else (False,):
        for interleave in INTERLEAVE if degrees["pipeline"] > 1 else (1,):
            chain = degrees["context"] > 1 and degrees["pipeline"] == 1
            for order in ("FB", "FFBB") if chain else ("FB",):
                for stage in (1, 2, 3) if alone else (1,):
                    for m in micro:
                        for recompute in ("none", "blocks"):
                            yield {
                                **{f"parallel.{k}": v for k, v in degrees.items()},
                                "parallel.sequence": sequence,
                                "parallel.interleave": interleave,
                                "parallel.order": order,
                                "parallel.zero.stage": stage,
                                "parallel.zero.offload": offload,
                                "train.micro_batch": m,
                                "train.recompute": recompute,
                            }


def changed(config: RunConfig, choice: Choice) -> RunConfig:
    """The config with these values; they are not validated again: they are known to be of range."""
    parallel: dict[str, Any] = {}
    zero: dict[str, Any] = {}
    train: dict[str, Any] = {}
    for key, value in choice.items():
        *above, leaf = key.split(".")
        {"parallel": parallel, "parallel.zero": zero, "train": train}[".".join(above)][leaf] = value
    p = config.parallel
    if p.zero.overlap and zero.get("stage") == 1:
        zero["overlap"] = False
    if zero.get("stage", 3) < 3:
        zero["copy_within"] = 1
    new_zero = _with(p.zero, tuple(zero.items()))
    new_parallel = _with(p, (*parallel.items(), ("zero", new_zero)))
    new_train = _with(config.train, tuple(train.items()))
    return config.model_copy(update={"parallel": new_parallel, "train": new_train})


@lru_cache(maxsize=4096)
def _with(part: Section, values: tuple[tuple[str, Any], ...]) -> Any:
    """Most candidates share most of their parts."""
    return part.model_copy(update=dict(values))


def layout_of(config: RunConfig, ranks: int) -> Layout | None:
    """None if a rule of legal.py is broken."""
    asked = Asked(config, ranks)
    if any(rule.broken(asked) is not None for rule in RULES):
        return None
    rows = config.train.micro_batch * asked.data_parallel
    return Layout(ranks, config.parallel, asked.data_parallel, config.train.global_batch // rows)


def legal(
    config: RunConfig, ranks: int, offload: bool = False
) -> Iterator[tuple[Choice, RunConfig, Layout]]:
    """Every legal candidate."""
    for choice in choices(config, ranks, offload):
        candidate = changed(config, choice)
        layout = layout_of(candidate, ranks)
        if layout is None or _as_fb(candidate, layout):
            continue
        yield choice, candidate, layout


def _as_fb(config: RunConfig, layout: Layout) -> bool:
    """Whether another order is the same: of one forward and its backward there is one."""
    p = config.parallel
    return p.order != "FB" and layout.micro_batches * p.segments == 1


def require_some(config: RunConfig, ranks: int) -> None:
    """Raises ConfigError if no layout at all is legal on so many ranks."""
    if next(legal(config, ranks), None) is not None:
        return
    try:
        plan_layout(config, ranks)
    except ConfigError as e:
        raise ConfigError(
            f"{ranks} GPUs: no layout is legal, with any degrees; as the config has it: {e.value}",
            e.rule,
            e.remedy,
        ) from e
