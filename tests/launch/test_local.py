"""The local launcher: environment, signals, exit codes, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titans_pretrain.errors import ConfigError
from titans_pretrain.launch.local import launch

LAUNCH = """
import sys
from pathlib import Path
from titans_pretrain.launch.local import launch
code = launch([sys.executable, "-c", sys.argv[1]], int(sys.argv[2]), logs=Path(sys.argv[3]),
              grace=float(sys.argv[4]))
assert "torch" not in sys.modules
sys.exit(code)
"""
# What a rank of the tests starts with: it says who it is and waits where it must.
RANK = """
import os, signal, sys, time
rank, folder = int(os.environ["RANK"]), os.environ["FOLDER"]
def here(name=""):
    path = os.path.join(folder, f"{name}{rank}")
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
def await_file(name):
    while not os.path.exists(os.path.join(folder, name)):
        time.sleep(0.01)
"""


def _start(folder: Path, body: str, ranks: int = 3, grace: float = 10.0) -> subprocess.Popen:
    command = [sys.executable, "-c", LAUNCH, RANK + body, str(ranks), str(folder), str(grace)]
    environment = {**os.environ, "FOLDER": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def _pids(folder: Path, names: list[str]) -> list[int]:
    deadline = time.monotonic() + 30
    while not all((folder / n).exists() for n in names):
        assert time.monotonic() < deadline, names
        time.sleep(0.01)
    return [int((folder / n).read_text()) for n in names]


def _gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if stat[0] == "Z" and os.getpid() != int(stat[1]):
            return True  # dead; whoever adopted it has not reaped it
        time.sleep(0.01)
    return False


def test_ranks_get_their_places_and_rank_0_the_console(tmp_path):
    body = """
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
print(*[os.environ[n] for n in names])
"""
    out, err = (run := _start(tmp_path, body)).communicate(timeout=60)
    assert run.returncode == 0, err
    *places, address, port = out.split()
    assert places == ["0", "0", "3", "3"]
    assert (address, 1024 < int(port) < 65536) == ("127.0.0.1", True)
    for rank in "12":
        other = (tmp_path / f"rank-0000{rank}.out").read_text().split()
        assert other == [rank, rank, "3", "3", address, port]


def test_the_first_failure_decides_and_the_others_are_ended(tmp_path):
    body = """
here()
if rank == 1:
    await_file("0"), await_file("deaf2")
    print("rank 1 cannot", file=sys.stderr)
    sys.exit(4)
if rank == 2:  # deaf: must be killed after the grace time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    here("deaf")
time.sleep(60)
"""
    start = time.monotonic()
    _, err = (run := _start(tmp_path, body, grace=0.5)).communicate(timeout=60)
    assert run.returncode == 4
    assert time.monotonic() - start < 30
    assert "rank 1 failed first (exit code 4)" in err
    assert "rank 1 cannot" in err
    assert all(_gone(pid) for pid in _pids(tmp_path, ["0", "1", "2"]))


def test_a_killed_rank_gives_128_plus_the_signal(tmp_path):
    body = """
if rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    _, err = (run := _start(tmp_path, body)).communicate(timeout=60)
    assert run.returncode == 137
    assert "rank 0 failed first (signal SIGKILL, which the kernel sends where memory runs" in err


@pytest.mark.parametrize(
    ("lost", "end", "code"),
    [
        ("sys.exit(76)", "sys.exit(3)", 3),
        ("sys.exit(76)", "sys.exit(77)", 77),
        ("sys.exit(76)", "time.sleep(60)", 76),
        ("os.abort()", "sys.exit(3)", 3),  # as NCCL's watchdog ends it
    ],
)
def test_a_rank_that_lost_another_is_not_the_cause(tmp_path, lost, end, code):
    body = f"""
if rank == 0:
    {lost}
await_file("rank-00001.out")
time.sleep(0.5)
{end}
"""
    _, err = (run := _start(tmp_path, body, ranks=2)).communicate(timeout=60)
    assert run.returncode == code
    assert f"rank {int(code != 76)} failed first (exit code {code}" in err
    assert ("failure-*.txt" in err) == (code == 77)


def test_saved_on_request_stays_75_and_the_slow_rank_is_awaited(tmp_path):
    body = """
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, f: stop.append(n))
here()
while not stop:
    time.sleep(0.01)
time.sleep(0.5 * rank)
here(f"saved-{signal.Signals(stop[0]).name}-")
sys.exit(75)
"""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        folder = tmp_path / number.name
        folder.mkdir()
        run = _start(folder, body)
        _pids(folder, ["0", "1", "2"])
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
        assert run.returncode == 75, err
        assert _pids(folder, [f"saved-{number.name}-{r}" for r in range(3)])


def test_a_failure_beside_saved_ranks_is_not_hidden(tmp_path):
    body = """
if rank == 1:
    sys.exit(75)
await_file("rank-00001.out")
time.sleep(0.3)
sys.exit(76 if rank == 2 else 75)
"""
    _, err = (run := _start(tmp_path, body)).communicate(timeout=60)
    assert run.returncode == 76, err


def test_ctrl_c_in_a_terminal_reaches_each_rank_once(tmp_path):
    """The terminal sends it to the launcher's whole process group."""
    body = """
got = []
signal.signal(signal.SIGINT, lambda n, f: got.append(n))
here()
while not got:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(75 if len(got) == 1 else 9)
"""
    run = _start(tmp_path, body, ranks=2)
    _pids(tmp_path, ["0", "1"])
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 75, err


def test_the_third_ctrl_c_kills(tmp_path):
    body = """
got = []
signal.signal(signal.SIGINT, lambda n, f: (got.append(n), here(f"{len(got)}-")))
here()
while True:
    time.sleep(0.01)
"""
    run = _start(tmp_path, body, ranks=2)
    pids = _pids(tmp_path, ["0", "1"])
    for count in (1, 2):
        run.send_signal(signal.SIGINT)
        _pids(tmp_path, [f"{count}-0", f"{count}-1"])
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 137
    assert all(_gone(pid) for pid in pids)


def test_the_ranks_die_with_a_killed_launcher(tmp_path):
    run = _start(tmp_path, "here()\ntime.sleep(60)\n")
    pids = _pids(tmp_path, ["0", "1", "2"])
    run.kill()
    run.wait(timeout=10)
    assert all(_gone(pid) for pid in pids)


def test_logs_that_cannot_be_written_are_a_config_error_before_any_start(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="output of rank 1"):
        launch(["false"], 2, logs=tmp_path / "logs")
