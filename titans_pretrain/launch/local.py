"""Starts the ranks of a run on this machine and watches them; knows nothing of torch.

Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment, as under torchrun. Each rank leads a process group of its own: Ctrl-C reaches it once,
through the launcher. The ranks die with the launcher, even if it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from titans_pretrain.errors import EXIT_DONE, EXIT_HANG, EXIT_NODE, EXIT_SAVED, NodeError
from titans_pretrain.run.files import storage_error

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_POLL = 0.02  # seconds
_CAUSE = 3.0  # seconds in which a rank that lost another may be followed by the one it lost
# How a rank ends that lost another: by itself, or by NCCL's watchdog.
_CONSEQUENCES = (EXIT_NODE, -signal.SIGABRT)
_TAIL = 30  # lines of a failed rank that the console shows
_PR_SET_PDEATHSIG = 1


def as_ranks(arguments: Sequence[str], ranks: int | None) -> int | None:
    """Runs this command again as `ranks` ranks and returns their exit code; None where there is
    nothing to start: this process is a rank already, or works alone (ranks None).

    Args:
        arguments: of `titans-pretrain`. For what leaves no run folder: logs go to a temporary one.
    """
    if ranks is None or "RANK" in os.environ:
        return None
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "titans_pretrain", *arguments]
        return launch(command, ranks, logs=Path(logs))


def launch(command: Sequence[str], ranks: int, *, logs: Path, grace: float = 5.0) -> int:
    """Runs `command` as ranks 0..ranks-1 and returns the run's exit code.

    Rank 0 writes to this console, the others to `logs`/rank-NNNNN.out. If a rank fails, the others
    get SIGTERM and, `grace` seconds later, SIGKILL; the exit code is that of the first rank that
    failed, 128 + n if signal n ended it. A rank that leaves with 75 (saved on request) has not
    failed: the others are awaited, and 75 is returned. SIGTERM, SIGINT and SIGUSR1 are forwarded;
    the third Ctrl-C kills. Raises ConfigError or NodeError if `logs` cannot be written.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_output(logs, rank)) for rank in range(1, ranks)]
        stack.callback(end, processes, 0.0)  # whatever happens, no rank stays behind
        stack.enter_context(forwarding(processes))
        port = str(free_port())
        for rank in range(ranks):
            stream = outputs[rank - 1] if rank else None
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **_environment(rank, ranks, port)},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    process_group=0,
                    preexec_fn=dies_with(os.getpid()),
                )
            )
        failed = _first_failure(processes)
        if failed is None:
            saved = any(p.returncode == EXIT_SAVED for p in processes)
            return EXIT_SAVED if saved else EXIT_DONE
        end(processes, grace)
        code = processes[failed].returncode
        _tell(failed, code, outputs[failed - 1] if failed else None)
        return code if code > 0 else 128 - code


def _environment(rank: int, ranks: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONUNBUFFERED": "1",  # a killed rank's last words
    }


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives nobody until it is used: it lies
    below those for outgoing connections. Raises NodeError if there is none."""
    below = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else 32768
    chance = random.SystemRandom()  # others that look for one right now look elsewhere
    for _ in range(100):
        port = chance.randrange(max(1024, below - 16384), max(2048, below))
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise NodeError(
        "no free port in a hundred tries",
        "ranks of one machine meet at a port of 127.0.0.1",
        "end what holds so many ports (ss -tlnp), or start the ranks by another launcher",
    )


def _output(logs: Path, rank: int) -> IO[bytes]:
    try:
        logs.mkdir(parents=True, exist_ok=True)
        return (logs / f"rank-{rank:05d}.out").open("a+b")
    except OSError as e:
        raise storage_error(e, f"opening the output of rank {rank} in {logs}", starting=True) from e


def dies_with(parent: int) -> Callable[[], None]:
    """What a new process runs first: the kernel kills it when its launcher is gone."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # gone before the call
                os.kill(os.getpid(), signal.SIGKILL)

    return prepare


@contextlib.contextmanager
def forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Passes requests to stop on to `processes`; gives the list of those received so far."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            _send(process, signal.SIGKILL if received.count(signal.SIGINT) > 2 else number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)  # does nothing once the process has been reaped


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all ranks are done (None) or one has failed: its number."""
    patience = float("inf")
    while True:
        codes = [p.poll() for p in processes]
        bad = [r for r, c in enumerate(codes) if c not in (None, EXIT_DONE, EXIT_SAVED)]
        if bad:
            # A killed rank is the cause, and one that only lost a peer the consequence: the peer
            # closes its connections before it is gone itself.
            cause = min(bad, key=lambda r: (codes[r] in _CONSEQUENCES, (codes[r] or 0) > 0, r))
            patience = min(patience, time.monotonic() + _CAUSE)
            found = codes[cause] not in _CONSEQUENCES
            if found or None not in codes or time.monotonic() > patience:
                return cause
        if None not in codes:
            return None
        time.sleep(_POLL)


def end(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Ends and reaps what still runs: SIGTERM, then SIGKILL after `grace` seconds."""
    left = [p for p in processes if p.poll() is None]
    if grace > 0:
        for process in left:
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while any(p.poll() is None for p in left) and time.monotonic() < deadline:
            time.sleep(_POLL)
    for process in left:
        _send(process, signal.SIGKILL)
        process.wait()


def _tell(rank: int, code: int, output: IO[bytes] | None) -> None:
    how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    if code == EXIT_HANG:
        how += ", a hang: the run folder's failure-*.txt tell where the ranks stood"
    if code == -signal.SIGKILL:
        how += ", which the kernel sends where memory runs out: see dmesg"
    print(f"rank {rank} failed first ({how}); the other ranks were ended", file=sys.stderr)
    if output is not None:
        output.seek(max(0, output.seek(0, os.SEEK_END) - (1 << 16)))
        lines = output.read().decode(errors="replace").splitlines()[-_TAIL:]
        if lines:
            print(f"its last lines ({output.name}):", *lines, sep="\n  ", file=sys.stderr)
