"""The processes that read ahead for a rank: how they start, what they see of signals, their end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader

from titans_pretrain.errors import NodeError, TitansError

PREFETCH = 2  # batches read ahead by each worker
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


def start_loader(dataset: Any, workers: int, **plan: Any) -> Iterator[Any]:
    """Starts `workers` processes that read the dataset ahead; what they read. `plan`: DataLoader's
    arguments that say what is read. A TitansError met there comes as a value (see `next_read`)."""
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_read,
        prefetch_factor=PREFETCH,
        multiprocessing_context="forkserver",  # a fork after backward may hang
        generator=torch.Generator(),  # or the loader would draw from the global one
        worker_init_fn=live_with_parent,
        **plan,
    )
    with stop_signals_blocked():
        return iter(loader)  # starts the workers


def next_read(loaded: Iterator[Any]) -> Any:
    """The next that was read. Raises what the reading process met (it comes as a value: on its way
    an exception would lose its fields), NodeError where that process is gone."""
    try:
        read = next(loaded)
    except (RuntimeError, OSError, EOFError) as e:
        raise NodeError(
            f"data worker: {e}",
            "loader processes live as long as the run",
            "look for the system's out-of-memory killer; lower data.workers",
        ) from e
    if isinstance(read, TitansError):
        raise read
    return read


def _as_read(rows: Any) -> Any:
    """What the dataset gives is a batch already."""
    return rows
