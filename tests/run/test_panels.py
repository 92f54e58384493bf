"""Which heads count as dead or diverging, and what the pictures show of them."""

import math

import numpy as np
import pytest

from titans_pretrain.run import panels
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.panels import MemoryRecords, condition, draw, health

FIGURES = [panel.figure for panel in panels.PANELS]


def figures(**changes: list[float]) -> dict[str, list[float]]:
    """Three heads that learn, apart from `changes`."""
    well = {name: [0.3, 0.4, 0.5] for name in (*FIGURES, "surprise_untrained")}
    return {**well, **changes}


def record(step: int, heads: dict) -> dict:
    return {"step": step, "tokens": step * 10, "heads": heads}


LAYER = "blocks.{}.mixer.memory".format


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, [1, 1, 1]),
        ({"gain": [0.0, 0.009, 0.011]}, [0, 0, 1]),
        ({"gain": [-0.009, -0.011, 0.5]}, [0, 2, 1]),
        ({"radius": [0.999, 1.0, 3.0]}, [1, 2, 2]),
        ({"drift": [math.nan, 1.0, math.inf], "gain": [0.0, 0.0, 0.0]}, [2, 0, 2]),
    ],
)
def test_the_condition_of_heads(changes, found):
    assert condition(figures(**changes)) == found


def test_health_counts_over_layers():
    heads = {LAYER(0): figures(gain=[0, 0, 1]), LAYER(1): figures(radius=[2, 0, 0], gain=[0, 0, 0])}
    assert health(heads) == {"dead_heads": 4.0, "diverging_heads": 1.0}


GREY, GREEN, RED, BLACK = (158, 158, 158), (102, 187, 106), (229, 57, 53), (0, 0, 0)


def cells(picture, rows, columns):
    """The colour in the middle of each cell of a picture's map."""
    height = picture.shape[0] - panels.TOP - panels.BOTTOM
    width = picture.shape[1] - panels.LEFT - panels.RIGHT
    return [
        [
            tuple(
                picture[
                    panels.TOP + int(height * (i + 0.5) / rows),
                    panels.LEFT + int(width * (j + 0.5) / columns),
                ].tolist()
            )
            for j in range(columns)
        ]
        for i in range(rows)
    ]


def test_pictures_show_blocks_heads_and_recordings_in_their_places():
    heads = {LAYER(0): figures(), LAYER(1): figures(gain=[0.0, 0.2, -0.3], radius=[0.1, 0.2, 1.5])}
    pictures = draw([record(50, {**heads, LAYER(1): figures()}), record(100, heads)])
    assert sorted(pictures) == sorted(
        ["memory/condition_heads", "memory/condition_history"]
        + [f"memory_heads/{name}" for name in FIGURES]
        + [f"memory_history/{name}" for name in ("gain", "theta", "alpha", "drift")]
    )
    shown = cells(pictures["memory/condition_heads"], 2, 3)
    assert shown == [[GREEN] * 3, [GREY, GREEN, RED]]
    shown = cells(pictures["memory/condition_history"], 6, 2)
    assert shown == [[GREEN, GREEN]] * 3 + [[GREEN, GREY], [GREEN, GREEN], [GREEN, RED]]
    shown = cells(pictures["memory_heads/radius"], 2, 3)
    assert shown[1][2] == RED and len({*shown[0], *shown[1]}) == 6
    shown = cells(pictures["memory_heads/gain"], 2, 3)
    assert shown[0][2] == (5, 48, 97) and shown[1][0] == (247, 247, 247)
    assert shown[1][1][2] > shown[1][1][0] and shown[1][2][0] > shown[1][2][2]  # blue; red


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.5, 2.0], (0, 2)), ([0.0, 0.0], (0, 1e-12)), ([math.nan, math.inf], (0, 1e-12))],
)
def test_colours_go_from_nothing_to_the_largest(values, ends):
    panel, array = panels.Panel("drift", "drift"), np.array([values])
    assert panels.limits(panel, array) == ends
    colours = panels.shades(panel, array)[0].tolist()
    expected = {0.5: (59, 82, 139), 2.0: (253, 231, 37), 0.0: (68, 1, 84)}
    assert [tuple(c) for c in colours] == [expected.get(v, BLACK) for v in values]


@pytest.mark.parametrize(("layers", "heads", "recordings"), [(1, 1, 1), (4, 4, 2), (24, 16, 120)])
def test_nothing_is_cut_off(layers, heads, recordings):
    wide = np.linspace(1e-6, 12345.678, heads).tolist()
    one = {LAYER(i): dict.fromkeys((*FIGURES, "surprise_untrained"), wide) for i in range(layers)}
    for name, picture in draw([record(1_000_000 + i, one) for i in range(recordings)]).items():
        assert picture.shape[1] == panels.WIDTH
        edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        assert all((edge == 255).all() for edge in edges), name


def test_records_go_on_where_the_run_does(tmp_path):
    folder = RunFolder(tmp_path)
    records = MemoryRecords(folder, 0)
    for step in (10, 20, 30):
        records.append(step, step, {LAYER(0): figures(gain=[step / 3, 0, 0])})
    records.close()
    records = MemoryRecords(folder, 20)
    assert [r["step"] for r in records.last] == [10, 20]
    assert records.last[0]["heads"][LAYER(0)]["gain"] == [3.3333, 0, 0]
    records.append(30, 30, {LAYER(0): figures()})
    assert [r["step"] for r in records.last] == [10, 20, 30]
    records.close()
    again = MemoryRecords(folder, 0)
    assert list(again.last) == []
    again.close()
