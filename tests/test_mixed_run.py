"""A whole run over two sources and two validation sets: its figures, ranks, resume, refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.data.made import made
from tests.prepared import small_run
from tests.test_resume import content, train
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED
from titans_pretrain.run.metrics import read_records

STEPS = 12
MODEL = b"stands for a tokenizer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`narrow` draws from two ids, `wide` from 190; `other` is for validation alone."""
    root = tmp_path_factory.mktemp("made")
    ranges = {"narrow": (4, 6), "wide": (10, 200), "other": (4, 200)}
    for seed, (name, (low, high)) in enumerate(ranges.items()):
        digest = hashlib.sha256(MODEL).hexdigest()
        amount = 300 + 200 * seed
        made(root / name, 8000, seed, amount, tokenizer=digest, low=low, high=high)
        (root / name / "tokenizer.model").write_bytes(MODEL)
    return {name: root / name for name in ranges}


def tree(folder: Path, folders: dict[str, Path], **changes: Any) -> dict[str, Any]:
    sources = {
        "wide": {"path": str(folders["wide"]), "weight": [[0, 1.0], [64, 0.2]]},
        "narrow": {"path": str(folders["narrow"])},
    }
    sets = {"other": {"path": str(folders["other"])}, "wide": {"path": str(folders["wide"])}}
    return small_run(
        folder,
        Path("unused"),
        data__sources=sources,
        data__validation=sets,
        train__steps=STEPS,
        validation__every=6,
        validation__rows=0,
        log__sample={"tokens": 0},
        **changes,
    )


def records(folder: str) -> list[dict[str, float]]:
    return [r["values"] for r in read_records(Path(folder) / "metrics.jsonl")]


MEASURED = ("train", "validation", "data_")  # groups that speak of no times


def measured(folder: str) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k.startswith(MEASURED)} for r in records(folder)]


@pytest.mark.slow
def test_a_run_over_two_sources_and_two_validation_sets(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, parts, two = (tree(tmp_path / n, folders) for n in ("whole", "parts", "two"))
    assert run_world(train, 1, whole) == [EXIT_DONE]
    assert run_world(train, 1, parts, 5) == [EXIT_SAVED]
    assert run_world(train, 1, parts) == [EXIT_DONE]
    assert run_world(train, 2, two) == [EXIT_DONE] * 2

    found = records(whole["folder"])
    assert len(found) == STEPS
    assert measured(parts["folder"]) == measured(whole["folder"])
    assert content(parts["folder"]) == content(whole["folder"])
    for one, other in zip(measured(whole["folder"]), measured(two["folder"]), strict=True):
        assert one.keys() == other.keys()
        assert other == pytest.approx(one, rel=1e-4)

    # Which of two ids comes next is sooner learned than which of 190.
    last = found[-1]
    assert last["train_loss_by_source/narrow"] < last["train_loss_by_source/wide"] - 0.5
    assert last["data_samples/narrow"] + last["data_samples/wide"] == 8 * STEPS
    assert last["data_share/narrow"] == last["data_samples/narrow"] / (8 * STEPS)
    assert last["data_share_asked/narrow"] == pytest.approx(1 / 1.2, abs=1e-9)
    config = parse_config(whole, "test")
    labels = {}
    for name in ("other", "wide"):
        manifest = load_manifest(folders[name])
        batches = validation_batches(manifest, config.data, micro_batch=2, align=16)
        labels[name] = sum(int(b.loss_mask.sum()) for b in batches)
    assert labels["other"] != labels["wide"]
    for record in (found[5], last):
        losses = {name: record[f"validation/{name}/loss"] for name in labels}
        assert abs(losses["other"] - losses["wide"]) > 1e-3
        pooled = sum(labels[n] * losses[n] for n in labels) / sum(labels.values())
        assert record["validation/loss"] == pytest.approx(pooled, rel=1e-12)
        assert "validation/wide/perplexity" in record

    log = (Path(whole["folder"]) / "logs" / "rank-00000.log").read_text()
    losses = f"other {last['validation/other/loss']:.4f}, wide {last['validation/wide/loss']:.4f}"
    assert f"validation at step {STEPS}: loss {last['validation/loss']:.4f}, ppl " in log
    assert f"({losses})" in log

    changed = tree(tmp_path / "whole", folders, data__seed=1)
    changed["train"]["steps"] = STEPS + 2
    changed["data"]["sources"]["narrow"]["weight"] = 2.0
    with pytest.raises(
        AssertionError, match=r"DataError: .*sources\.narrow\.weight: was .*; seed: was 0, is 1"
    ):
        run_world(train, 1, changed)
