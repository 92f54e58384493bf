"""Saves behind the training: the moment of the save, all or nothing, and told on every rank."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from tests.live_bytes import LiveBytes
from tests.parallel.tiny import tiny_config
from tests.worlds import run_world
from titans_pretrain.config import CheckpointConfig
from titans_pretrain.errors import ConfigError, DivergedError, NodeError, TitansError
from titans_pretrain.parallel.layout import Fragment, Shard
from titans_pretrain.parallel.world import World, start_world
from titans_pretrain.run import checkpoint, saver
from titans_pretrain.run.saver import Saved, Saver

SHAPES = {"a": (6, 8), "b": (10,)}  # 58 numbers in all
KINDS = ("weight", "exp_avg", "exp_avg_sq")
State = dict[str, Any]


def owned(world: World) -> tuple[dict[str, torch.Tensor], list[Fragment]]:
    """One flat partition for each kind, as ZeRO has them, and the fragments in it."""
    share = 58 // world.size
    first, last = world.rank * share, (world.rank + 1) * share
    flats = {k: torch.arange(first, last) + 100.0 * i for i, k in enumerate(KINDS)}
    fragments, at = [], 0
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        start, stop = max(first, at), min(last, at + size)
        if start < stop:
            tensors = {k: flat.narrow(0, start - first, stop - start) for k, flat in flats.items()}
            fragments.append(Fragment(Shard(name, shape), start - at, stop - start, tensors))
        at += size
    return flats, fragments


def state_of(step: int) -> State:
    return {"step": step, "life": 1, "data": {"next_sample": 8 * step}}


def rng() -> dict[str, torch.Tensor]:
    return {"rng/cpu": torch.get_rng_state()}


class Started:
    """A world, its saver into `folder`, and what this rank owns."""

    def __init__(
        self,
        folder: Path,
        still_mine: Callable[[], None] = lambda: None,
        told: Callable[[Saved], None] | None = None,
        world: World | None = None,
        **config: Any,
    ) -> None:
        self.told: list[Saved] = []
        self.world = world or start_world(tiny_config().train)
        config = {"keep_last": 9, **config}
        self.saver = Saver(
            *(folder, CheckpointConfig(**config), self.world, still_mine),
            told or self.told.append,
        )
        self.flats, self.fragments = owned(self.world)

    def save(self, step: int) -> None:
        self.saver.save(state_of(step), self.fragments, rng())


def changed_behind_it(folder: Path, copied: bool) -> Any:
    """An asynchronous save that cannot begin to write before training has changed everything; and
    a synchronous one of what was."""
    gate = threading.Event()

    def held() -> None:
        assert gate.wait(60)

    run = Started(folder / "behind", held)
    if not copied:
        run.saver._copy = lambda fragments, tensors: (fragments, tensors)  # type: ignore[method-assign]
    state, tensors = state_of(5), rng()
    run.saver.save(state, run.fragments, tensors)
    for tensor in (*run.flats.values(), tensors["rng/cpu"]):
        tensor.add_(1)
    state["data"]["next_sample"] = 0
    seen = run.saver.poll(), list((folder / "behind").glob("step-*")), list(run.told)
    gate.set()
    run.saver.wait()
    (saved,) = run.told
    at_once = Started(folder / "at once", world=run.world, mode="sync")
    at_once.save(5)
    (other,) = at_once.told
    run.world.shut_down()
    return seen, saved, other


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("copied", [True, False])
def test_the_moment_of_the_save_is_saved_byte_for_byte(
    ranks: int, copied: bool, tmp_path: Path
) -> None:
    results = run_world(changed_behind_it, ranks, tmp_path, copied)
    for seen, saved, other in results:
        assert seen == (None, [], [])
        assert saved.step == other.step == 5
        assert saved.path == tmp_path / "behind" / "step-00000005"
        assert saved.behind > 0 == other.behind and saved.stalled > 0 < other.stalled
        assert "behind the training" in str(saved) and "behind" not in str(other).split("/")[-1]
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / name / "step-00000005").iterdir()}
        for name in ("behind", "at once")
    )
    assert sorted(ours) == sorted(theirs) and len(ours) == 3 + ranks
    differing = {name for name in ours if ours[name] != theirs[name]}
    if copied:
        assert differing == set()
    else:  # or the assertion above would say nothing
        assert {f"__{rank}_0.distcp" for rank in range(ranks)} <= differing


def killed(folder: Path, stage: str, victim: int) -> None:
    run = Started(folder, keep_last=1)
    run.save(1)
    run.saver.wait()
    if run.world.rank == victim % run.world.size:
        STAGES[stage][1]()
    run.save(2)
    run.saver.wait()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies(owner: Any, name: str, *, when: Callable[..., bool], after: bool) -> Callable[[], None]:
    """Kills this process in the first call of a function that `when` is true of."""

    def arm() -> None:
        original = getattr(owner, name)

        def last(*args: Any, **kwargs: Any) -> Any:
            if when(*args) and not after:
                die()
            result = original(*args, **kwargs)
            if when(*args):
                die()
            return result

        setattr(owner, name, last)

    return arm


def nth(n: int) -> Callable[..., bool]:
    calls = iter(range(1, 1_000_000))
    return lambda *_: next(calls) >= n


def named(name: str) -> Callable[..., bool]:
    return lambda path, *_: path.name == name


# Stage -> (the rank that is killed, how, steps of the checkpoints that are left).
STAGES: dict[str, tuple[int, Callable[[], None], list[int]]] = {
    "in the copy": (
        *(-1, dies(StateDictStager, "_stage_untyped_storage", when=nth(2), after=True)),
        [1],
    ),
    "first piece": (-1, dies(torch, "save", when=nth(1), after=False), [1]),
    "third piece": (-1, dies(torch, "save", when=nth(3), after=True), [1]),
    "checksum": (-1, dies(checkpoint, "_sha256", when=nth(1), after=False), [1]),
    "state.json": (0, dies(checkpoint, "_write", when=named("state.json"), after=True), [1]),
    "all written": (0, dies(checkpoint, "_write", when=named("checksums.json"), after=True), [1]),
    "published": (
        *(0, dies(Path, "rename", when=lambda p, _: "writing" in p.name, after=True)),
        [1, 2],
    ),
    "pruning": (0, dies(shutil, "rmtree", when=lambda p: "removing" in p.name, after=False), [2]),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint_as_the_latest(
    stage: str, ranks: int, tmp_path: Path
) -> None:
    victim, _, left = STAGES[stage]
    with pytest.raises(AssertionError, match=r"died without a word|closed by peer|reset by peer"):
        run_world(killed, ranks, tmp_path, stage, victim)
    assert checkpoint.list_steps(tmp_path) == left
    for step in left:
        assert checkpoint.verify(checkpoint.folder_of(tmp_path, step))["step"] == step
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in left]


def refused(folder: Path, how: str) -> Any:
    """Two saves; the second is refused, on one rank alone."""
    asked = 0

    def still_mine() -> None:
        nonlocal asked
        asked += 1
        if how == "newer life" and asked == 4:  # twice a save: before it, and before the rename
            raise ConfigError("life 2 holds the folder", "one life at a time", "leave")

    run = Started(folder, still_mine)
    run.save(1)
    run.saver.wait()
    write = torch.save
    if how == "full disk" and run.world.rank == 1:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        torch.save = full
    if how == "folder gone" and run.world.rank == 0:
        write_text = checkpoint._write

        def gone(path: Path, text: str) -> None:
            shutil.rmtree(path.parent)
            write_text(path, text)

        checkpoint._write = gone
    run.save(2)
    failure: TitansError | None = None
    end = time.monotonic() + 60
    while failure is None and time.monotonic() < end:  # as training looks, step after step
        time.sleep(0.01)
        failure = run.saver.poll()
    after = run.saver.poll()
    torch.save = write
    run.world.shut_down()
    return failure, after, [saved.step for saved in run.told]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("full disk", NodeError, "rank 1: OSError [Errno 28] No space left on device"),
        ("folder gone", NodeError, "No such file or directory"),
        ("newer life", ConfigError, "life 2 holds the folder"),
    ],
)
def test_what_fails_behind_the_training_is_told_on_every_rank(
    how: str, kind: type, message: str, tmp_path: Path
) -> None:
    results = run_world(refused, 2, tmp_path, how)
    for failure, after, told in results:
        assert type(failure) is kind and message in str(failure)
        assert after is None and told == [1]
    assert str(results[0][0]) == str(results[1][0])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 1))["step"] == 1


def slow(folder: Path) -> Any:
    """Three saves in a row, each held for a moment."""
    messages: list[str] = []
    running = most = 0

    def still_mine() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.3)
        running -= 1

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                messages.append(record.getMessage())

    saver.log.addHandler(Keep())
    run = Started(folder, still_mine)
    for step in (1, 2, 3):
        run.save(step)
    run.saver.wait()
    run.saver.wait()  # nothing to wait for
    return messages, most, [(s.step, s.stalled > 0.2) for s in run.told]


def test_a_save_waits_for_the_one_before_and_says_so_once(tmp_path: Path) -> None:
    for rank, (messages, most, told) in enumerate(run_world(slow, 2, tmp_path)):
        assert len(messages) == 1
        assert "checkpoint of step 2 waits for that of step 1" in messages[0]
        assert most == (rank == 0)
        assert told == [(1, False), (2, True), (3, True)]
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3]


def full_of_events(folder: Path) -> Any:
    """The record of a checkpoint cannot be written, on rank 0: all ranks leave with that."""

    def told(saved: Saved) -> None:
        if int(os.environ["RANK"]) == 0:
            raise NodeError("no room for the event", "there is room", "make room")

    run = Started(folder, told=told)
    run.save(1)
    try:
        run.saver.wait()
    except NodeError as e:
        return str(e)
    return "nothing"


def test_a_record_that_fails_on_one_rank_fails_all(tmp_path: Path) -> None:
    first, second = run_world(full_of_events, 2, tmp_path)
    assert "no room for the event" in first and first == second
    assert checkpoint.list_steps(tmp_path) == [1]


def leave(folder: Path, error: BaseException, alone: bool) -> Any:
    """Leaves by `error` while a save is in flight: all ranks together, or the last one alone."""
    waiting, gate = threading.Event(), threading.Event()

    def held() -> None:
        waiting.set()
        assert gate.wait(60)

    run = Started(folder, held)
    told = "nothing"
    try:
        with run.saver:
            run.save(1)
            if alone and run.world.rank == 0:
                run.saver.wait()
            if run.world.rank == 0:
                assert waiting.wait(60)
                gate.set()
            raise error
    except (RuntimeError, TitansError) as e:
        told = type(e).__name__
    if not alone:
        run.world.shut_down()
    return told


def test_an_error_of_all_ranks_lets_the_save_in_flight_complete(tmp_path: Path) -> None:
    error = DivergedError("loss nan", "finite", "lower the rate")
    assert run_world(leave, 2, tmp_path, error, False) == ["DivergedError"] * 2
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 1))["step"] == 1


LEAVING = """
import sys, time
from pathlib import Path
import torch
from tests.run.test_saver import Started
from titans_pretrain.parallel.layout import Fragment, Shard
folder = Path(sys.argv[1])
run = Started(folder)
flat = torch.randn(3000, 2000)  # a second of writing in many pieces
shards = [Shard(f"p{i}", (2000,)) for i in range(3000)]
run.fragments = [Fragment(s, 0, 2000, {"weight": t}) for s, t in zip(shards, flat)]
with run.saver:
    run.save(1)
    while not list(folder.glob(".writing*/*.distcp")):
        time.sleep(0.01)
    time.sleep(0.05)
    raise ValueError("this rank alone")
"""


def test_a_rank_that_leaves_alone_gives_its_save_up_and_ends_in_order(tmp_path: Path) -> None:
    """An interpreter that ends while torch writes in another thread ends in an abort (134)."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.rstrip().endswith("ValueError: this rank alone"), done.stderr
    assert checkpoint.list_steps(tmp_path) == []


def counted(folder: Path) -> Any:
    """Bytes of the host copy and the peak of the writing thread, over three saves."""
    original, peaks, copies = checkpoint.save, [], []

    def watched(checkpoints: Path, state: State, fragments: list[Fragment], *more: Any) -> Path:
        tensors = [t for f in fragments for t in f.tensors.values()]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        copies.append(held)
        with LiveBytes() as live:
            path = original(checkpoints, state, fragments, *more)
        peaks.append(live.peak)
        return path

    checkpoint.save = watched
    run = Started(folder)
    run.flats, run.fragments = large(run.world)
    ours = {f.untyped_storage().data_ptr() for f in run.flats.values()}
    for step in (1, 2, 3):
        run.save(step)
        run.saver.wait()
    return [sum(held.values()) for held in copies], peaks, [set(h) for h in copies], ours


PIECE, PIECES = 4096, 32  # numbers


def large(world: World) -> tuple[dict[str, torch.Tensor], list[Fragment]]:
    """A partition of whole tensors of equal size."""
    share = PIECES // world.size
    flats = {k: torch.randn(share * PIECE) for k in KINDS}
    fragments = [
        Fragment(
            Shard(f"p{world.rank * share + i}", (PIECE,)),
            *(0, PIECE),
            {k: flat.narrow(0, i * PIECE, PIECE) for k, flat in flats.items()},
        )
        for i in range(share)
    ]
    return flats, fragments


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rank_holds_more_than_its_partition_twice_and_one_tensor(
    ranks: int, tmp_path: Path
) -> None:
    partition = 3 * 4 * PIECE * PIECES // ranks
    for copies, peaks, where, ours in run_world(counted, ranks, tmp_path):
        assert copies == [partition] * 3, "the host copy: each number once"
        assert where[0] == where[1] == where[2], "in one place"
        assert not where[0] & ours
        assert all(peak <= 4 * PIECE + 8192 for peak in peaks), "beside it: one piece"
        assert partition / 5 > 4 * PIECE + 8192, "or the bound would say nothing"


def test_state_is_json_as_before(tmp_path: Path) -> None:
    run_world(changed_behind_it, 1, tmp_path, True)
    text = (tmp_path / "behind" / "step-00000005" / "state.json").read_text()
    assert json.loads(text) == {"format": checkpoint.FORMAT, **state_of(5)}
