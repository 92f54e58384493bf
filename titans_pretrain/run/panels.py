"""Pictures of the memories, head by head: which learn, which are dead, which diverge.

`draw_heads` shows one recording, blocks by heads; `draw_history` the last recordings, a row a head.
Drawn by hand from images: matplotlib's own colour bars would take most of the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import Lines, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Heads = Mapping[str, Mapping[str, Sequence[float]]]  # layer -> figure -> [H]

LONGEST = 120  # recordings that a history shows
DEAD = 0.01  # a head whose learning takes less than this off its surprise does nothing
CONDITIONS = ("dead", "learns", "diverges")
_COLOURS = ("#9e9e9e", "#66bb6a", "#e53935")


@dataclass(frozen=True)
class Panel:
    """How one figure is shown. `high` None: the largest value; `signed`: from -high to high."""

    figure: str
    title: str
    high: float | None = None
    signed: bool = False


PANELS = (
    Panel("gain", "gain: surprise taken off", signed=True),
    Panel("surprise", "surprise |2(M(k) - v)|"),
    Panel("theta", "theta: step"),
    Panel("alpha", "alpha: forgetting"),
    Panel("eta", "eta: momentum kept", high=1.0),
    Panel("momentum", "momentum |S|"),
    Panel("drift", "drift |W - W0| / |W0|"),
    Panel("radius", "stability radius (< 1)", high=1.0),
)
HISTORY = ("gain", "theta", "alpha", "drift")


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


def draw(records: Sequence[Record]) -> dict[str, Figure]:
    """tag -> picture, of the last recordings."""
    pictures = {"memory/heads": draw_heads(records[-1])}
    if len(records) > 1:
        pictures["memory/history"] = draw_history(records)
    return pictures


def draw_heads(record: Record) -> Figure:
    """The condition of every head, and each figure: blocks from top to bottom, heads across."""
    heads: Heads = record["heads"]
    rows = max(2.0, min(4.5, 0.28 * len(heads)))  # inches of one map
    figure, places = _grid(3, 3, rows, f"memory of each block and head, step {record['step']:,}")
    state = np.array([condition(figures) for figures in heads.values()], float)
    names = [_short(layer) for layer in heads]
    _map(figure, places[0], state, "condition", (0, 2), "conditions")
    _blocks_by_heads(figure.axes[0], names)
    for place, panel in zip(places[1:], PANELS, strict=True):
        values = np.array([figures[panel.figure] for figures in heads.values()], float)
        axes = _map(figure, place, values, panel.title, *_scale(panel, values))
        _blocks_by_heads(axes, names)
    return figure


def draw_history(records: Sequence[Record]) -> Figure:
    """The last recordings from left to right; a row is a head, blocks lie below one another."""
    layers = list(records[-1]["heads"])
    width = len(next(iter(records[-1]["heads"][layers[0]].values())))
    rows = max(2.0, min(7.0, 0.11 * len(layers) * width))
    figure, places = _grid(2, 2, rows, "memory of each head over the run")
    panels = {panel.figure: panel for panel in PANELS}
    steps = [record["step"] for record in records]
    for place, name in zip(places, HISTORY, strict=True):
        values = np.array(
            [[x for layer in layers for x in r["heads"][layer][name]] for r in records], float
        ).T
        axes = _map(figure, place, values, panels[name].title, *_scale(panels[name], values))
        at = sorted({round(i * (len(steps) - 1) / 3) for i in range(4)})
        axes.set_xticks(at, [f"{steps[i]:,}" for i in at])
        axes.set_xlabel("step", fontsize=8)
        shown = _few(len(layers))
        axes.set_yticks(
            [(i + 0.5) * width - 0.5 for i in shown], [_short(layers[i]) for i in shown]
        )
        axes.set_ylabel("block, its heads", fontsize=8)
        for i in range(1, len(layers)):
            axes.axhline(i * width - 0.5, color="white", linewidth=0.6)
    return figure


Place = tuple[float, float, float, float]  # left, bottom, width, height in parts of the figure


def _grid(across: int, down: int, rows: float, title: str) -> tuple[Figure, list[Place]]:
    """A figure, and where its maps of `rows` inches lie, from the upper left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (9.0, 0.4 + down * (rows + 0.75))
    figure = Figure(figsize=size, dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / size[1], va="top")
    cell = 1 / across
    places = [
        (
            (i + 0.15) * cell,
            1 - (0.4 + (j + 1) * (rows + 0.75) - 0.45) / size[1],
            (0.6 if across == 3 else 0.68) * cell,
            rows / size[1],
        )
        for j in range(down)
        for i in range(across)
    ]
    return figure, places


def _scale(panel: Panel, values: NDArray[np.float64]) -> tuple[tuple[float, float], str]:
    """(lowest, highest) and the colours."""
    finite = np.abs(values[np.isfinite(values)])
    high = panel.high or max(float(finite.max(initial=0.0)), 1e-12)
    if panel.signed:
        high = max(high, 5 * DEAD)
        return (-high, high), "RdBu"
    return (0.0, high), "viridis"


def _map(
    figure: Figure,
    place: Place,
    values: NDArray[np.float64],
    title: str,
    limits: tuple[float, float],
    colours: str,
) -> Axes:
    """An image with its colour bar: red beyond the limits, black where there is no number."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    listed = colours == "conditions"
    shades: Any = ListedColormap(_COLOURS) if listed else colormaps[colours]
    over = _COLOURS[2] if colours == "viridis" else None
    shades = shades.with_extremes(bad="black", over=over)
    low, high = limits
    look: dict[str, Any] = {"cmap": shades, "vmin": low, "vmax": high, "interpolation": "nearest"}
    axes = figure.add_axes(place)
    axes.imshow(values, aspect="auto", **look)
    axes.set_title(title, fontsize=9, pad=4)
    axes.tick_params(labelsize=8, length=2, pad=2)
    left, bottom, width, height = place
    inch = 1 / figure.get_figwidth()
    bar = figure.add_axes((left + width + 0.06 * inch, bottom, 0.1 * inch, height))
    shade = np.arange(3.0) if listed else np.linspace(low, high, 64)
    bar.imshow(shade[:, None], aspect="auto", origin="lower", **look)
    last = len(shade) - 1
    labels = CONDITIONS if listed else [f"{x:.2g}" for x in (low, (low + high) / 2, high)]
    bar.set_yticks([0, last / 2, last], labels)
    bar.set_xticks([])
    bar.tick_params(labelsize=8, length=2, pad=2, left=False, labelleft=False, right=True)
    bar.tick_params(labelright=True)
    return axes


def _blocks_by_heads(axes: Axes, names: Sequence[str]) -> None:
    heads = axes.images[0].get_size()[1]
    axes.set_xticks(_few(heads))
    shown = _few(len(names))
    axes.set_yticks(shown, [names[i] for i in shown])
    axes.set_xlabel("head", fontsize=8, labelpad=1)
    axes.set_ylabel("block", fontsize=8, labelpad=1)


def _few(count: int, most: int = 8) -> list[int]:
    """At most `most` of 0 .. count - 1, evenly spaced."""
    return list(range(0, count, -(-count // most)))


def _short(layer: str) -> str:
    """blocks.3.mixer.memory -> 3"""
    return layer.removesuffix(".mixer.memory").removeprefix("blocks.")
