"""The tensor-parallel plan: which row decides, and what is said of a plan that does not fit."""

from __future__ import annotations

import pytest

from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.plan import Row, styles

SHAPES = {"blocks.0.mlp.up.weight": (6, 4), "blocks.0.mlp.down.weight": (6, 4), "norm": (4,)}
ROWS = (Row("*.up.weight", "col"), Row("*.down.weight", "row"), Row("norm", "replicate"))


def test_each_parameter_has_the_style_of_the_first_row_that_matches() -> None:
    up, down, norm = SHAPES
    assert styles(ROWS, SHAPES, 2) == {up: "col", down: "row", norm: "replicate"}
    special = (Row("blocks.0.*.down.weight", "row_inside"), *ROWS)
    both = {**SHAPES, "blocks.1.mlp.down.weight": (6, 4)}
    assert styles(special, both, 2)[down] == "row_inside"
    assert styles(special, both, 2)["blocks.1.mlp.down.weight"] == "row"


@pytest.mark.parametrize(
    ("rows", "tensor", "value", "rule"),
    [
        (ROWS[:2], 2, "parameter norm [4]", "every parameter has a row"),
        (
            (*ROWS, Row("head.weight", "vocab"), Row("asked", "heads")),
            2,
            "rows of the tensor-parallel plan: head.weight, asked",
            "every row names a parameter",
        ),
        # A row behind one that takes all its parameters decides nothing.
        ((Row("*.weight", "col"), *ROWS), 2, ": *.up.weight, *.down.weight", "every row names"),
        (ROWS, 4, "up.weight [6, 4], style col, parallel.tensor=4", "tensor divides axis 0"),
        (ROWS, 3, "down.weight [6, 4], style row, parallel.tensor=3", "tensor divides axis 1"),
    ],
    ids=["no row", "no parameter", "covered", "outputs", "inputs"],
)
def test_a_plan_that_does_not_fit_names_what_does_not(
    rows: tuple[Row, ...], tensor: int, value: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        styles(rows, SHAPES, tensor)
    assert value in caught.value.value
    assert rule in caught.value.rule
