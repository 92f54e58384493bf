"""The loss curve of a run as a picture, from its metrics.jsonl. Imports no torch."""

from __future__ import annotations

import errno
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans_pretrain.errors import ConfigError, DataError, NodeError
from titans_pretrain.run.files import atomic_write
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING, VALIDATION = "train/loss", "validation/loss"

ONE_SET = re.compile(r"validation/(.+)/loss")

Curve = list[tuple[int, float]]


def plot_run(folder: Path, out: Path, baselines: Mapping[str, float]) -> str:
    """Draws the run in `folder` into the PNG `out`; returns what the picture shows, in words.

    `baselines`: losses of simple models on the validation split, by name; may be empty.

    Raises DataError if the run has recorded no loss, ConfigError or NodeError if `out` cannot be
    written.
    """
    path = RunFolder(folder).metrics
    try:
        records = list(read_records(path))
    except OSError as e:
        raise DataError(
            f"{path}: {e.strerror}", "a run folder holds metrics.jsonl", "name a run that has begun"
        ) from e
    training, validation = curve(records, TRAINING), curve(records, VALIDATION)
    if not training and not validation:
        raise DataError(
            f"{path}: {len(records)} records without {TRAINING} or {VALIDATION}",
            "a loss curve needs a recorded loss",
            "train at least log.every steps",
        )
    names = dict.fromkeys(name for record in records for name in record["values"])
    sets = {
        match[1]: curve(records, match[0]) for name in names if (match := ONE_SET.fullmatch(name))
    }
    figure = draw(training, validation, baselines, sets, title=folder.name)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    try:
        atomic_write(out, picture.getvalue())
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (NodeError if full else ConfigError)(
            f"writing {out}: {e.strerror}",
            "the picture is written into a folder that exists, may be written and has room",
            "give another place with --out",
        ) from e
    return "\n".join([*summary(training, validation, baselines, sets), f"curve: {out}"])


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """(step, value) of the records that hold `name`."""
    return [(r["step"], r["values"][name]) for r in records if name in r["values"]]


def smooth(values: Curve, side: int | None = None) -> Curve:
    """The mean of each value and of `side` neighbours on each side (default: 1/40 of all).

    Centred, so that it does not lag behind a steep start: there it takes in fewer, the same number
    on each side. At the end only the right side runs short.
    """
    side = max(1, len(values) // 40) if side is None else side
    sums = list(itertools.accumulate((v for _, v in values), initial=0.0))
    out = []
    for at, (step, _) in enumerate(values):
        first, end = max(at - side, 0), min(at + min(side, at) + 1, len(values))
        out.append((step, (sums[end] - sums[first]) / (end - first)))
    return out


def draw(
    training: Curve,
    validation: Curve,
    baselines: Mapping[str, float],
    sets: Mapping[str, Curve] | None = None,
    title: str = "",
) -> Figure:
    """The figure: training loss (faint, and smoothed), validation loss, baselines as lines; where
    there are several validation sets, the loss on each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen, whatever the environment says
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training), color="tab:blue", alpha=0.25, linewidth=0.8)
        smoothed = smooth(training)
        label = f"training, smoothed ({smoothed[-1][1]:.3f})"
        axes.plot(*zip(*smoothed), color="tab:blue", label=label)
    if validation:
        label = f"validation ({validation[-1][1]:.3f})"
        axes.plot(*zip(*validation), color="tab:orange", marker="o", ms=4, label=label)
    for name, points in (sets or {}).items():
        label = f"validation on {name} ({points[-1][1]:.3f})"
        axes.plot(*zip(*points), marker=".", ms=4, linewidth=0.9, label=label)
    for number, (name, loss) in enumerate(sorted(baselines.items(), key=lambda b: -b[1])):
        style = ("dashed", "dotted", "dashdot")[number % 3]
        label = f"{name} baseline ({loss:.3f})"
        axes.axhline(loss, color="dimgray", linestyle=style, linewidth=1.2, label=label)
    perplexity = axes.secondary_yaxis("right", functions=(_exp, _log))
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
    perplexity.yaxis.set_major_formatter("{x:,.0f}")
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.set_ylabel("perplexity")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _exp(loss: Any) -> Any:
    return np.exp(np.minimum(loss, 700.0))


def _log(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-300))


def summary(
    training: Curve,
    validation: Curve,
    baselines: Mapping[str, float],
    sets: Mapping[str, Curve] | None = None,
) -> list[str]:
    """The figures in words, one line each."""
    lines = []
    if training:
        (first, at), (last, end) = training[0], smooth(training)[-1]
        lines.append(f"training loss:   {at:.4f} (step {first}) -> {end:.4f} (step {last}, smooth)")
    for name, points in {"": validation, **(sets or {})}.items():
        if points:
            (last, end), (best_step, best) = points[-1], min(points, key=lambda point: point[1])
            what = f"  on {name}:" if name else "validation loss:"
            lines.append(
                f"{what:<16} {end:.4f} (step {last}), lowest {best:.4f} (step {best_step})"
            )
    for name, loss in sorted(baselines.items(), key=lambda b: -b[1]):
        line = f"{name + ' baseline:':<16} {loss:.4f}"
        if validation:
            difference = loss - validation[-1][1]
            line += f" ({abs(difference):.4f} {'above' if difference > 0 else 'below'} the run)"
        lines.append(line)
    return lines
