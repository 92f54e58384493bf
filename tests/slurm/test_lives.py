"""The demo on two nodes of a real Slurm, interrupted and stopped; and what Slurm refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import torture
from tests.prepared import ROOT, write_config
from tests.slurm.cluster import SITE, Cluster
from tests.slurm.faults import all_idle, signal_steps, tree

TIMED = ("time/", "speed/", "machine/")  # not the same in two runs


def demo(folder: Path, data: Path) -> dict[str, Any]:
    """configs/demo.yaml on less data, for fewer steps."""
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    config["folder"], config["data"]["sources"]["books"]["path"] = str(folder), str(data)
    config["train"] |= {"steps": 12, "device": "cpu", "threads": 1}
    config["validation"] |= {"every": 6, "rows": 8}
    config["checkpoint"]["every_steps"] = 0
    config["log"] |= {"console_every": 1, "memory_every": 4}
    return dict(config)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, but for times."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(TIMED)
    }


@pytest.mark.timeout(600)
def test_the_demo_is_bitwise_the_uninterrupted_one(cluster, data, tmp_path):
    whole = demo(tmp_path / "whole", data)
    torture.finish(whole | {"watchdog": {}})
    job = cluster.submit(demo(tmp_path / "run", data))
    job.until("step 4", lambda: job.step >= 4, 180)
    signal_steps(cluster, job)
    assert job.until_ended(240) == "COMPLETED", job.story()
    shown = cluster("run", "scontrol", "-o", "show", "job", job.number)
    assert " Restarts=1 " in shown
    assert [r.reason for r in job.restarts] == ["asked"]
    assert torture.result(str(job.run)) == torture.result(whole["folder"])
    told = curves(job.run)
    assert told == curves(tmp_path / "whole")
    assert [step for step, _ in told["train/loss"]] == list(range(1, 13))


@pytest.mark.timeout(300)
def test_stop_saves_and_ends_it_for_good(cluster, data, tmp_path):
    job = cluster.submit(tree(tmp_path / "run", data, train__steps=5000))
    job.until_life(0)
    job.until("a step", lambda: job.step > 0, 60)
    said = cluster.titans("runs", tmp_path / "run", "--json")
    assert said.returncode == 0, said.stdout + said.stderr
    [row] = json.loads(said.stdout)
    assert row["state"] == "running" and row["why"].endswith(f", job {job.number}")
    said = cluster.titans("stop", tmp_path / "run")
    assert f"job {job.number} was RUNNING: told to save" in said.stdout, said.stderr
    assert job.until_ended() == "COMPLETED", job.story()
    assert job.saved == job.step > 0
    assert job.restarts == []
    [row] = json.loads(cluster.titans("runs", tmp_path / "run", "--json").stdout)
    assert (row["state"], row["checkpoint"]) == ("stopped", job.saved)
    again = cluster.titans("submit", tmp_path / "config.yaml", "--nodes", 2)
    assert again.returncode == 2


@pytest.mark.timeout(300)
def test_a_diverged_run_fails_with_its_reason(cluster, data, tmp_path):
    changes = {"optim__lr": 1e30, "optim__min_lr": 0.0, "divergence": {"on": "stop"}}
    job = cluster.submit(tree(tmp_path / "run", data, **changes))
    assert job.until_ended() == "FAILED", job.story()
    assert "end: failed (rank" in job.log and "DivergedError" in job.log, job.story()
    assert " ExitCode=4:0 " in cluster("run", "scontrol", "-o", "show", "job", job.number)
    assert job.restarts == []


def refused(cluster: Cluster, config: Path, place: Path, *options: object) -> str:
    said = cluster.titans("submit", config, "--nodes", 2, "--site", place, *options)
    assert said.returncode == 2, said.stdout + said.stderr
    return said.stderr


@pytest.mark.timeout(300)
def test_what_slurm_refuses_leaves_nothing(cluster, data, tmp_path):
    config = write_config(tmp_path / "config.yaml", tree(tmp_path / "run", data))
    for words, option in (
        ("invalid partition specified: nowhere", {"partition": "nowhere"}),
        ("Invalid feature specification", {"sbatch": ["--constraint=odd"]}),
    ):
        place = write_config(tmp_path / "site.yaml", SITE | option)
        said = refused(cluster, config, place)
        assert words.lower() in said.lower()
        assert not (tmp_path / "run").exists()
    said = refused(cluster, config, write_config(tmp_path / "site.yaml", SITE), "--nodes", 9)
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(300)
def test_one_job_at_a_time_trains_a_run(cluster, data, tmp_path):
    steps = tree(tmp_path / "run", data, train__steps=5000)
    job = cluster.submit(steps)
    config = write_config(tmp_path / "config.yaml", steps)
    place = write_config(tmp_path / "site.yaml", SITE)
    said = refused(cluster, config, place)
    assert f"job {job.number} of the run in {tmp_path / 'run'} is " in said
    assert "one job at a time trains a run" in said
    assert len(list((tmp_path / "run" / "jobs").glob("*/id"))) == 1
    cluster("run", "scancel", job.number)
    assert job.until_ended() == "CANCELLED"
    all_idle(cluster)
