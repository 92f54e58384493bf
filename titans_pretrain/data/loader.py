"""The processes that read ahead for a rank: which signals they see, and when they end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}  # signals that ask a run to stop


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes started meanwhile never see the signals that ask a run to stop.

    Such a signal often goes to the whole process group (Ctrl-C in a terminal, a scheduler's
    warning). The rank then still finishes its step and saves; its loaders must live that long.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        # The processes behind the workers start here as well. The first of them is started by code
        # that leaves two of the signals unblocked in this one.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_with_parent(_: int) -> None:
    """In a worker: ends it with the rank that started it, or at that rank's word.

    A forkserver's children do not see that the process that asked for them is gone (torch looks at
    their parent, which is the server): after a kill -9 they would stay for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # the server may have been there before

    def watch() -> None:
        while parent.is_alive():
            told = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if told is not None and told.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=watch, name="live-with-parent", daemon=True).start()


def as_read(rows: Any) -> Any:
    """The loader's collate function: what the dataset gives is a batch already."""
    return rows
