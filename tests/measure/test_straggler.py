"""A rank that holds the others up is named, wherever they wait for it; one that waits is not."""

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_DONE
from titans_pretrain.measure.straggler import PHASES, Judge
from titans_pretrain.run.metrics import read_records

FAST, SLOW = [0.0, 1.0, 2.0, 0.1, 0.0], [0.0, 4.0, 2.5, 0.1, 0.0]


def looks(judge: Judge, *times: list[list[float]]) -> list[tuple[float, list[int]]]:
    found = [judge(own) for own in times]
    return [(round(largest, 2), [s.rank for s in slow]) for largest, slow in found]


def test_a_rank_is_named_once_an_episode():
    judge = Judge(1.5, 2, [[0, 1, 2]])
    bad, good = [FAST, SLOW, FAST], [FAST] * 3
    assert looks(judge, bad, bad, bad, good, bad, bad) == [
        *((2.13, []), (2.13, [1]), (2.13, []), (1.0, []), (2.13, []), (2.13, [1])),
    ]


def test_what_is_told_of_it():
    _, [slow] = Judge(1.5, 1, [[0, 1, 2]])([FAST, SLOW, FAST])
    assert (slow.rank, PHASES[1], slow.phase) == (1, "forward", "forward")
    assert (slow.seconds, slow.median) == (4.0, 1.0)
    assert slow.factor == pytest.approx(6.6 / 3.1)


def test_peers_are_those_with_equal_work():
    """Two stages of two, of which one has much more to do; and a stage of one."""
    judge = Judge(1.5, 1, [[0, 1], [2, 3], [4]])
    assert looks(judge, [FAST, FAST, SLOW, SLOW, SLOW]) == [(1.0, [])]
    assert looks(judge, [FAST, SLOW, SLOW, SLOW, SLOW]) == [(2.13, [1])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def train(tree: dict[str, Any], slow: int) -> int:
    """One life, in which the model of rank `slow` sleeps before each of its forwards."""
    import os

    from titans_pretrain.parallel.pipeline import Stage
    from titans_pretrain.train import run_training

    forward = Stage.forward

    def late(self: Stage, *args: Any) -> Any:
        time.sleep(0.6)
        return forward(self, *args)

    if int(os.environ["RANK"]) == slow:
        Stage.forward = late  # type: ignore[method-assign]
    return run_training(parse_config(tree, "test"))


def straggling(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    # So large a factor: neither a busy machine nor documents of uneven length reach it.
    looks = {"every": 2, "factor": 4.0, "looks": 2}
    return small_run(
        folder,
        data,
        train__steps=9,
        train__micro_batch=4,
        model__variant="transformer",
        validation__every=0,
        log__straggler=looks,
        **changes,
    )


def told(folder: Path) -> list[tuple[int, str]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["event"]) for line in lines if line.get("tag") == "events/straggler"
    ]


LAYOUTS = {"DP2": {}, "TP2": {"tensor": 2}, "CP2": {"context": 2}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_sleeps_is_named(layout: str, data: Path, tmp_path: Path) -> None:
    """In a tensor parallel layout the others wait for it inside their own forwards, in a context
    parallel one too, among data parallel ranks at the end of the step."""
    tree = straggling(tmp_path / "run", data, parallel=LAYOUTS[layout], log__tensorboard=True)
    tree["model"]["variant"] = "lmm" if layout == "CP2" else "transformer"
    assert run_world(train, 2, tree, 1) == [EXIT_DONE] * 2
    [(step, text)] = told(tmp_path / "run")
    assert step in (4, 6, 8)  # the first steps are uneven on their own
    assert text.startswith(f"rank 1 on {socket.gethostname()} is slow: its own time, without waiti")
    assert "in the last 2 steps that were looked at (one in 2)" in text and "s in forward" in text
    log = (tmp_path / "run/logs/rank-00000.log").read_text()
    assert log.count(text) == 1 and f"WARNING titans_pretrain.watch: {text}" in log
    records = read_records(tmp_path / "run/metrics.jsonl")
    ratio = {r["step"]: r["values"].get("speed/slowest_over_median") for r in records}
    assert [step for step, value in ratio.items() if value is not None] == [3, 5, 7, 9]
    assert max(value for value in ratio.values() if value) > 4


def test_where_none_is_slow_none_is_named(data: Path, tmp_path: Path) -> None:
    tree = straggling(tmp_path / "run", data)
    assert run_world(train, 2, tree, -1) == [EXIT_DONE] * 2
    assert told(tmp_path / "run") == []
    records = read_records(tmp_path / "run/metrics.jsonl")
    ratios = [r["values"].get("speed/slowest_over_median") for r in records]
    assert [r is not None for r in ratios] == [False, False, *[True, False] * 3, True]
    assert all(r >= 1 for r in ratios if r)


def where_it_waits() -> str:
    """The collective in which rank 0 waits for rank 1, as a thread beside it sees it."""
    import torch
    import torch.distributed as dist

    from titans_pretrain.measure.stopwatch import Stopwatch
    from titans_pretrain.measure.straggler import _telling_waits
    from titans_pretrain.run.hang_report import waits_in

    dist.init_process_group("gloo")
    seen: list[str] = []
    dist.barrier()

    def look() -> None:
        while not (found := waits_in()):
            time.sleep(0.01)
        seen.append(found)

    if dist.get_rank() == 1:
        time.sleep(1.0)
    else:
        threading.Thread(target=look).start()
    with _telling_waits(Stopwatch(torch.device("cpu"))):
        dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    return seen[0] if seen else ""


def test_a_report_of_a_hang_names_the_collective_all_the_same() -> None:
    assert run_world(where_it_waits, 2) == ["all_reduce", ""]


def test_looking_changes_no_number(data: Path, tmp_path: Path) -> None:
    curves = []
    for every in (0, 1):
        tree = straggling(tmp_path / str(every), data)
        tree["log"]["straggler"]["every"] = every
        assert run_world(train, 2, tree, -1) == [EXIT_DONE] * 2
        records = read_records(tmp_path / str(every) / "metrics.jsonl")
        curves.append(
            [(r["values"]["train/loss"], r["values"]["train/grad_norm"]) for r in records]
        )
    assert curves[0] == curves[1] and len(curves[0]) == 9
