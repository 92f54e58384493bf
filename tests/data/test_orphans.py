"""Loader processes end with the rank that started them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import os, sys, time
import psutil
from tests.data.test_stream import stream
if __name__ == "__main__":
    batches = stream(sys.argv[1], workers=2).batches(stream(sys.argv[1]).start())
    next(batches)
    print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
    if sys.argv[2] == "killed":
        time.sleep(60)
    kept = [batches]
    kept.append(kept)  # an iterator that nobody closes
"""


@pytest.mark.parametrize("how", ["killed", "left open"])
def test_loaders_do_not_outlive_their_rank(how: str, prepared: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen(
        [sys.executable, str(script), str(prepared), how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert rank.stdout is not None
    started = [int(pid) for pid in rank.stdout.readline().split()]
    assert len(started) >= 3  # two workers, and the process that they are forked from
    if how == "killed":
        rank.send_signal(signal.SIGKILL)
    assert rank.wait(30) == (-signal.SIGKILL if how == "killed" else 0)
    end = time.monotonic() + 15
    while time.monotonic() < end and any(psutil.pid_exists(pid) for pid in started):
        time.sleep(0.1)
    assert not [pid for pid in started if psutil.pid_exists(pid)]
