"""A chain where jobs may not queue themselves again, and a sweep, on a real Slurm."""

import pytest

from tests import torture
from tests.prepared import write_config
from tests.slurm.cluster import SITE, Job
from tests.slurm.faults import EVERY, all_idle, signal_steps, tree
from titans_pretrain.run.metrics import read_records


@pytest.mark.timeout(600)
def test_a_chain_goes_on_bitwise_and_leaves_at_once_when_done(cluster, data, undisturbed, tmp_path):
    first = cluster.submit(tree(tmp_path / "run", data), "--chain", "3")
    ids = (first.run / "jobs" / "0001" / "id").read_text().split()
    assert ids[0] == first.number and len(ids) == 3
    first.until_life(0)
    first.until("a checkpoint", lambda: first.step > EVERY + 5)
    signal_steps(cluster, first)
    second, third = (Job(cluster, first.run, number) for number in ids[1:])
    assert third.until_ended(240) == "COMPLETED", third.story()
    assert (first.state, second.state) == ("COMPLETED", "COMPLETED"), first.story()
    assert f"the chain goes on with job {second.number}" in first.log
    assert "srun" not in third.log and "end: done" in third.log, third.log
    assert [(r.job, r.reason) for r in first.restarts] == [(first.number, "asked")]
    assert torture.result(str(first.run)) == undisturbed
    all_idle(cluster)


@pytest.mark.timeout(600)
def test_a_sweep_one_at_a_time(cluster, data, tmp_path):
    short = tree(tmp_path / "sweep", data, train__steps=10, checkpoint__every_steps=0)
    config = write_config(tmp_path / "config.yaml", short)
    place = write_config(tmp_path / "site.yaml", SITE)
    how = ("--nodes", 1, "--site", place, "--array", "optim.lr=1e-3,3e-3", "--array-limit", 1)
    said = cluster.titans("submit", config, *how)
    assert said.returncode == 0, said.stdout + said.stderr
    runs = [cluster.outside(tmp_path / "sweep" / f"optim.lr={lr}") for lr in ("1e-3", "3e-3")]
    jobs = [Job(cluster, run, (run / "jobs" / "0001" / "id").read_text().strip()) for run in runs]
    assert [job.until_ended() for job in jobs] == ["COMPLETED"] * 2, jobs[0].story()
    assert [max(_rates(job)) for job in jobs] == pytest.approx([1e-3, 3e-3])
    first, second = (job.slurm("scontrol", "-o", "show", "job", job.number) for job in jobs)
    assert _field(second, "StartTime") >= _field(first, "EndTime")
    all_idle(cluster)


def _rates(job):
    return [r["values"]["train/lr"] for r in read_records(job.run / "metrics.jsonl")]


def _field(shown, name):
    return next(w.partition("=")[2] for w in shown.split() if w.startswith(f"{name}="))
