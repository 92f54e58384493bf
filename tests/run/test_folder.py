"""The run folder's lock: one life at a time, dead holders taken over, older lives fenced off."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titans_pretrain.errors import ConfigError, NodeError
from titans_pretrain.run import lock as lock_module
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.folder import RunFolder

HOLD = """
import sys, time
from titans_pretrain.run.folder import RunFolder
lock = RunFolder(sys.argv[1]).take()
print(lock.life, flush=True)
time.sleep(60)
"""


def _claim(path: Path, life: int) -> dict:
    return json.loads((path / f"lock.{life:06d}").read_text())


def _edit(path: Path, life: int, *, age: float, **values: object) -> None:
    """Rewrites a claim as another process would have left it `age` seconds ago."""
    file = path / f"lock.{life:06d}"
    file.write_text(json.dumps({**_claim(path, life), **values}))
    os.utime(file, (time.time() - age, time.time() - age))


def _locks(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if "lock" in p.name)


def test_a_claim_names_its_process_and_lives_count_up(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    with folder.take() as lock:
        claim = _claim(folder.path, 1)
        assert lock.life == claim["life"] == 1
        assert claim["host"] == socket.gethostname()
        assert claim["pid"] == os.getpid()
        assert claim["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert abs(claim["heartbeat"] - time.time()) < 5
        assert lock.still_mine()
        assert folder.checkpoints.is_dir()
        assert folder.logs.is_dir()
        assert folder.log(3) == folder.path / "logs" / "rank-00003.log"
    assert _claim(folder.path, 1)["released"] is True
    with folder.take() as lock:
        assert lock.life == 2
        assert _locks(folder.path) == ["lock.000002"]  # nothing temporary, no old claim


def test_a_held_folder_is_refused_naming_the_holder_and_left_as_it_was(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.take() as lock:
        before = (tmp_path / "lock.000001").read_bytes()
        with pytest.raises(ConfigError) as e:
            folder.take()
        text = str(e.value)
        assert "run folder in use" in text
        assert f"pid {os.getpid()} on {socket.gethostname()}" in text
        assert "heartbeat 0 s old" in text
        assert f"kill {os.getpid()}" in text
        assert e.value.exit_code == 2
        assert (tmp_path / "lock.000001").read_bytes() == before
        assert _locks(tmp_path) == ["lock.000001"]
        assert lock.still_mine()


def test_kill_9_frees_the_folder_at_once_even_as_a_zombie(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline().strip() == "1"
    with pytest.raises(ConfigError, match=f"pid {holder.pid} "):
        RunFolder(tmp_path).take()
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while lock_module._started(holder.pid) and time.monotonic() < deadline:
        time.sleep(0.01)  # not reaped: it stays a zombie until wait() below
    with RunFolder(tmp_path).take() as lock:
        assert lock.life == 2
    assert holder.wait(timeout=10) == -signal.SIGKILL


def test_a_reused_pid_and_another_boot_are_dead(tmp_path):
    folder = RunFolder(tmp_path)
    first = folder.take()
    _edit(tmp_path, 1, age=0, started="12345")  # our pid, but another process
    with folder.take() as second:
        assert second.life == 2
        assert not first.still_mine()
        _edit(tmp_path, 2, age=0, boot="another-boot")
        with folder.take() as third:
            assert third.life == 3
            assert [x.still_mine() for x in (first, second, third)] == [False, False, True]
    first.release()
    assert _locks(tmp_path) == ["lock.000003"]


@pytest.mark.parametrize("elsewhere", [{"host": "node-b"}, {"namespace": "pid:[1]"}])
def test_another_host_or_namespace_is_judged_by_its_heartbeat(tmp_path, elsewhere):
    folder = RunFolder(tmp_path)
    old = folder.take(beat=1000)
    _edit(tmp_path, 1, age=60, pid=2**22 + 1, **elsewhere)
    with pytest.raises(ConfigError, match=r"last sign of life 60 s ago.*start again in 60 s"):
        folder.take()
    with pytest.raises(ConfigError, match="in use"):
        folder.take(bound=61)
    with folder.take(bound=59) as new:
        assert new.life == 2
        assert not old.still_mine()
        with pytest.raises(ConfigError, match="no longer belongs to life 1"):
            old.require_mine()
    old.release()


def test_the_heartbeat_touches_the_claim_and_stops_when_it_is_cleared(tmp_path):
    folder = RunFolder(tmp_path)
    old = folder.take(beat=0.05)
    path = tmp_path / "lock.000001"
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 10
    # A newer life takes over while the old one still beats: it must not bring its claim back.
    (tmp_path / "lock.000002").write_text(_claim_text(life=2))
    path.unlink()
    old._thread.join(timeout=10)
    assert not old._thread.is_alive()
    assert _locks(tmp_path) == ["lock.000002"]


def test_a_claim_brought_back_by_a_beat_goes_again_and_the_beat_stops(tmp_path):
    old = RunFolder(tmp_path).take(beat=0.05)
    # What a beat leaves that was renaming its file while the newer life cleared it.
    (tmp_path / "lock.000002").write_text(_claim_text(life=2))
    old._thread.join(timeout=10)
    assert not old._thread.is_alive()
    assert _locks(tmp_path) == ["lock.000002"]


def _claim_text(life: int, **values: object) -> str:
    claim = lock_module.Claim.of_this_process(life)
    return json.dumps({**claim.__dict__, **values})


@pytest.mark.parametrize(
    ("job", "taken"), [("7.2", True), ("7.1", False), ("7.0", False), ("8.2", False), ("", False)]
)
def test_only_a_later_life_of_the_same_job_takes_over_at_once(tmp_path, monkeypatch, job, taken):
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    monkeypatch.setenv("TITANS_JOB", "7.1")
    folder.take()
    _edit(tmp_path, 1, age=0, host="n1")
    monkeypatch.setenv("TITANS_JOB", job)
    if taken:
        assert folder.take().life == 2
    else:
        with pytest.raises(ConfigError, match="on n1"):
            folder.take()


def test_a_beat_on_a_full_disk_still_shows_life(tmp_path, monkeypatch):
    lock = RunFolder(tmp_path).take(beat=0.05)
    path = tmp_path / "lock.000001"

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    content = path.read_bytes()
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > 1
    assert path.read_bytes().split(b'"heartbeat"')[0] == content.split(b'"heartbeat"')[0]
    lock.release()


def test_of_many_that_find_a_dead_holder_exactly_one_takes_over(tmp_path):
    folder = RunFolder(tmp_path)
    folder.take()
    _edit(tmp_path, 1, age=0, started="12345")
    script = """
import sys, time
from titans_pretrain.errors import ConfigError
from titans_pretrain.run.folder import RunFolder
while time.time() < float(sys.argv[2]):
    pass
try:
    print(RunFolder(sys.argv[1]).take().life, flush=True)
except ConfigError:
    print("refused", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(time.time() + 3)]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(8)]
    told = [r.stdout.readline().strip() for r in racers]
    for r in racers:
        r.communicate(timeout=30)
    assert sorted(told) == ["2"] + ["refused"] * 7


def test_a_sleeper_cannot_fill_a_gap_below_a_newer_life(tmp_path, monkeypatch):
    """It saw an empty folder, slept while lives 1 and 2 passed and 3 started, then creates 1."""
    folder = RunFolder(tmp_path)
    (tmp_path / "lock.000003").write_text(_claim_text(life=3))
    real, calls = lock_module._claims, []

    def stale_once(path):
        calls.append(path)
        return real(path) if len(calls) > 1 else []

    monkeypatch.setattr(lock_module, "_claims", stale_once)
    with pytest.raises(ConfigError, match="held by life 3"):
        folder.take()
    assert _locks(tmp_path) == ["lock.000003"]


def test_a_claim_taken_a_moment_ago_is_seen_although_the_list_was_older(tmp_path, monkeypatch):
    (tmp_path / "lock.000001").write_text(_claim_text(life=1, released=True))
    other = _claim_text(life=2)
    (tmp_path / "lock.000002").write_text(other)
    real, calls = lock_module._claims, []

    def stale_once(path):
        calls.append(path)
        return real(path) if len(calls) > 1 else [1]

    monkeypatch.setattr(lock_module, "_claims", stale_once)
    with pytest.raises(ConfigError, match="held by life 2"):
        RunFolder(tmp_path).take()
    assert (tmp_path / "lock.000002").read_text() == other


def test_without_hard_links_the_claim_is_created_exclusively(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "link", no_links)
    with RunFolder(tmp_path).take() as lock:
        assert lock.life == 1
        with pytest.raises(ConfigError, match="in use"):
            RunFolder(tmp_path).take()


def test_a_damaged_claim_counts_as_alive_until_it_is_old(tmp_path):
    (tmp_path / "lock.000004").write_text('{"host": "no')
    with pytest.raises(ConfigError, match=r"life 4 \(unreadable claim\)"):
        RunFolder(tmp_path).take()
    os.utime(tmp_path / "lock.000004", (1, 1))
    with RunFolder(tmp_path).take() as lock:
        assert lock.life == 5


def test_a_path_below_a_file_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        RunFolder(tmp_path / "file" / "run").take()


def test_a_full_disk_is_a_node_error_and_leaves_the_former_content(tmp_path):
    """A real refusal by the kernel: the process may not write a single byte to a file."""
    folder = RunFolder(tmp_path)
    folder.take().release()
    folder.write_config("a: 1\n")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    script = """
import resource, sys
from titans_pretrain.errors import TitansError
from titans_pretrain.run.folder import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
for work in (lambda f: f.take(), lambda f: f.write_config("b: 2")):
    try:
        work(RunFolder(sys.argv[1]))
    except TitansError as e:
        print(type(e).__name__, e.exit_code, "free space" in str(e))
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert out.stdout.splitlines() == ["NodeError 76 True"] * 2, out.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("number", "starting", "kind"),
    [
        (errno.EACCES, True, ConfigError),
        (errno.EACCES, False, NodeError),
        (errno.EROFS, True, NodeError),
        (errno.ENOSPC, True, NodeError),
        (errno.EIO, False, NodeError),
    ],
)
def test_which_failures_are_the_users_and_which_the_nodes(number, starting, kind):
    error = storage_error(OSError(number, os.strerror(number)), "writing x", starting=starting)
    assert type(error) is kind
    assert f"writing x: {os.strerror(number)}" in str(error)


def test_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "config.yaml"
    atomic_write(path, "first")
    atomic_write(path, "second")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path):
    lock = RunFolder(tmp_path).take()
    lock._claim = lock_module.Claim(**{**lock._claim.__dict__, "pid": os.getpid() + 1})
    lock.release()
    assert _claim(tmp_path, 1)["released"] is False
