"""Checkpoints by way of the node's own disk: the same files, and nothing left there."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.test_saver import Started, rng, state_of
from tests.worlds import run_world
from titans_pretrain.errors import NodeError, this_node
from titans_pretrain.run import checkpoint, local_disk


def by_way_of_the_disk(folder: Path) -> Any:
    """A save whose copying cannot begin before training has changed everything, and a synchronous
    one of what was."""
    gate, seen = threading.Event(), []

    def held() -> None:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)

    run = Started(folder / "local", held, mode="local")
    state, tensors = state_of(5), rng()
    run.saver.save(state, run.fragments, tensors)
    on_disk = sorted(p.name for p in Path(os.environ["TMPDIR"]).glob("*/step-*/*.distcp"))
    for tensor in (*run.flats.values(), tensors["rng/cpu"]):
        tensor.add_(1)
    state["data"]["next_sample"] = 0
    seen = list((folder / "local").glob("step-*"))
    run.world.gather_objects(None)
    gate.set()
    run.saver.wait()
    at_once = Started(folder / "at once", world=run.world, mode="sync")
    at_once.save(5)
    run.world.shut_down()
    return on_disk, seen, [s.step for s in run.told]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_files_are_those_of_a_synchronous_save(ranks: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for told in run_world(by_way_of_the_disk, ranks, tmp_path, env={"TMPDIR": str(disk)}):
        assert told == ([f"__{r}_0.distcp" for r in range(ranks)], [], [5])
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "step-00000005").iterdir()}
        for name in ("local", "at once")
    )
    assert ours == theirs and len(ours) == 3 + ranks
    assert checkpoint.verify(tmp_path / "local" / "step-00000005")["step"] == 5
    assert list(disk.iterdir()) == []


def refused(folder: Path, where: str) -> Any:
    """What a save comes to whose second part cannot be written, to the node's disk or from it."""
    run = Started(folder, mode="local")
    run.save(1)
    run.saver.wait()

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    write = torch.save
    if run.world.rank == 1 and where == "disk":
        torch.save = full
    elif run.world.rank == 1:
        local_disk._copy = full  # type: ignore[assignment]
    try:
        run.save(2)
        run.saver.wait()
        return "saved"
    except NodeError as e:
        return f"{e}, bad: {e.node}"
    finally:
        torch.save = write  # the answer is sent by it
        run.world.shut_down()


@pytest.mark.parametrize("where", ["disk", "copying"])
def test_a_disk_that_refuses_is_told_on_every_rank(where: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    for told in run_world(refused, 2, tmp_path / "run", where, env={"TMPDIR": str(disk)}):
        assert "checkpoint not written: rank 1: " in told
        assert "[Errno 28] No space left on device" in told
    assert told.endswith(f", bad: {this_node() if where == 'disk' else ''}")  # by the rank itself
    assert checkpoint.list_steps(tmp_path / "run") == [1]
    assert not list((tmp_path / "run").glob(".writing*"))
    assert not [p for p in disk.rglob("*") if p.is_file()]


def killed(folder: Path) -> None:
    run = Started(folder, mode="local")
    run.save(1)
    run.saver.wait()
    local_disk._copy = lambda *_: os._exit(9)  # type: ignore[assignment, return-value]
    run.save(2)
    run.saver.wait()


def begins(folder: Path) -> list[int]:
    run = Started(folder, mode="local")
    run.save(3)
    run.saver.wait()
    return checkpoint.list_steps(folder)


def test_what_a_killed_life_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    env = {"TMPDIR": str(disk)}
    with pytest.raises(AssertionError):
        run_world(killed, 1, tmp_path / "run", env=env)
    assert [p.name for p in disk.glob("*/*")] == ["step-00000002"]
    checkpoint.clean(tmp_path / "run")
    assert run_world(begins, 1, tmp_path / "run", env=env) == [[1, 3]]
    assert list(disk.iterdir()) == []
    shutil.rmtree(tmp_path / "run")
