"""bench step: every moment is somewhere, figures are those of the counts, and the table says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.tiny import tiny_config
from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain import cli
from titans_pretrain.measure import stopwatch
from titans_pretrain.measure.step_benchmark import faster_half, measure
from titans_pretrain.measure.step_benchmark_report import table
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.phases import listening, phase


def test_the_stopwatch_gives_every_moment_to_one_phase_and_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    watch = stopwatch.Stopwatch(torch.device("cpu"))

    def after(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch.start()
    after(1)
    with listening(watch):
        with phase("data"):
            after(2)
        with phase("backward"):
            with phase("forward"):
                after(4)
                watch.entered("attention", "blocks.0")
                after(8)
                watch.entered("memory", "blocks.0")
                after(16)
                watch.left("memory", "blocks.0")
                after(32)
                watch.left("attention", "blocks.0")
            after(64)
            watch.turned_back("memory")
            after(128)
            watch.entered("attention", "blocks.0")  # computed again
            after(256)
            watch.left("attention", "blocks.0")
            after(512)
    assert watch.stop() == {
        ("other", ""): 1,
        ("data", ""): 2,
        ("forward", "rest"): 4,
        ("forward", "attention"): 40,
        ("forward", "memory"): 16,
        ("backward", "rest"): 64,
        ("backward", "memory"): 128 + 512,
        ("recompute", "attention"): 256,
    }


def test_the_faster_half_is_a_mean_that_adds_up() -> None:
    steps = [{("a", ""): 9.0}, {("a", ""): 1.0, ("b", ""): 2.0}, {("a", ""): 2.0, ("b", ""): 3.0}]
    assert faster_half(steps) == [(("a", ""), 1.5), (("b", ""), 2.5)]


def measured(config: Any) -> dict[str, Any]:
    return measure(config, steps=1, warm_up=0, synthetic=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_made_up_data_and_what_is_counted(ranks: int) -> None:
    """Of data that does not exist; on each rank."""
    config = tiny_config(model__variant="mac", train__recompute="blocks", train__ramp=None)
    for figures in run_world(measured, ranks, config):
        assert "made-up data" in figures["what"] and f"{ranks} ranks" in figures["what"]
        seconds = figures["seconds"]
        names = {key.partition(" / ")[0] for key in seconds}
        assert {"data", "count", "forward", "recompute", "backward", "gradient scan"} <= names
        assert {"reduce", "clip", "optimizer", "gather", "watch"} <= names
        assert min(seconds.values()) >= 0 < figures["step_s"]
        for way in ("forward", "recompute", "backward"):
            assert seconds[f"{way} / memory"] > 0 and seconds[f"{way} / mlp"] > 0
        flops = figures["flops"]
        forward = sum(n for key, n in flops.items() if key.startswith("forward"))
        per_token = sum(flops_per_token(config.model, 32).values())
        assert forward == pytest.approx(per_token * 8 * 32 / ranks)
        assert flops["backward / mlp"] == 2 * flops["forward / mlp"] == 2 * flops["recompute / mlp"]
        assert "recompute / head and loss" not in flops
        assert figures["tokens"] == 256 and 100 < figures["labels"] < 256
        parameters = sum(parameter_count(config.model).values())
        held = figures["memory_bytes"]
        assert held["parameters"] == pytest.approx(4 * parameters, rel=0.05)
        assert held["optimizer state"] == pytest.approx(12 * parameters / ranks, rel=0.05)
        assert held["made in a step, at most"] > 4 * parameters  # gradients, and more
        # The gradients, whole, and a few numbers; the weights of the other rank come back.
        found = figures["collectives"]
        assert 4 * parameters <= found["allreduce"]["bytes"] <= 4.4 * parameters
        assert any("allgather" in name for name in found) == (ranks > 1)


def test_the_command_reads_prepared_data_on_two_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = small_run(tmp_path / "run", small_dataset(tmp_path), model__variant="transformer")
    config = write_config(tmp_path / "config.yaml", tree)
    out = tmp_path / "figures.json"
    arguments = [str(config), "--ranks", "2", "--steps", "1", "--warm-up", "1"]
    assert cli.main(["bench", "step", *arguments, "train.micro_batch=4", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert "prepared data" in figures["what"] and "micro-batches of 4" in figures["what"]
    assert figures["ranks"] == 2 and figures["tokens"] == 512
    said = capfd.readouterr().out
    assert figures["what"] in said and "model FLOP utilisation" in said
    assert not (tmp_path / "run").exists()  # a benchmark leaves no run


def test_the_table() -> None:
    figures = {
        "what": "a model",
        "ranks": 2,
        "tokens": 1000,
        "labels": 900,
        "step_s": 0.5,
        "matmul_flop_per_s": 100e9,
        "matmul_dtype": "fp32",
        "seconds": {
            "other": 0.05,
            "backward / mlp": 0.3,
            "forward / mlp": 0.1,
            "forward / rest": 0.05,
        },
        "flops": {"forward / mlp": 5e9, "backward / mlp": 10e9, "recompute / mlp": 5e9},
        "memory_bytes": {"parameters": 3 << 20},
        "collectives": {"allreduce": {"calls": 3, "bytes": 2048}},
    }
    assert table(figures).splitlines() == [
        "a model",
        "",
        "                            ms       %     GFLOP   GFLOP/s  of matmul",
        "forward                 150.00    30.0     5.000     33.33      33.3%",
        "  mlp                   100.00    20.0     5.000     50.00      50.0%",
        "  rest                   50.00    10.0",
        "backward                300.00    60.0    10.000     33.33      33.3%",
        "  mlp                   300.00    60.0    10.000     33.33      33.3%",
        "other                    50.00    10.0",
        "a step, watched         500.00   100.0",
        "a step, left alone      500.00   100.0    15.000     30.00      30.0%",
        "",
        "2,000 tokens/s (1,800 of them with a label), 60.0 GFLOP/s in all",
        "a rank's square matrix product (fp32): 100.0 GFLOP/s; model FLOP utilisation 30.0 %",
        "memory of a rank: parameters 3.0 MiB",
        "collectives of a step and rank: allreduce 3 (2.0 KiB)",
    ]
