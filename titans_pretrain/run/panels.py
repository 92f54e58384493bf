"""Pictures of the memories, head by head: which learn, which are dead, which diverge.

For each figure of an observation one picture of the last recording, blocks by heads, and for some
the last recordings beside each other, a row a head. Each is as wide as TensorBoard shows it. Drawn
with Pillow: matplotlib would take ten times as long, and the ranks wait meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import Lines, Record

Heads = Mapping[str, Mapping[str, Sequence[float]]]  # layer -> figure -> [H]
Values = NDArray[np.float64]  # [rows, columns]
Picture = NDArray[np.uint8]  # [rows, columns, 3]

LONGEST = 120  # recordings that a history shows
DEAD = 0.01  # a head whose learning takes less than this off its surprise does nothing
CONDITIONS = ("dead", "learns", "diverges")

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 350, 44, 80, 26, 34  # dots: a picture, and its margins
STATES = ((158, 158, 158), (102, 187, 106), (229, 57, 53))  # colours of CONDITIONS
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
RED_BLUE = ((103, 0, 31), (214, 96, 77), (247, 247, 247), (67, 147, 195), (5, 48, 97))


@dataclass(frozen=True)
class Panel:
    """How one figure is shown. `high` None: the largest value; `signed`: from -high to high."""

    figure: str
    title: str
    high: float | None = None
    signed: bool = False
    history: bool = False


CONDITION = Panel("condition", "condition", history=True)
PANELS = (
    Panel("gain", "gain: surprise taken off", signed=True, history=True),
    Panel("surprise", "surprise |2 (M(k) - v)|"),
    Panel("theta", "theta: step", history=True),
    Panel("alpha", "alpha: forgetting", history=True),
    Panel("eta", "eta: momentum kept", high=1.0),
    Panel("momentum", "momentum |S|"),
    Panel("drift", "drift |W - W0| / |W0|", history=True),
    Panel("radius", "stability radius (stable < 1)", high=1.0),
)


def condition(figures: Mapping[str, Sequence[float]]) -> list[int]:
    """For each head of a layer an index of CONDITIONS.

    It diverges where a figure is not finite, a chunk is unstable (radius 1 or more) or learning
    adds to its surprise; it is dead where learning neither adds nor takes off `DEAD` of it.
    """
    out = []
    for head, (gain, radius) in enumerate(zip(figures["gain"], figures["radius"], strict=True)):
        finite = all(math.isfinite(values[head]) for values in figures.values())
        if not finite or radius >= 1 or gain <= -DEAD:
            out.append(2)
        else:
            out.append(0 if gain < DEAD else 1)
    return out


def health(heads: Heads) -> dict[str, float]:
    """Of how many heads, over all layers: {"dead_heads": .., "diverging_heads": ..}."""
    found = [c for figures in heads.values() for c in condition(figures)]
    return {"dead_heads": float(found.count(0)), "diverging_heads": float(found.count(2))}


class MemoryRecords:
    """memory.jsonl, `{"step", "tokens", "heads": {layer: {figure: [H]}}}` a line, and its end."""

    def __init__(self, folder: RunFolder, start_step: int) -> None:
        self._lines = Lines(folder.memory, start_step)
        kept = [record for record in self._lines.kept if "heads" in record]
        self.last: deque[Record] = deque(kept, maxlen=LONGEST)

    def append(self, step: int, tokens: int, heads: Heads) -> None:
        """Raises NodeError if the disk refuses."""
        rounded = {
            layer: {name: [float(f"{x:.5g}") for x in values] for name, values in figures.items()}
            for layer, figures in heads.items()
        }
        record = {"step": step, "tokens": tokens, "heads": rounded}
        self._lines.append(record)
        self.last.append(record)

    def close(self) -> None:
        self._lines.close()


def draw(records: Sequence[Record]) -> dict[str, Picture]:
    """tag -> picture of `records`, the last recordings."""
    pictures = {}
    for panel in (CONDITION, *PANELS):
        pictures[f"memory_heads/{panel.figure}"] = draw_heads(panel, records[-1])
        if panel.history and len(records) > 1:
            pictures[f"memory_history/{panel.figure}"] = draw_history(panel, records)
    # The one to look at first: TensorBoard sorts by name.
    return {_first(tag): picture for tag, picture in pictures.items()}


def _first(tag: str) -> str:
    """memory_heads/condition -> memory/condition_heads"""
    kind, _, figure = tag.removeprefix("memory_").partition("/")
    return f"memory/{figure}_{kind}" if figure == CONDITION.figure else tag


def draw_heads(panel: Panel, record: Record) -> Picture:
    """One recording: blocks from top to bottom, heads from left to right."""
    heads: Heads = record["heads"]
    values = np.array([_values(panel, figures) for figures in heads.values()], float)
    names = [_short(layer) for layer in heads]
    return paint(
        panel,
        values,
        title=f"{panel.title}, step {record['step']:,}",
        height=min(400, max(190, 16 * len(heads))),
        across=("head", {i: str(i) for i in _few(values.shape[1])}),
        down=("block", {i: names[i] for i in _few(len(names))}),
    )


def draw_history(panel: Panel, records: Sequence[Record]) -> Picture:
    """The recordings from left to right; a row is a head, blocks lie below one another."""
    layers = list(records[-1]["heads"])
    columns = [[_values(panel, r["heads"][layer]) for layer in layers] for r in records]
    by_layer = np.array(columns, float)  # [recordings, layers, H]
    width = by_layer.shape[2]
    shown = sorted({round(i * (len(records) - 1) / 3) for i in range(4)})
    return paint(
        panel,
        by_layer.reshape(len(records), -1).T,
        title=panel.title,
        height=min(600, max(190, 3 * len(layers) * width)),
        across=("step", {i: f"{records[i]['step']:,}" for i in shown}),
        down=(
            "block, its heads",
            {(i + 0.5) * width - 0.5: _short(layers[i]) for i in _few(len(layers))},
        ),
        lines=[i * width for i in range(1, len(layers))],
    )


def _values(panel: Panel, figures: Mapping[str, Sequence[float]]) -> Sequence[float]:
    return condition(figures) if panel is CONDITION else figures[panel.figure]


Axis = tuple[str, Mapping[float, str]]  # its name, and its labels at rows or columns


def paint(
    panel: Panel,
    values: Values,
    *,
    title: str,
    height: int,
    across: Axis,
    down: Axis,
    lines: Sequence[int] = (),
) -> Picture:
    """A map of `values` [rows, columns], `height` dots high, with its axes and colour bar; white
    lines above the rows `lines`."""
    from PIL import Image, ImageDraw, ImageFont

    low, high = limits(panel, values)
    image = Image.new("RGB", (WIDTH, height + TOP + BOTTOM), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    right, end = WIDTH - RIGHT, TOP + height

    def place(picture: Picture, box: tuple[int, int, int, int]) -> None:
        whole = Image.fromarray(picture)
        image.paste(whole.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST), box)
        pen.rectangle((box[0] - 1, box[1] - 1, box[2], box[3]), outline="black")

    place(shades(panel, values), (LEFT, TOP, right, end))
    for row in lines:
        y = TOP + height * row / len(values)
        pen.line((LEFT, y, right - 1, y), fill="white")
    pen.text(((LEFT + right) / 2, TOP / 2), title, "black", ImageFont.load_default(12), "mm")
    for at, label in across[1].items():
        x = LEFT + (right - LEFT) * (at + 0.5) / values.shape[1]
        pen.line((x, end, x, end + 3), fill="black")
        pen.text((x, end + 5), label, "black", font, "mt")
    pen.text(((LEFT + right) / 2, end + BOTTOM - 4), across[0], "black", font, "mb")
    for at, label in down[1].items():
        y = TOP + height * (at + 0.5) / len(values)
        pen.line((LEFT - 4, y, LEFT - 1, y), fill="black")
        pen.text((LEFT - 6, y), label, "black", font, "rm")
    upright = Image.new("RGB", (height, 14), "white")
    ImageDraw.Draw(upright).text((height / 2, 7), down[0], "black", font, "mm")
    image.paste(upright.rotate(90, expand=True), (2, TOP))

    listed = panel is CONDITION
    ramp = np.arange(2.0, -1, -1) if listed else np.linspace(high, low, 64)
    place(shades(panel, ramp[:, None], (low, high)), (right + 6, TOP, right + 16, end))
    for i, value in enumerate((high, (low + high) / 2, low)):
        y = TOP + height * ((2 * i + 1) / 6 if listed else i / 2)
        label = CONDITIONS[2 - i] if listed else f"{value:.2g}"
        pen.line((right + 16, y, right + 19, y), fill="black")
        pen.text((right + 21, y), label, "black", font, "lm")
    return np.asarray(image)


def limits(panel: Panel, values: Values) -> tuple[float, float]:
    """The values at the ends of the colour bar."""
    if panel is CONDITION:
        return 0.0, 2.0
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    if panel.signed:
        largest = max(largest, 5 * DEAD)
        return -largest, largest
    return 0.0, panel.high or max(largest, 1e-12)


def shades(panel: Panel, values: Values, ends: tuple[float, float] | None = None) -> Picture:
    """The colours of values [rows, columns]: beyond the limits red, what is no number black."""
    low, high = ends or limits(panel, values)
    table = STATES if panel is CONDITION else RED_BLUE if panel.signed else VIRIDIS
    place = (np.nan_to_num(values) - low) / (high - low) * (len(table) - 1)
    colours = np.stack([np.interp(place, range(len(table)), c) for c in zip(*table)], axis=-1)
    colours[values > high] = STATES[2]
    colours[~np.isfinite(values)] = 0
    return colours.round().astype(np.uint8)


def _few(count: int, most: int = 8) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spaced."""
    return list(range(0, count, -(-count // most)))


def _short(layer: str) -> str:
    """blocks.3.mixer.memory -> 3"""
    return layer.removesuffix(".mixer.memory").removeprefix("blocks.")
