"""Two ranks below a job script: asked by RUN/stop they save, leave the mark, and exit 75."""

import time

import pytest

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_SAVED, ConfigError
from titans_pretrain.run import marks
from titans_pretrain.run.folder import RunFolder


def _train_until_stopped(tree):
    """Trains; rank 0 asks for the end in its third step. (exit code, is the mark there)"""
    from titans_pretrain import train

    fetch, calls = train.fetch, []

    def fetch_and_ask(world, *rest):
        calls.append(world.rank)
        if len(calls) == 3 and world.rank == 0:
            RunFolder(tree["folder"]).stop.touch()
        return fetch(world, *rest)

    train.fetch = fetch_and_ask
    code = train.run_training(parse_config(tree, "test"))
    mine = marks.here()
    return code, len(calls), mine is not None and mine.has("saved")


@pytest.mark.parametrize("below_a_job_script", [True, False])
def test_ranks_honour_the_stop_file(tmp_path, below_a_job_script):
    run = tmp_path / "run"
    changes = {"model__variant": "transformer", "validation__every": 0, "train__steps": 50}
    tree = small_run(run, small_dataset(tmp_path), **changes)
    env = {"TITANS_RUN": str(run), "TITANS_JOB": "7.0"} if below_a_job_script else {}
    told = run_world(_train_until_stopped, 2, tree, env=env)
    assert told == [(EXIT_SAVED, 3, below_a_job_script)] * 2
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert (run / "jobs").exists() == below_a_job_script


def test_a_life_after_a_lost_node_waits_for_its_claim_to_run_out(tmp_path, monkeypatch, capsys):
    folder = RunFolder(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "tn1")
    lost = folder.take(beat=1000.0)
    monkeypatch.setattr("socket.gethostname", lambda: "tn2")
    with pytest.raises(ConfigError, match=r"pid .* on tn1"):
        folder.take(bound=2.0)
    began = time.time()
    newer = folder.take(bound=2.0, beat=0.2, patience=20.0)
    assert newer.life == 2
    assert time.time() - began < 15
    assert "waiting: run folder in use" in capsys.readouterr().out
    assert not lost.still_mine()
    newer.release()
    lost.release()


def test_only_a_job_is_patient(monkeypatch):
    monkeypatch.delenv("TITANS_JOB", raising=False)
    assert marks.patience() == 0
    monkeypatch.setenv("TITANS_RUN", "run")
    monkeypatch.setenv("TITANS_JOB", "7.0")
    assert marks.patience() > 120  # the bound of a claim
