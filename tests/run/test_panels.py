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


def test_pictures_hold_the_values_by_block_and_head():
    heads = {LAYER(0): figures(), LAYER(1): figures(gain=[0.0, 0.2, -0.3], radius=[0.1, 0.2, 1.5])}
    pictures = draw([record(50, {**heads, LAYER(1): figures()}), record(100, heads)])
    assert list(pictures) == ["memory/heads", "memory/history"]
    shown = {a.get_title(): a for a in pictures["memory/heads"].axes if a.get_title()}
    assert shown["condition"].images[0].get_array().tolist() == [[1, 1, 1], [0, 1, 2]]
    titles = {panel.figure: panel.title for panel in panels.PANELS}
    gain, radius = shown[titles["gain"]].images[0], shown[titles["radius"]].images[0]
    assert gain.get_array().tolist() == [[0.3, 0.4, 0.5], [0.0, 0.2, -0.3]]
    assert gain.get_clim() == (-0.5, 0.5)
    assert radius.get_clim() == (0, 1)
    red = (229 / 255, 57 / 255, 53 / 255)
    assert radius.to_rgba(radius.get_array())[1, 2, :3] == pytest.approx(red)
    past = {a.get_title(): a for a in pictures["memory/history"].axes if a.get_title()}
    rows = past[titles["gain"]].images[0].get_array()
    assert rows.tolist() == [[0.3, 0.3], [0.4, 0.4], [0.5, 0.5], [0.3, 0], [0.4, 0.2], [0.5, -0.3]]


@pytest.mark.parametrize(("layers", "heads", "recordings"), [(1, 1, 1), (4, 4, 2), (24, 16, 120)])
def test_nothing_is_cut_off(layers, heads, recordings):
    values = np.linspace(1e-6, 12345.678, heads).tolist()
    one = {LAYER(i): dict.fromkeys((*FIGURES, "surprise_untrained"), values) for i in range(layers)}
    pictures = draw([record(1_000_000 + i, one) for i in range(recordings)])
    for name, picture in pictures.items():
        picture.canvas.draw()
        inside = picture.bbox
        for axes in picture.axes:
            box = axes.get_tightbbox(picture.canvas.get_renderer())
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1, (name, axes.get_title())
            assert inside.y0 <= box.y0 and box.y1 <= inside.y1, (name, axes.get_title())


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
