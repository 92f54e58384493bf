"""Three of the kills of tests/torture.py, at moments and with draws that are fixed."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import torture
from tests.prepared import small_dataset
from tests.torture import Life, finish, kill, result, tree


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tree(tmp_path_factory.mktemp("whole") / "run", data)
    finish(config)
    return result(config["folder"])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("moment", "who", "launched"),
    [("training", "rank 0", False), ("saving", "rank 1", True), ("starting", "rank 1", False)],
)
def test_a_killed_run_is_gone_in_a_minute_and_goes_on_bitwise(
    moment: str, who: str, launched: bool, data: Path, whole: Any, tmp_path: Path
) -> None:
    config = tree(tmp_path / "run", data)
    told = kill(Life.start(config, launched), moment, who, random.Random(3))
    assert told is not None and "all gone" in told, told
    finish(config)
    assert result(config["folder"]) == whole


@pytest.mark.parametrize(
    ("other", "complaint"), [("sleep 60", "live on after 1 s"), ("true", "exit codes")]
)
def test_a_rank_that_lives_on_or_ends_well_is_seen(
    other: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torture, "BOUND", 1.0)
    monkeypatch.setattr(torture, "come_to", lambda *_: True)
    env = {**os.environ, torture.MARK: str(tmp_path)}
    ranks = [subprocess.Popen(command.split(), env=env) for command in ("sleep 60", other)]
    life = Life(tmp_path, False, str(tmp_path), 0, 0, ranks)
    with pytest.raises(AssertionError, match=complaint):
        kill(life, "training", "rank 0", random.Random(0))
    assert life.alive() == []


def test_a_save_that_the_kill_left_unfinished_is_told_of_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torture, "come_to", lambda *_: True)
    env = {**os.environ, torture.MARK: str(tmp_path)}
    for moment, left in (("saving", False), ("saving", True), ("starting", True)):
        if left:
            (tmp_path / "checkpoints" / ".writing-8").mkdir(parents=True, exist_ok=True)
        life = Life(
            tmp_path, False, str(tmp_path), 0, 0, [subprocess.Popen(["sleep", "60"], env=env)]
        )
        told = kill(life, moment, "rank 0", random.Random(0))
        assert told is not None and "exit codes [-9]" in told
        assert (torture.UNFINISHED in told) == (left and moment == "saving")
    for kills in (3, 5):  # from one call of the command to the next
        count = torture.Count(torture.parse(None, "x", 50, ["--folder", str(tmp_path)]))
        count.add(kills, {torture.UNFINISHED: 2})
    assert (count.kills, count.runs, count.of_them) == (8, 2, {torture.UNFINISHED: 4})
