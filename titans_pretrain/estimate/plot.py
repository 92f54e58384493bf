"""A plan's picture: what each layout holds, by kind, beside what a GPU has; and its time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from titans_pretrain.config import HardwareConfig
from titans_pretrain.estimate.choose import GIB, Candidate
from titans_pretrain.estimate.report import name

COLOURS = {
    "parameters": "#2b4c7e",
    "gradients": "#567ebb",
    "optimizer": "#606d80",
    "activations": "#d9822b",
    "memory states": "#b3472e",
    "logits": "#e3b23c",
    "buffers": "#a0a7b2",
    "working": "#cfd4da",
}


def draw(path: Path, shown: Sequence[Candidate], hardware: HardwareConfig) -> None:
    """Writes a PNG: a bar a layout, in the order given."""
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names = [name(c) for c in shown]
    left = [0.0] * len(shown)
    for kind, colour in COLOURS.items():
        sizes = [c.held.by_kind()[kind] / GIB for c in shown]
        axes.barh(range(len(shown)), sizes, left=left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, sizes)]
    room, whole = shown[0].room / GIB, hardware.memory_gib.value
    axes.axvline(room, color="black", linewidth=1)
    axes.axvspan(room, whole, color="black", alpha=0.08)
    # Bars that go far beyond what a GPU has would squeeze all others.
    axes.set_xlim(0, min(max([*left, whole]) * 1.03, 2 * whole))
    for row, (candidate, end) in enumerate(zip(shown, left)):
        words = f"{end:.1f} GiB, {candidate.pace.tokens_per_s:,.0f} tokens/s"
        beside = axes.get_yaxis_transform()
        axes.text(1.01, row, words, va="center", fontsize=8, transform=beside)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB of a GPU ({hardware.name}; the line: what tensors may take)")
    axes.legend(ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
