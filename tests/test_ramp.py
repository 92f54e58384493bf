"""A batch that grows: which rows each step takes, whatever the layout, and after a resume."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.tiny import tiny_config
from tests.prepared import small_dataset, small_run
from tests.test_resume import content, curve, train
from tests.worlds import run_world
from titans_pretrain.config import TrainConfig, parse_config
from titans_pretrain.data.batch import batch_hash
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, ConfigError
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.run import checkpoint
from titans_pretrain.run.metrics import read_records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def test_rows_by_step() -> None:
    plain = TrainConfig(global_batch=8)
    assert [plain.rows(s) for s in (1, 100)] == [8, 8]
    train = TrainConfig(global_batch=16, micro_batch=2, ramp={"start": 4, "steps": 6})
    assert [train.rows(s) for s in range(1, 9)] == [4, 4, 8, 8, 12, 12, 16, 16]
    long = TrainConfig(global_batch=512, micro_batch=1, ramp={"start": 1, "steps": 1022})
    rows = [long.rows(s) for s in range(1, 1100)]
    assert rows[0] == 1 and rows[1021] == 511 and rows[1022] == rows[-1] == 512
    assert {b - a for a, b in itertools.pairwise(rows)} == {0, 1}


def test_a_first_batch_that_ranks_cannot_share_is_refused() -> None:
    config = tiny_config(train__ramp={"start": 4, "steps": 5})
    assert plan_layout(config, 2).micro_batches == 2
    with pytest.raises(ConfigError, match=r"train.ramp.start=4.*4 data-parallel"):
        plan_layout(config, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_takes_each_step_s_rows_and_goes_on_from_any(workers: int, data: Path) -> None:
    tree = small_run(Path("unused"), data, train__ramp={"start": 4, "steps": 6})
    tree["train"]["global_batch"] = 16
    tree["data"]["workers"] = workers
    config = parse_config(tree, "test")

    def stream(rank: int, ranks: int) -> TrainStream:
        shape = {"global_batch": 16, "micro_batch": 2, "align": 16, "rows": config.train.rows}
        return TrainStream(config.data, dp_rank=rank, dp_size=ranks, **shape)

    alone = stream(0, 1)
    batches = alone.batches(alone.start())
    seen, states = zip(*(next(batches) for _ in range(8)))
    batches.close()
    samples = [[s for b in step for s in b.samples.tolist()] for step in seen]
    assert [len(s) for s in samples] == [4, 4, 8, 8, 12, 12, 16, 16]
    assert [s for step in samples for s in step] == list(range(80))
    assert all(len(b.samples) == 2 for step in seen for b in step)
    again = alone.batches(states[3], 5)
    for expected in seen[4:]:
        assert batch_hash(next(again)[0]) == batch_hash(expected)
    again.close()
    halves = [stream(rank, 2).batches(alone.start()) for rank in (0, 1)]
    for expected in samples:
        got = [s for half in halves for b in next(half)[0] for s in b.samples.tolist()]
        assert got == expected
    for half in halves:
        half.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_ramp_resumes_to_the_bit(ranks: int, data: Path, tmp_path: Path) -> None:
    def tree(name: str) -> dict[str, Any]:
        changes = {"train__ramp": {"start": 4, "steps": 6}, "train__z_loss": 1e-3}
        made = small_run(tmp_path / name, data, model__variant="mag", **changes)
        made["train"] |= {"global_batch": 16, "steps": 10}
        return made

    whole, parts = tree("whole"), tree("parts")
    assert run_world(train, ranks, whole) == [EXIT_DONE] * ranks
    assert run_world(train, ranks, parts, 3) == [EXIT_SAVED] * ranks
    assert run_world(train, ranks, parts) == [EXIT_DONE] * ranks
    assert curve(parts["folder"]) == curve(whole["folder"])
    assert content(parts["folder"]) == content(whole["folder"])
    values = [r["values"] for r in read_records(Path(parts["folder"]) / "metrics.jsonl")]
    assert [v["train/rows"] for v in values] == [4, 4, 8, 8, 12, 12, 16, 16, 16, 16]
    assert all(1e-3 < v["train/z_loss"] < 0.1 * v["train/loss"] for v in values)
    checkpoints = Path(whole["folder"]) / "checkpoints"
    found = json.loads((checkpoint.folder_of(checkpoints, 10) / "state.json").read_text())
    assert found["data"]["next_sample"] == 2 * (4 + 8 + 12) + 4 * 16
