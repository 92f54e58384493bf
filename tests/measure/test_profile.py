"""profile.steps: what it leaves, that it changes nothing, and what is said where it cannot look."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import ProfileConfig, parse_config
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, ConfigError
from titans_pretrain.measure.profile import Profile, check_profile, cpu_memory
from titans_pretrain.run.checkpoint import content_sha256, folder_of
from titans_pretrain.run.metrics import read_records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def train(tree: dict[str, Any], stop_after: int | None = None) -> tuple[int, str]:
    """(exit code, the console of rank 0)."""
    import contextlib
    import io

    from titans_pretrain.train import run_training

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_training(parse_config(tree, "test"), stop_after=stop_after)
    return code, said.getvalue()


def small(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return small_run(
        folder, data, train__steps=6, validation__every=4, train__global_batch=4, **changes
    )


def test_a_profiled_run_is_bitwise_the_run_and_leaves_its_files(data: Path, tmp_path: Path) -> None:
    plain = small(tmp_path / "plain", data)
    looked = small(tmp_path / "looked", data, profile__steps=[3, 4], profile__ranks=[1])
    for tree in (plain, looked):
        assert [code for code, _ in run_world(train, 2, tree)] == [EXIT_DONE] * 2
    ends = [folder_of(tmp_path / name / "checkpoints", 6) for name in ("plain", "looked")]
    assert content_sha256(ends[0]) == content_sha256(ends[1])
    losses = [
        [r["values"]["train/loss"] for r in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "looked")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "looked" / "profile" / "step-3-4"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"rank-1.{what}" for what in ("memory.json", "summary.txt", "trace.json.gz")
    ]
    trace = json.loads(gzip.decompress((folder / "rank-1.trace.json.gz").read_bytes()))
    ranges = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    count = {name: ranges.count(name) for name in set(ranges)}
    assert count["ProfilerStep#1"] == count["ProfilerStep#2"] == 1  # 0 was the warm-up
    for name in ("data", "count", "backward", "gradient scan", "reduce", "gather", "watch"):
        assert count[name] == 2, name
    assert count["forward"] == 2 * 2 + 2 * 3  # each with its loss; validation: and the whole
    assert count["validation"] == 1 and "checkpoint" not in count
    assert count["blocks.0 attention"] == count["blocks.1 mlp"] == count["embedding"]
    assert trace["distributedInfo"]["rank"] == 1
    memory = json.loads((folder / "rank-1.memory.json").read_text())
    assert memory["peak_bytes"] == max(total for _, total in memory["timeline_us_bytes"]) > 1e5
    assert len(memory["operators"]) > 5
    summary = (folder / "rank-1.summary.txt").read_text()
    assert "gradient scan" in summary and "aten::bmm" in summary


def test_a_window_that_a_life_does_not_reach_is_told(data: Path, tmp_path: Path) -> None:
    tree = small(tmp_path / "run", data, profile__steps=[2, 3], model__variant="transformer")
    folder = tmp_path / "run" / "profile"
    ((code, said),) = run_world(train, 1, tree, 1)
    assert code == EXIT_SAVED and not folder.exists()
    assert "profile.steps: steps 1 to 1 run now: the window is beyond the end" in said
    ((code, said),) = run_world(train, 1, tree, 1)  # step 2, then it leaves
    assert code == EXIT_SAVED
    assert "steps 2 to 2 run now: steps 2 to 2 are looked at" in said
    assert (folder / "step-2-3" / "rank-0.trace.json.gz").exists()
    (folder / "step-2-3").rename(folder / "seen")
    run_world(train, 1, tree, 2)
    ((_, said),) = run_world(train, 1, tree)
    assert "steps 5 to 6 run now: the window is past" in said


def test_ranks_that_do_not_exist_are_refused() -> None:
    check_profile(ProfileConfig(ranks=(9,)), 2)  # nobody looks
    check_profile(ProfileConfig(steps=(1, 2), ranks=(0, 1)), 2)
    with pytest.raises(ConfigError, match=r"profile.ranks=\[0, 2\], 2 ranks"):
        check_profile(ProfileConfig(steps=(1, 2), ranks=(0, 2)), 2)
    with pytest.raises(ConfigError, match=r"profile.ranks=\[\]"):
        check_profile(ProfileConfig(steps=(1, 2), ranks=()), 2)


def test_a_window_runs_forward() -> None:
    tree = {"folder": "x", "data": {"sources": {"a": {"path": "y"}}}}
    with pytest.raises(ConfigError, match=r"try profile.steps=\[3,5\]"):
        parse_config({**tree, "profile": {"steps": [5, 3]}}, "test")


class _World:
    rank, size, device = 0, 1, torch.device("cpu")


def test_a_disk_that_refuses_costs_the_profile_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("no folder")
    tree = {"folder": "x", "data": {"sources": {"a": {"path": "y"}}}, "profile": {"steps": [1, 1]}}
    stage: Any = type("Stage", (), {"token_loss": None, "model": _Empty()})()
    config = parse_config(tree, "test")
    profile = Profile(config, tmp_path, _World(), [stage], 1, 3)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "titans_pretrain.measure.profile"):
        for step in (1, 2, 3):
            profile.reach(step)
            torch.ones(3).sum()
    assert "the run goes on without" in caplog.text


class _Empty:
    def __init__(self) -> None:
        self.embedding = self.head = torch.nn.Identity()
        self.blocks: dict[str, Any] = {}


def test_the_memory_timeline_keeps_the_peak() -> None:
    events = [
        {"name": "[memory]", "ts": 10.0 + i, "args": {"Total Allocated": 100 + (i == 4321) * 50}}
        for i in range(9000)
    ]
    found = cpu_memory({"traceEvents": [*events, {"name": "other"}]}, [])
    assert found["peak_bytes"] == 50 and len(found["timeline_us_bytes"]) <= 2000
    assert [when for when, total in found["timeline_us_bytes"] if total] == [4321.0]


def test_on_cuda_the_allocators_history_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device: which calls are made, in which order."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **kw: calls.append(kw))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))

    class World(_World):
        device = torch.device("cuda", 0)

    tree = {"folder": "x", "data": {"sources": {"a": {"path": "y"}}}, "profile": {"steps": [2, 2]}}
    stage: Any = type("Stage", (), {"token_loss": None, "model": _Empty()})()
    config = parse_config(tree, "test")
    profile = Profile(config, tmp_path, World(), [stage], 1, 3)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        profile.reach(step)
        torch.ones(3).sum()
        assert bool(calls) == (step >= 2)
    folder = tmp_path / "profile" / "step-2-2"
    assert calls == [
        {"max_entries": 500_000},
        str(folder / "rank-0.memory.pickle"),
        {"enabled": None},
    ]
    assert (folder / "rank-0.trace.json.gz").exists()
    assert not (folder / "rank-0.memory.json").exists()
