"""The loss curve's numbers, and that a picture is drawn."""

import errno
import os
import subprocess
import sys

import pytest

from titans_pretrain.errors import ConfigError, DataError, NodeError
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics
from titans_pretrain.run.plot import draw, plot_run, smooth


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "demo")
    folder.path.mkdir()
    with Metrics(folder, 0, False) as metrics:
        for step in range(1, 11):
            values = {"train/loss": 6.0 - step / 10}
            if step % 5 == 0:
                values["validation/loss"] = 6.25 - step / 10
            metrics.write(step, step * 8, values)
    return folder


def test_the_summary_gives_the_curves_ends_and_the_baselines(run):
    out = run.path / "curve.png"
    lines = plot_run(run.path, out, {"bigram": 5.0, "unigram": 5.5}).splitlines()
    assert lines == [
        "training loss:   5.9000 (step 1) -> 5.0500 (step 10, smooth)",  # of steps 9 and 10
        "validation loss: 5.2500 (step 10), lowest 5.2500 (step 10)",
        "unigram baseline: 5.5000 (0.2500 above the run)",
        "bigram baseline: 5.0000 (0.2500 below the run)",
        f"curve: {out}",
    ]
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_figure_holds_the_curves_and_a_line_for_each_baseline():
    training, validation = [(1, 4.0), (2, 2.0), (3, 3.0)], [(2, 3.0)]
    axes = draw(training, validation, {"unigram": 5.0, "bigram": 3.5}).axes[0]
    drawn = [list(zip(*line.get_data())) for line in axes.lines]
    assert drawn[0] == training
    assert drawn[1] == smooth(training) == [(1, 4.0), (2, 3.0), (3, 2.5)]
    assert drawn[2] == validation
    assert [line.get_ydata()[0] for line in axes.lines[3:]] == [5.0, 3.5]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "training, smoothed (2.500)",
        "validation (3.000)",
        "unigram baseline (5.000)",
        "bigram baseline (3.500)",
    ]


def test_several_validation_sets_are_drawn_and_told(run):
    with Metrics(run, 10, False) as metrics:
        for step, wiki, books in ((11, 5.5, 4.0), (12, 5.0, 4.5)):
            values = {"validation/loss": (wiki + books) / 2}
            values |= {"validation/wiki/loss": wiki, "validation/books/loss": books}
            metrics.write(step, step * 8, {**values, "validation/wiki/perplexity": 1.0})
    lines = plot_run(run.path, run.path / "curve.png", {}).splitlines()
    assert lines[1:4] == [
        "validation loss: 4.7500 (step 12), lowest 4.7500 (step 11)",
        "  on wiki:       5.0000 (step 12), lowest 5.0000 (step 12)",
        "  on books:      4.5000 (step 12), lowest 4.0000 (step 11)",
    ]
    axes = draw([], [(2, 3.0)], {}, {"wiki": [(2, 4.0)], "books": [(2, 2.0)]}).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1:] == ["validation on wiki (4.000)", "validation on books (2.000)"]


def test_the_smoothed_curve_lags_behind_no_slope():
    line = [(step, 100.0 - step) for step in range(100)]
    smoothed = smooth(line, side=10)
    assert smoothed[:90] == [(s, pytest.approx(v)) for s, v in line[:90]]
    assert smoothed[-1] == (99, pytest.approx(1 + 10 / 2))  # the mean of the last eleven
    assert smooth([]) == []


def test_a_run_without_losses_is_a_data_error(tmp_path, run):
    with pytest.raises(DataError, match="No such file"):
        plot_run(tmp_path / "nowhere", tmp_path / "x.png", {})
    run.metrics.write_text("")
    with pytest.raises(DataError, match="0 records without"):
        plot_run(run.path, tmp_path / "x.png", {})


def test_a_picture_that_cannot_be_written_leaves_the_former_one(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"nowhere/x.png: No such file"):
        plot_run(run.path, tmp_path / "nowhere" / "x.png", {})
    out = tmp_path / "x.png"
    plot_run(run.path, out, {})
    before = out.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match=r"x.png: No space left"):
        plot_run(run.path, out, {"bigram": 5.0})
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x.png"]


def test_drawing_needs_no_torch_and_no_screen(run):
    code = (
        "import sys; from pathlib import Path; from titans_pretrain.cli import main\n"
        "code = main(['plot', '--no-baselines', sys.argv[1]])\n"
        "print('torch' in sys.modules); sys.exit(code)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[-1] == "False"
    assert (run.path / "loss.png").exists()
