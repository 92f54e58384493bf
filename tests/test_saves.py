"""A run that saves behind its training: the same checkpoints, and what happens when one fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, ConfigError, NodeError, TitansError
from titans_pretrain.run import checkpoint
from titans_pretrain.run.metrics import read_records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def small(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "model__variant": "transformer",
        "train__steps": 6,
        "validation__every": 0,
        "checkpoint__every_steps": 1,
        "checkpoint__keep_last": 9,
    }
    return small_run(folder, data, **{**settings, **changes})


def train(tree: dict[str, Any], stop_after: int | None = None) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"), stop_after=stop_after)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["values"]["train/loss"]) for r in read_records(folder / "metrics.jsonl")]


def test_both_modes_save_the_same_and_go_on_from_each_other(data: Path, tmp_path: Path) -> None:
    trees = {
        name: small(tmp_path / name, data, checkpoint__mode=mode)
        for name, mode in (("behind", "async"), ("at once", "sync"), ("by turns", "async"))
    }
    for name in ("behind", "at once"):
        assert run_world(train, 2, trees[name]) == [EXIT_DONE] * 2
    assert run_world(train, 2, trees["by turns"], 3) == [EXIT_SAVED] * 2
    trees["by turns"]["checkpoint"]["mode"] = "sync"
    assert run_world(train, 2, trees["by turns"]) == [EXIT_DONE] * 2
    assert losses(tmp_path / "behind") == losses(tmp_path / "at once")
    assert losses(tmp_path / "behind") == losses(tmp_path / "by turns")
    found = {name: tmp_path / name / "checkpoints" for name in trees}
    for name in trees:
        assert checkpoint.list_steps(found[name]) == [1, 2, 3, 4, 5, 6]
    contents = set()
    for step in range(1, 7):
        folders = [checkpoint.folder_of(found[name], step) for name in trees]
        (sums, *others) = [json.loads((f / "checksums.json").read_text()) for f in folders]
        assert len(sums) == 4
        for other in others:  # state.json has times and the mode
            assert {**other, "state.json": ""} == {**sums, "state.json": ""}
        contents |= {checkpoint.content_sha256(f) for f in folders}
    assert len(contents) == 6


@pytest.mark.parametrize(
    "layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"zero": {"stage": 3}}], ids=str
)
def test_both_modes_save_the_same_in_any_layout(
    layout: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    saved = []
    for mode in ("async", "sync"):
        folder = tmp_path / mode
        tree = small(folder, data, checkpoint__mode=mode, train__steps=3, parallel=layout)
        assert run_world(train, 2, tree) == [EXIT_DONE] * 2
        folders = [checkpoint.folder_of(folder / "checkpoints", step) for step in (1, 2, 3)]
        sums = [json.loads((f / "checksums.json").read_text()) for f in folders]
        saved.append([{**s, "state.json": ""} for s in sums])
    assert saved[0] == saved[1] and len(saved[0][0]) == 4


def fail(tree: dict[str, Any], how: str) -> tuple[type, str, int]:
    """Trains until a save fails behind it: (the error's kind, its message, steps recorded)."""
    write = torch.save
    if how == "full disk" and int(os.environ["RANK"]) == 1:
        second = Path(tree["folder"], "checkpoints", "step-00000002")

        def full(*args: Any) -> None:
            if second.exists():
                raise OSError(28, "No space left on device")
            write(*args)

        torch.save = full
    if how == "newer life" and int(os.environ["RANK"]) == 0:
        text = checkpoint._write

        def taken(path: Path, content: str) -> None:
            """Between the beginning of the third save and its publication."""
            if "step-00000003" in str(path):
                Path(tree["folder"], "lock.000007").touch()
            text(path, content)

        checkpoint._write = taken
    try:
        train(tree)
    except TitansError as e:
        return type(e), str(e), len(losses(Path(tree["folder"])))
    finally:
        torch.save = write
    raise AssertionError("trained to the end")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("full disk", NodeError, "No space left on device"),
        ("newer life", ConfigError, "no longer belongs to life 1 (newest claim: life 7)"),
    ],
)
def test_a_save_that_fails_behind_ends_the_run_on_every_rank_and_keeps_the_last_one(
    how: str, kind: type, message: str, data: Path, tmp_path: Path
) -> None:
    tree = small(tmp_path / "run", data, train__steps=10_000)
    results = run_world(fail, 2, tree, how)
    assert results[0] == results[1]
    found, text, steps = results[0]
    assert found is kind and message in text
    assert 3 <= steps <= 5, "at the next step, or the next save"
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoint.verify(checkpoints / "step-00000002")["step"] == 2
