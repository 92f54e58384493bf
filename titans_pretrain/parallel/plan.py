"""Which piece of each parameter a tensor-parallel rank holds: parameter path -> style, as a table.

A new block wiring means new rows here, and nothing else.

- col: rows of a weight [o, i], its outputs.
- row: columns of a weight, its inputs; outputs are summed over the ranks and rejoin the stream.
- row_inside: likewise, but what follows are columns or heads again: the gradient of the sum, of
  which each rank then has a part, is summed over the ranks, too.
- heads: the first axis, of whole heads or of the channels of whole heads.
- vocab: the first axis, rows of the vocabulary.
- replicate: all of it; its gradient is equal on all ranks.
- replicate_sum_grad: all of it; each rank has a part of its gradient: they are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from titans_pretrain.config import ModelConfig
from titans_pretrain.errors import ConfigError

Style = Literal["col", "row", "row_inside", "heads", "vocab", "replicate", "replicate_sum_grad"]

# The axis of an unsharded parameter that a style cuts.
AXIS: dict[Style, int | None] = {
    "col": 0,
    "row": 1,
    "row_inside": 1,
    "heads": 0,
    "vocab": 0,
    "replicate": None,
    "replicate_sum_grad": None,
}

# Modules that the residual stream enters, and whose outputs `row` sums: from here on each rank
# works on its heads, columns or vocabulary, until a `row`.
ENTRANCES = ("blocks.*.mixer", "blocks.*.mlp", "head")


@dataclass(frozen=True)
class Row:
    """The style of the parameters whose path the pattern matches (* stands for anything)."""

    pattern: str
    style: Style


def plan_of(config: ModelConfig, *, sequence: bool = False) -> tuple[Row, ...]:
    """The rows for a model; the first that matches a path decides.

    sequence: whether norms of the residual stream see a part of the tokens only.
    """
    stream: Style = "replicate_sum_grad" if sequence else "replicate"
    rows = [
        Row("embedding.weight", "vocab"),
        Row("blocks.*.mixer_norm.weight", stream),
        Row("blocks.*.mlp_norm.weight", stream),
        Row("blocks.*.mlp.gate.weight", "col"),
        Row("blocks.*.mlp.up.weight", "col"),
        Row("blocks.*.mlp.down.weight", "row"),
        Row("final_norm.weight", stream),
    ]
    if not config.tied_embeddings:
        rows.append(Row("head.weight", "vocab"))
    mixer = (Row(f"blocks.*.mixer.{r.pattern}", r.style) for r in _MIXERS[config.variant](config))
    return (*rows, *mixer)


def _attention(out: Style) -> list[Row]:
    rows = [Row(f"attention.{name}.weight", "col") for name in "qkv"]
    return [*rows, Row("attention.o.weight", out)]


def _memory(
    config: ModelConfig, out: Style, *, output_gate: bool, maps: Style = "col"
) -> list[Row]:
    rows = [Row(f"memory.{name}.weight", maps) for name in "qkv"]
    rows += [
        Row("memory.?_conv.weight", "heads"),
        Row("memory.gates.*", "heads"),  # outputs are ordered by head
        Row("memory.initial.*", "heads"),
        Row("memory.read_norm.weight", "heads"),
        Row("memory.out.weight", out),
    ]
    if config.memory.residual_norm:
        rows += [Row("memory.inner_gain", "heads"), Row("memory.inner_bias", "heads")]
    if output_gate:
        rows.append(Row("memory.output_gate.weight", "col"))
    return rows


def _persistent(config: ModelConfig) -> list[Row]:
    """Rows before every document: each rank's heads read them."""
    return [Row("persistent", "replicate_sum_grad")] if config.persistent_tokens else []


def _transformer(config: ModelConfig) -> list[Row]:
    return _attention("row")


def _lmm(config: ModelConfig) -> list[Row]:
    return _memory(config, "row", output_gate=True)


def _mac(config: ModelConfig) -> list[Row]:
    if config.memory.projections == "block_diagonal":  # nothing crosses heads
        rows = _attention("heads") + _memory(config, "row", output_gate=False, maps="heads")
    else:  # the memory reads what attention says in full: `attention.o` ends nothing
        rows = _attention("row_inside") + _memory(config, "row", output_gate=False)
    if config.memory.retrieved == "learned":
        rows.append(Row("asked", "heads"))
    return rows + _persistent(config)


def _mag(config: ModelConfig) -> list[Row]:
    rows = [Row(f"attention.{name}.weight", "col") for name in "qkv"]
    rows.append(Row("attention_norm.weight", "heads"))
    return rows + _memory(config, "row", output_gate=False) + _persistent(config)


def _mal(config: ModelConfig) -> list[Row]:
    # Attention reads what the memory says in full.
    rows = _memory(config, "row_inside", output_gate=True) + _attention("row")
    return rows + _persistent(config)


_MIXERS = {
    "transformer": _transformer,
    "lmm": _lmm,
    "mac": _mac,
    "mag": _mag,
    "mal": _mal,
}


def styles(
    rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], tensor: int
) -> dict[str, Style]:
    """The style of each parameter of the unsharded model; `shapes`: path -> shape.

    Raises ConfigError for a parameter without a row, a row without a parameter, and a cut that
    does not come out even.
    """
    rows = list(rows)
    found: dict[str, Style] = {}
    used: set[Row] = set()
    for path, shape in shapes.items():
        row = next((r for r in rows if fnmatchcase(path, r.pattern)), None)
        if row is None:
            raise ConfigError(
                f"parameter {path} {list(shape)}",
                "every parameter has a row in the tensor-parallel plan",
                "add one to titans_pretrain/parallel/plan.py",
            )
        used.add(row)
        found[path] = row.style
        axis = AXIS[row.style]
        if axis is not None and shape[axis] % tensor:
            raise ConfigError(
                f"parameter {path} {list(shape)}, style {row.style}, parallel.tensor={tensor}",
                f"tensor divides axis {axis}",
                "choose another degree, or another width",
            )
    unused = [row.pattern for row in rows if row not in used]
    if unused:
        raise ConfigError(
            f"rows of the tensor-parallel plan: {', '.join(unused)}",
            "every row names a parameter of the model",
            "remove them from titans_pretrain/parallel/plan.py",
        )
    return found
