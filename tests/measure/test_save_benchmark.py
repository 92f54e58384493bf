"""bench save: both modes side by side, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.parallel.tiny import tiny_config
from tests.worlds import run_world
from titans_pretrain.measure.save_benchmark import measure, table
from titans_pretrain.model.counts import parameter_count


def bench(config: Any, folder: Path) -> Any:
    return measure(config, 2, folder)


def test_both_modes_are_measured_and_nothing_is_left(tmp_path: Path) -> None:
    config = tiny_config()
    results = run_world(bench, 2, config, tmp_path)
    parameters = sum(parameter_count(config.model).values())
    for figures in results:
        assert figures["ranks"] == 2
        assert figures["bytes"] == 3 * 4 * parameters
        assert all(value > 0 for value in figures.values())
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_how_much_of_a_save_is_left_to_wait_for() -> None:
    figures = {
        "ranks": 2,
        "bytes": 3 * 2**20,
        "sync_s": 0.5,
        "async_stall_s": 0.02,
        "async_behind_s": 0.75,
        "step_s": 0.1,
        "step_while_writing_s": 0.125,
    }
    lines = table(figures).splitlines()
    assert lines[0] == "3.0 MiB by 2 ranks"
    assert lines[1].endswith("500.00 ms")
    assert lines[2].endswith(" 20.00 ms, 1/25.0 of it")
    assert lines[3].endswith("750.00 ms")
    assert lines[4].endswith("100.00 ms; while a save is written 125.00 ms, 1.25 times")
