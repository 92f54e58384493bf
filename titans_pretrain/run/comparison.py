"""Several models side by side: the table and the curves of a study. Imports no torch."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.run.console import perplexity
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.plot import TRAINING, VALIDATION, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Outcome:
    """What one finished run of a study showed."""

    entry: str
    seed: int
    parameters: int
    flops: float  # of training, a token
    records: list[dict[str, Any]]  # of its metrics.jsonl

    @property
    def loss(self) -> float:
        """The last validation loss, nats a label."""
        return self.curve(VALIDATION)[-1][1]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(training tokens, value)."""
        return [(r["tokens"], r["values"][name]) for r in self.records if name in r["values"]]


def report(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Writes table.md, results.json and curves.png into `folder`; returns the table.

    Raises NodeError or ConfigError if they cannot be written.
    """
    text = table(outcomes)
    results = [
        {
            "entry": o.entry,
            "seed": o.seed,
            "parameters": o.parameters,
            "training_flops_per_token": o.flops,
            "validation": o.curve(VALIDATION),
        }
        for o in outcomes
    ]
    picture = io.BytesIO()
    draw(outcomes).savefig(picture, format="png", dpi=110, metadata={"Software": None})
    try:
        atomic_write(folder / "table.md", text + "\n")
        atomic_write(folder / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_write(folder / "curves.png", picture.getvalue())
    except OSError as e:
        raise storage_error(e, f"writing the report of {folder}", starting=True) from e
    return f"{text}\n\n{folder / 'table.md'}, results.json, curves.png"


def _by_entry(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.entry, []).append(outcome)
    return groups


def spread(values: Sequence[float], sign: bool = False) -> str:
    """Mean ± standard deviation (n - 1) of the values."""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table, one row an entry, in the order given; differences are paired by seed."""
    groups = _by_entry(outcomes)
    first = next(iter(groups))
    reference = {o.seed: o.loss for o in groups[first]}
    lines = [
        f"| model | parameters | training MFLOP a token | seeds | validation loss, nats a token "
        f"| perplexity | loss less {first}'s, same seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry, group in groups.items():
        losses = [o.loss for o in group]
        paired = [o.loss - reference[o.seed] for o in group if o.seed in reference]
        difference = spread(paired, sign=True) if paired and entry != first else ""
        lines.append(
            f"| {entry} | {group[0].parameters:,} | {group[0].flops / 1e6:.1f} | {len(group)} "
            f"| {spread(losses)} | {perplexity(statistics.mean(losses)):.2f} | {difference} |"
        )
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Training loss (smoothed) and validation loss by tokens: the mean of the seeds, and the range
    between the lowest and the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen, whatever the environment says
    training, validation = figure.subplots(1, 2)
    for number, (entry, group) in enumerate(_by_entry(outcomes).items()):
        colour = COLOURS[number % len(COLOURS)]
        for axes, name, marker in ((training, TRAINING, ""), (validation, VALIDATION, "o")):
            curves = [o.curve(name) for o in group]
            if name == TRAINING:
                curves = [smooth(c)[len(c) // 20 :] for c in curves]  # the first fall dwarfs all
            length = min(map(len, curves))
            tokens = [t for t, _ in curves[0][:length]]
            values = [[v for _, v in c[:length]] for c in curves]
            each = list(zip(*values, strict=True))
            label = f"{entry} ({statistics.mean(o.loss for o in group):.3f})"
            axes.plot(
                tokens, [statistics.mean(v) for v in each], color=colour, marker=marker, ms=4,
                linewidth=1.4, label=label,
            )  # fmt: skip
            low, high = [min(v) for v in each], [max(v) for v in each]
            axes.fill_between(tokens, low, high, color=colour, alpha=0.18, linewidth=0)
    training.set_title("training, smoothed")
    validation.set_title("validation (last value in the legend)")
    for axes in (training, validation):
        axes.set_xlabel("training tokens")
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.3)
    validation.legend()
    return figure
