"""A request to stop: SIGTERM, SIGUSR1 or SIGINT sets a flag that is read after each step.

The handlers only set the flag, so that no rank is cut off inside a step or a save; all ranks then
agree on the step after which they leave. A second Ctrl-C does what Ctrl-C always does. Imports no
torch: the handlers are installed before torch is (Slurm's warning may come during its import).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SAME = 1.0  # seconds in which a second SIGINT is taken for the first
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop. One a process, as signals are: see `install`."""

    def __init__(self) -> None:
        self._by: int | None = None
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._interrupted = float("inf")  # when SIGINT first came

    @property
    def requested(self) -> bool:
        return self._by is not None

    @property
    def reason(self) -> str:
        """The signal's name, or an empty string."""
        return signal.Signals(self._by).name if self._by is not None else ""

    def restore(self) -> None:
        """Puts the former handlers back and forgets a request."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._by = {}, None
        self._interrupted = float("inf")

    def _install(self) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return  # Python lets only the main thread set handlers
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            self._handle_in_child(number)
            return
        self._by = number if self._by is None else self._by
        if number == signal.SIGINT:
            # One Ctrl-C may come twice: from the terminal, and forwarded by a launcher.
            if time.monotonic() - self._interrupted > SAME:
                signal.default_int_handler(number, frame)
            self._interrupted = min(self._interrupted, time.monotonic())

    @staticmethod
    def _handle_in_child(number: int) -> None:
        """A forked loader process inherits the handlers. It goes when its parent goes: a signal to
        the whole process group must not take it from a parent that still finishes its step."""
        if number == signal.SIGTERM:  # but Process.terminate() must work
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_request = StopRequest()


def install() -> StopRequest:
    """Installs the handlers (once; later calls change nothing) and returns the one request."""
    global _request
    if _request._owner != os.getpid():  # a forked process that trains: its own request
        _request = StopRequest()
    _request._install()
    return _request


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """`install` for the length of a block, the former handlers put back after it."""
    request = install()
    try:
        yield request
    finally:
        request.restore()
