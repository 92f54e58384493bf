"""The watchdog of one rank: when it ends a run, when it does not, and what it writes."""

from __future__ import annotations

import _thread
import contextlib
import json
import linecache
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from titans_pretrain import phases
from titans_pretrain.config import WatchdogConfig
from titans_pretrain.phases import phase
from titans_pretrain.run import hang_report
from titans_pretrain.run import watchdog as watchdog_module
from titans_pretrain.run.hang_report import behind, words
from titans_pretrain.run.marks import Marks
from titans_pretrain.run.roll import LEFT, Beat, Seen
from titans_pretrain.run.watchdog import Watchdog

LOST = "lost-rank-life-000000.txt"
WAIT = "handle.wait()"
OFF = {"step_minutes": 0, "start_minutes": 0, "data_minutes": 0, "checkpoint_minutes": 0}


@pytest.fixture(autouse=True)
def no_step() -> Iterator[None]:
    yield
    phases.at_step(0)


def watchdog(folder: Path, codes: list[int] | None = None, **limits: float) -> Watchdog:
    # What it needs of a run's config.
    config: Any = SimpleNamespace(folder=str(folder), watchdog=WatchdogConfig(**limits))
    return Watchdog(config, (codes if codes is not None else []).append)


def pass_time(dog: Watchdog, seconds: int) -> list[str]:
    """Looks each second; what it said."""
    return [why for _ in range(seconds) if (why := dog.look(1.0))]


@contextlib.contextmanager
def in_step(dog: Watchdog, step: int, *names: str) -> Iterator[None]:
    phases.at_step(step)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(phase(name))
        yield


@pytest.mark.parametrize(
    ("names", "step", "limit", "minutes"),
    [
        (("backward", "forward"), 8, "step_minutes", 1),
        (("validation",), 8, "step_minutes", 1),
        ((), 8, "step_minutes", 1),
        (("data",), 8, "data_minutes", 3),
        (("checkpoint",), 8, "checkpoint_minutes", 4),
        (("backward", "forward"), 7, "start_minutes", 2),  # the first step of this life compiles
        (("data",), 7, "data_minutes", 3),
        (("loading",), 0, "start_minutes", 2),
        (("loading",), 8, "start_minutes", 2),  # back to a checkpoint
    ],
)
def test_each_kind_of_phase_has_its_limit(
    names: tuple[str, ...], step: int, limit: str, minutes: int, tmp_path: Path
) -> None:
    dog = watchdog(tmp_path, step_minutes=1, start_minutes=2, data_minutes=3, checkpoint_minutes=4)
    for _ in range(7, step + 1):
        dog.fed([])
    with in_step(dog, step, *names):
        dog.look(1.0)  # sees the progress
        assert pass_time(dog, 60 * minutes - 1) == []
        (why,) = pass_time(dog, 1)
    place = " > ".join(names) or "between phases"
    assert f"no progress for {60 * minutes} s in step {step}, {place}" in why
    assert why.endswith(f"(watchdog.{limit}={minutes})")


def test_the_limit_counts_from_the_last_progress(tmp_path: Path) -> None:
    dog = watchdog(tmp_path, step_minutes=1, start_minutes=1)
    with in_step(dog, 5, "validation"):
        dog.look(1.0)
        for _ in range(10):  # a validation of ten minutes
            with phase("forward"):
                assert pass_time(dog, 59) == []
            assert pass_time(dog, 59) == []
        assert pass_time(dog, 1) == [], "59 s and the second that saw the end of the forward"
        assert len(pass_time(dog, 1)) == 1
    phases.at_step(6)  # a step that begins is progress, too
    assert pass_time(dog, 60) == []
    assert len(pass_time(dog, 1)) == 1


def test_a_process_that_was_stopped_is_not_blamed(tmp_path: Path) -> None:
    dog = watchdog(tmp_path, step_minutes=1, start_minutes=1)
    with in_step(dog, 5, "forward"):
        dog.look(1.0)
        assert dog.look(3600.0) == ""  # an hour of Ctrl-Z counts as five seconds
        assert pass_time(dog, 54) == []
        assert len(pass_time(dog, 1)) == 1


@pytest.mark.parametrize("limit", [*OFF, None])
def test_0_is_no_limit(limit: str | None, tmp_path: Path) -> None:
    limits = {**OFF, **({limit: 1} if limit else {})}
    kinds = {"step_minutes": 5, "start_minutes": 0, "data_minutes": 5, "checkpoint_minutes": 5}
    names = {"data_minutes": ["data"], "checkpoint_minutes": ["checkpoint"]}
    for kind, step in kinds.items():
        dog = watchdog(tmp_path, **limits)
        for _ in range(step):
            dog.fed([])
        with in_step(dog, step, *names.get(kind, [])):
            dog.look(1.0)
            assert bool(pass_time(dog, 60)) == (kind == limit), kind


def test_off_starts_no_thread_and_never_ends(tmp_path: Path) -> None:
    codes: list[int] = []
    with watchdog(tmp_path, codes, **OFF, silent_seconds=0) as dog:
        world: Any = SimpleNamespace(rank=0, size=2)
        dog.joined(world, contextlib.ExitStack())  # without a process group, a roll would fail
        assert "watchdog" not in [t.name for t in threading.enumerate()]
        assert pass_time(dog, 10_000) == []
    assert codes == [] and list(tmp_path.iterdir()) == []


def test_collectives_wait_longer_than_the_watchdog(tmp_path: Path) -> None:
    assert watchdog(tmp_path).timeout_s == 2100
    assert watchdog(tmp_path, checkpoint_minutes=120).timeout_s == 7500
    assert watchdog(tmp_path, **OFF).timeout_s == 1800


def stuck_here(codes: list[int]) -> None:
    late = time.monotonic() + 30
    while not codes and time.monotonic() < late:
        time.sleep(0.01)


def test_the_report_of_a_rank_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    codes: list[int] = []
    batches: Any = [SimpleNamespace(samples=torch.tensor([40, 41])) for _ in range(2)]
    with watchdog(tmp_path / "run", codes, step_minutes=0.005, start_minutes=0.005) as dog:
        dog.fed(batches)
        with in_step(dog, 12, "backward", "forward"):
            stuck_here(codes)
    assert codes == [77]
    (path,) = (tmp_path / "run").glob("failure-*-rank-00003.txt")
    text = path.read_text()
    assert text.startswith("rank 3 of 4 on ") and "job 4711, ended by its watchdog" in text
    assert "this rank:  step 12, backward > forward; no progress for 0 s" in text
    assert "waits in:   no collective" in text
    assert "samples:    40 41; 40 41" in text
    main = text[text.index("thread MainThread") :].split("\n\n")[0]
    assert "in stuck_here" in main and "time.sleep(0.01)" in main
    assert "thread watchdog, innermost" in text
    told = capsys.readouterr().err
    assert told.startswith("titans-pretrain: hang: rank 3 on ") and str(path) in told


def fails_here() -> None:
    raise RuntimeError("Connection closed by peer [10.0.0.2]:4242\nand more")


def test_a_lost_rank_is_told_of_once(tmp_path: Path) -> None:
    batches: Any = [SimpleNamespace(samples=torch.tensor([40, 41]))]
    for _ in range(2):  # two that are left
        dog = watchdog(tmp_path, [])
        dog.fed(batches)
        with pytest.raises(RuntimeError) as met:
            fails_here()
        dog.lost(met.value)
    (path,) = tmp_path.glob("lost-rank-*")
    text = path.read_text()
    assert path.name == LOST
    assert "left with exit code 76: another rank is gone" in text.splitlines()[0]
    assert "why:        lost another rank: Connection closed by peer [10.0.0.2]:4242\n" in text
    assert "samples:    40 41\n" in text and "in fails_here" in text
    assert "waits in:" not in text


def test_a_job_script_is_told_of_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    monkeypatch.setenv("TITANS_JOB", "7.2")
    codes: list[int] = []
    with watchdog(tmp_path, codes, start_minutes=0.005):
        stuck_here(codes)
    failure = Marks(tmp_path, "7", 2).failure()
    assert failure is not None
    assert (failure.code, failure.kind) == (77, "HangError")
    assert "(watchdog.start_minutes=0.005)" in failure.what


def test_a_folder_that_refuses_gets_its_report_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("no folder")
    codes: list[int] = []
    with watchdog(tmp_path / "run", codes, start_minutes=0.005):
        stuck_here(codes)
    assert codes == [77]
    assert "in stuck_here" in capsys.readouterr().err


def test_an_end_in_order_is_not_disturbed(tmp_path: Path) -> None:
    codes: list[int] = []
    with watchdog(tmp_path, codes, start_minutes=0.005):
        pass
    time.sleep(0.5)
    assert codes == []


def test_a_report_that_fails_tells_what_is_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **named: Any) -> Any:
        raise KeyError("no such group")

    monkeypatch.setattr(watchdog_module, "describe", fails)
    monkeypatch.setattr(watchdog_module, "recorded", fails)
    codes: list[int] = []
    with watchdog(tmp_path, codes, start_minutes=0.005):
        stuck_here(codes)
    assert codes == [77]
    (path,) = tmp_path.glob("failure-*")
    text = path.read_text()
    assert text.startswith("why:        rank 0 on ") and "(watchdog.start_minutes=0.005)" in text
    assert "KeyError: 'no such group'" in text and "in stuck_here" in text
    for told in ("the report of this rank is cut short", "without what torch's flight recorder"):
        (record,) = (r for r in caplog.records if told in r.getMessage())
        assert record.exc_info is not None
    watchdog(tmp_path).lost(RuntimeError("Connection closed"))  # nor does it hide the loss
    assert "lost another rank: Connection closed" in (tmp_path / LOST).read_text()


def test_a_look_that_fails_is_logged_and_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    with watchdog(tmp_path, codes, start_minutes=0.005) as dog:
        look, failed = dog.look, []

        def fails(passed: float) -> str:
            if not failed:
                failed.append(passed)
                raise KeyError("no such rank")
            return look(passed)

        monkeypatch.setattr(dog, "look", fails)
        stuck_here(codes)
    assert codes == [77]
    (record,) = (r for r in caplog.records if "could not look" in r.getMessage())
    assert record.exc_info is not None and isinstance(record.exc_info[1], KeyError)


def test_both_of_torchs_recorders_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own is not in a torch without CUDA: what is read here stands for it."""

    def entry(number: int, name: str, p2p: bool = False, **more: Any) -> dict[str, Any]:
        at = {"is_p2p": p2p, "p2p_seq_id": number * p2p, "collective_seq_id": number * (not p2p)}
        what = {"profiling_name": name, "input_sizes": [[4]], "process_group": ["0", "data"]}
        return {**at, **what, "state": "scheduled", "retired": False, **more}

    nccl = [entry(n, "nccl:all_reduce") for n in range(5, 14)]
    nccl.insert(0, entry(4, "nccl:all_reduce", retired=True))
    gloo = [entry(5, "nccl:all_reduce"), entry(2, "gloo:send", p2p=True)]
    for name, entries in (("_dump_nccl_trace_json", nccl), ("_dump_fr_trace_json", gloo)):
        text = json.dumps({"entries": entries}).encode()
        monkeypatch.setattr(
            hang_report.c10d, name, lambda collectives, active, text=text: text, raising=False
        )
    head, *lines = hang_report.recorded().splitlines()
    assert head.startswith("torch's flight recorder, what is not done")
    first = "  number {}, nccl:all_reduce of [[4]] in group data: scheduled"
    assert lines == [*(first.format(n) for n in range(5, 13)), "  and 2 more"]
    monkeypatch.delattr(hang_report.c10d, "_dump_nccl_trace_json")
    assert hang_report.recorded().splitlines()[2].startswith("  number 2, gloo:send of [[4]] in")


def seen(rank: int, silent: float = 0.0, **place: Any) -> Seen:
    return Seen(Beat(rank, f"n{rank}", 100 + rank, **place), silent)


def test_who_is_waited_for() -> None:
    waiting = {"step": 9, "pulse": 50, "waits_in": "all_reduce"}
    alike = [seen(r, **waiting) for r in range(3)]
    assert behind(alike, 8) == []
    # Not heard of: nothing else counts.
    lost = seen(3, 62.0, step=41, phase="forward")
    assert behind([*alike, lost, seen(4, step=1)], 8) == [
        "rank 3 on n3 (pid 103) has not been heard of for 62 s; last in step 41, forward"
    ]
    failed = seen(3, step=9, state="ValueError: no")
    assert behind([*alike, failed], 8) == [
        "rank 3 on n3 (pid 103) left with ValueError: no; last in step 9, between phases"
    ]
    # One that is done is not waited for, however long it is silent.
    assert behind([*alike, seen(3, 99.0, step=1, state=LEFT)], 8) == []
    # An earlier step; then no collective; then fewer phases.
    assert behind([*alike, seen(3, step=8, pulse=60, waits_in="barrier")], 8) == [
        "rank 3 on n3 (pid 103) is behind: step 8, between phases, in barrier, no progress for 0 s"
    ]
    assert [w[:6] for w in behind([*alike, seen(3, step=9, pulse=60)], 8)] == ["rank 3"]
    free = [seen(r, step=9, pulse=50) for r in range(3)]
    assert [w[:6] for w in behind([*free, seen(3, step=9, pulse=49)], 8)] == ["rank 3"]
    assert words(Seen(Beat(2, "?", 0), 7.0)).endswith("has never been heard of, for 7 s")


@pytest.mark.parametrize(
    ("module", "line", "waits"),
    [
        ("megatron.core.pipeline_parallel.p2p_communication", "handle.wait()", True),
        ("titans_pretrain.parallel.links", WAIT, True),
        ("titans_pretrain.parallel.links", "handle.other()", False),
        ("titans_pretrain.data.loader", "handle.wait()", False),
        ("torch.distributed.distributed_c10d", "handle.other()", True),
    ],
)
def test_what_counts_as_waiting_for_ranks(module: str, line: str, waits: bool) -> None:
    def look() -> bool:
        return hang_report._waits(sys._getframe(1))

    assert receiver(module, line)(SimpleNamespace(wait=look, other=look)) == waits


def receiver(module: str, line: str) -> Any:
    """A function of that module which consists of that line, on a `handle`."""
    source, name = f"def receive(handle):\n    return {line}\n", f"<{module} {line}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(source, name, "exec"), scope)
    return scope["receive"]


@pytest.mark.parametrize(("started_by_python", "waits"), [(False, "receive"), (True, "")])
def test_a_thread_of_autograd_waits_for_training(started_by_python: bool, waits: str) -> None:
    """On a GPU the backward runs in threads that Python has not started, as this one; a thread that
    it has started saves, or looks on."""
    lock, receive = _thread.allocate_lock(), receiver("titans_pretrain.parallel.link", WAIT)
    lock.acquire()
    handle = SimpleNamespace(wait=lock.acquire)
    if started_by_python:
        threading.Thread(target=receive, args=(handle,), daemon=True).start()
    else:
        _thread.start_new_thread(receive, (handle,))
    try:
        end = time.monotonic() + 5
        while not any(f.f_code.co_name == "receive" for f in sys._current_frames().values()):
            assert time.monotonic() < end
        assert hang_report.waits_in() == waits
        assert hang_report._collective() == waits
    finally:
        lock.release()
