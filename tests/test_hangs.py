"""Runs of two ranks that hang: all end with 77, and the reports name the rank at fault."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import ROOT, small_dataset, small_run, write_config
from tests.torture import Life, until
from tests.worlds import run_world
from titans_pretrain.errors import EXIT_DONE, EXIT_HANG
from titans_pretrain.launch.local import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def run(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    changes = {"train__steps": 100_000, "validation__every": 0, **changes}
    return small_run(folder, data, model__variant="transformer", **changes)


def reports(folder: Path) -> list[str]:
    """By rank."""
    found = sorted(folder.glob("failure-*.txt"), key=lambda p: p.name[-9:])
    return [path.read_text() for path in found]


def recorded(folder: Path, step: int) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


@pytest.mark.parametrize(
    ("stopped", "launched", "parallel"),
    [(1, True, {"pipeline": 2}), (0, False, {"context": 2})],
)
def test_a_stopped_rank_is_named_by_its_neighbour(
    stopped: int, launched: bool, parallel: dict[str, int], data: Path, tmp_path: Path
) -> None:
    """The last of a pipeline, the first of a context chain; rank 0 takes the store with it."""
    tree = run(tmp_path / "run", data, parallel=parallel, watchdog__silent_seconds=6.0)
    life = Life.start(tree, launched)
    try:
        assert until(lambda: recorded(tmp_path / "run", 5), life)
        time.sleep(2)  # a beat or two in the loop
        pid = life.victim(f"rank {stopped}")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        other = life.processes[0 if launched else 1 - stopped]
        assert other.wait(60) == EXIT_HANG
        if launched:  # and the launcher has ended the stopped one
            assert life.alive() == []
        assert 6 < time.monotonic() - began < 60
    finally:
        life.end()
    (report,) = reports(tmp_path / "run")
    named = rf"rank {stopped} on \S+ \(pid {pid}\) has not been heard of for \d+ s; last in step \d"
    assert re.search(rf"^why:        {named}", report, re.MULTILINE)
    assert re.search(rf"waited for:\n  {named}", report)
    assert f"rank {1 - stopped} of 2" in report.splitlines()[0]
    waits = re.search(r"waits in:   (\w+) of \w+\[[\d, ]*\]", report)
    assert waits is not None, report
    assert f"in {waits[1]}\n" in report[report.index("thread MainThread") :]
    console = (tmp_path / "run.out").read_text()
    assert re.search(rf"titans-pretrain: hang: {named}", console)
    log = (tmp_path / "run" / "logs" / f"rank-0000{1 - stopped}.log").read_text()
    assert re.search(rf"ERROR titans_pretrain.watchdog: hang: {named}", log)


HANGS = """
import os, sys, time
from titans_pretrain import phases
from titans_pretrain.cli import main
from titans_pretrain.model.titans import TitansLM

def sleep_for_ever():
    time.sleep(1000)

def forward(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and phases.now()[1] == 5:
        sleep_for_ever()
    return original(self, *args, **kwargs)

original, TitansLM.forward = TitansLM.forward, forward
sys.exit(main())
"""


def test_a_rank_that_hangs_alone_ends_all_and_is_named(data: Path, tmp_path: Path) -> None:
    tree = run(tmp_path / "run", data, watchdog__step_minutes=0.1, watchdog__silent_seconds=0)
    config = write_config(tmp_path / "config.yaml", tree)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANGS, "train", str(config)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [EXIT_HANG] * 2
    finally:
        for rank in ranks:
            rank.kill()
    first, second = reports(tmp_path / "run")
    behind = rf"rank 1 on \S+ \(pid {ranks[1].pid}\) is behind: step 5, backward > forward, in no "
    why = (
        r"why:        rank [01] on \S+ has made no progress for 6 s in step 5, .+step_minutes=0\.1"
    )
    for text in (first, second):
        assert re.search(why, text, re.MULTILINE)
        assert re.search(rf"waited for:\n  {behind}collective, no progress for \d+ s\n\n", text)
    assert "this rank:  step 5, gradient scan" in first
    assert "waits in:   all_reduce of float64[3] in group default_pg of ranks 0, 1" in first
    assert "flight recorder, what is not done" in first  # gloo records no message to one rank
    assert "samples:    32 33; 34 35" in first and "samples:    36 37; 38 39" in second
    assert "sleep_for_ever" in second[second.index("thread MainThread") :].split("\n\n")[0]
    assert "sleep_for_ever" not in first


def slowly(tree: dict[str, Any]) -> int:
    """Trains with a slow start, a slow step, a long validation and a long save."""
    from titans_pretrain import phases, train
    from titans_pretrain.config import parse_config
    from titans_pretrain.model.titans import TitansLM
    from titans_pretrain.run import dcp

    forward, save, rank = TitansLM.forward, dcp.save_tensors, os.environ["RANK"]
    late: set[int] = set()

    def slow_forward(self: TitansLM, *args: Any, **kwargs: Any) -> Any:
        _, step, stack = phases.now()
        if "validation" in stack:
            time.sleep(3)
        elif rank == "0" and step not in late:
            late.add(step)
            time.sleep({1: 8, 2: 3}.get(step, 0))  # the first compiles, say
        return forward(self, *args, **kwargs)

    def slow_save(*args: Any) -> None:
        time.sleep(8 if rank == "1" else 0)
        save(*args)

    TitansLM.forward, dcp.save_tensors = slow_forward, slow_save  # type: ignore[method-assign]
    return train.run_training(parse_config(tree, "test"))


def test_what_is_slow_is_no_hang(data: Path, tmp_path: Path) -> None:
    limits = {"step_minutes": 0.1, "start_minutes": 1, "checkpoint_minutes": 1, "data_minutes": 1}
    tree = run(
        tmp_path / "run",
        data,
        train__steps=3,
        validation={"every": 3, "rows": 16},
        watchdog={**limits, "silent_seconds": 3},
    )
    assert run_world(slowly, 2, tree) == [EXIT_DONE] * 2
    assert reports(tmp_path / "run") == []
