"""One continuous curve over resumes, in metrics.jsonl and as TensorBoard reads it."""

import io
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titans_pretrain.errors import NodeError
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics, read_records

TOKENS = 512  # a step


def _loss(step: int, life: int) -> float:
    return 1 / (3 * step + life)


def _write(folder, start, steps, life, *, tensorboard=True, every=1):
    with Metrics(folder, start, tensorboard) as metrics:
        for step in range(start + 1, steps + 1):
            if step % every == 0:
                scalars = {"train/loss": _loss(step, life), "lr": step / 7}
                metrics.write(step, step * TOKENS, scalars)


def _read(path):
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def _expected(cut, steps, every=1):
    """Steps up to `cut` as life 1 wrote them, the rest as life 2 did."""
    numbers = [s for s in range(1, steps + 1) if s % every == 0]
    return [(s, _loss(s, 1 if s <= cut else 2)) for s in numbers]


def _check(folder, expected):
    records = list(read_records(folder.metrics))
    assert [(r["step"], r["values"]["train/loss"]) for r in records] == expected  # unrounded
    assert [r["tokens"] for r in records] == [s * TOKENS for s, _ in expected]
    rounded = [(s, torch.tensor(v).item()) for s, v in expected]  # TensorBoard keeps fp32
    curves = _read(folder.tensorboard)
    assert curves["train/loss"] == rounded
    assert [s for s, _ in curves["lr"]] == [s for s, _ in expected]
    by_tokens = _read(folder.tensorboard / "by_tokens")
    assert by_tokens["by_tokens/train_loss"] == [(s * TOKENS, v) for s, v in rounded]
    assert set(by_tokens) == {"by_tokens/train_loss"}


def test_a_run_without_interruption(tmp_path):
    folder = RunFolder(tmp_path)
    _write(folder, 0, 12, life=1)
    _check(folder, _expected(12, 12))
    lines = folder.metrics.read_text().splitlines()
    record = json.loads(lines[6])
    assert set(record) == {"step", "tokens", "time", "values"}
    assert record["values"] == {"train/loss": 1 / 22, "lr": 1.0}


@pytest.mark.parametrize(("cut", "every"), [(5, 1), (7, 1), (5, 3), (2, 3), (10, 1)])
def test_a_resumed_run_is_one_curve_without_doubled_steps(tmp_path, cut, every):
    folder = RunFolder(tmp_path)
    _write(folder, 0, 10, life=1, every=every)
    _write(folder, cut, 15, life=2, every=every)
    _check(folder, _expected(cut, 15, every))


def test_many_resumes_within_a_second(tmp_path):
    folder = RunFolder(tmp_path)
    _write(folder, 0, 6, life=1)
    for _ in range(3):
        _write(folder, 3, 6, life=1)
    _write(folder, 4, 8, life=2)
    _check(folder, _expected(4, 8))


def test_a_start_from_scratch_in_an_old_folder_hides_everything_old(tmp_path):
    folder = RunFolder(tmp_path)
    with Metrics(folder, 0, True) as metrics:
        metrics.write(0, 0, {"train/loss": 9.0, "lr": 0.0})
        metrics.write(4, 4 * TOKENS, {"train/loss": 9.0, "lr": 0.0})
    _write(folder, 0, 3, life=1)
    _check(folder, _expected(3, 3))


def test_kill_9_loses_no_written_record_and_a_torn_end_is_tolerated(tmp_path):
    script = """
import os, signal, sys
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics
metrics = Metrics(RunFolder(sys.argv[1]), 0, True)
for step in range(1, 9):
    metrics.write(step, step * 512, {"train/loss": 1 / (3 * step + 1), "lr": step / 7})
os.kill(os.getpid(), signal.SIGKILL)
"""
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120)
    assert out.returncode == -signal.SIGKILL
    folder = RunFolder(tmp_path)
    _check(folder, _expected(8, 8))
    # What a kill in the middle of a write leaves: half a line, half an event.
    with folder.metrics.open("a") as file:
        file.write('{"step": 9, "tokens": 46')
    for events in (*tmp_path.glob("tensorboard/events.*"), *tmp_path.glob("*/by_tokens/events.*")):
        with events.open("ab") as file:
            file.write(events.read_bytes()[-60:-20])
    assert [r["step"] for r in read_records(folder.metrics)] == list(range(1, 9))
    _write(folder, 6, 10, life=2)
    _check(folder, _expected(6, 10))


def test_without_tensorboard_no_event_is_written_and_the_lines_are_the_same(tmp_path):
    folder = RunFolder(tmp_path)
    _write(folder, 0, 5, life=1, tensorboard=False)
    _write(folder, 2, 5, life=2, tensorboard=False)
    assert [(r["step"], r["values"]["train/loss"]) for r in read_records(folder.metrics)] == (
        _expected(2, 5)
    )
    assert not folder.tensorboard.exists()


def test_histograms_and_images_reach_tensorboard(tmp_path):
    folder = RunFolder(tmp_path)
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with Metrics(folder, 0, True) as metrics:
        metrics.write(2, 8, {"a": math.nan}, {"gate": torch.tensor([1.0, 3.0])}, {"map": image})
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    value = events.Histograms("gate")[0]
    assert (value.step, value.histogram_value.num, value.histogram_value.sum) == (2, 2.0, 4.0)
    shown = events.Images("map")[0]
    assert shown.step == 2
    png = Image.open(io.BytesIO(shown.encoded_image_string))
    assert np.array_equal(np.asarray(png), image)
    assert math.isnan(next(read_records(folder.metrics))["values"]["a"])


def test_an_older_life_that_still_writes_is_not_seen(tmp_path):
    folder = RunFolder(tmp_path)
    with Metrics(folder, 0, False) as old:
        old.write(1, 1, {"x": 1.0})
        with Metrics(folder, 1, False) as new:
            old.write(2, 2, {"x": -1.0})
            new.write(2, 2, {"x": 2.0})
    assert [r["values"]["x"] for r in read_records(folder.metrics)] == [1.0, 2.0]


def test_a_full_disk_is_a_node_error_and_leaves_whole_lines(tmp_path):
    """A real refusal by the kernel: files may not grow beyond a few hundred bytes more."""
    script = """
import resource, sys
from titans_pretrain.errors import NodeError
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics
folder = RunFolder(sys.argv[1])
with Metrics(folder, 0, sys.argv[2] == "tensorboard") as metrics:
    if sys.argv[2] == "tensorboard":
        metrics._records.append = lambda record: None  # leaves TensorBoard's files alone to refuse
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        for step in range(1, 100):
            metrics.write(step, step * 512, {"train/loss": 1 / (3 * step + 1), "lr": step / 7})
    except NodeError as e:
        print(step, e.exit_code, "free space" in str(e))
"""
    told = {}
    for mode in ("lines", "tensorboard"):
        folder = RunFolder(tmp_path / mode)
        folder.path.mkdir()
        out = subprocess.run(
            [sys.executable, "-c", script, str(folder.path), mode],
            capture_output=True,
            text=True,
            timeout=120,
        )
        step, *told[mode] = out.stdout.split()
        assert told[mode] == ["76", "True"], out.stderr
        assert 2 < int(step) < 40
        if mode == "lines":
            assert folder.metrics.read_text().endswith("\n")
            assert [r["step"] for r in read_records(folder.metrics)] == list(range(1, int(step)))
    folder = RunFolder(tmp_path / "lines")
    _write(folder, 3, 10, life=2, tensorboard=False)
    assert [r["step"] for r in read_records(folder.metrics)] == list(range(1, 11))


def test_a_folder_that_is_missing_is_a_node_error(tmp_path):
    with pytest.raises(NodeError, match="No such file"):
        Metrics(RunFolder(tmp_path / "gone"), 0, False)
