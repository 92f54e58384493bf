"""Runs tasks in processes, with progress and an estimate of the time left."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from titans_pretrain.errors import NodeError

EVERY = 10.0  # seconds between progress lines (0.5 on a terminal)

Report = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """function(*arguments, report), to run in a process; `report(n)` counts n bytes as done."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]


class Pool:
    """Up to `workers` processes; one task or one worker runs in this process."""

    def __init__(self, workers: int, say: Callable[[str], None]) -> None:
        self.workers, self.say = workers, say

    def run(self, tasks: list[Task], what: str, total: int) -> None:
        """Runs the tasks; the first error ends the run, after tasks under way. `total` bytes.

        Raises what a task raises, and NodeError when a process dies.
        """
        if not tasks:
            return
        progress = _Progress(what, total, self.say)
        if min(self.workers, len(tasks)) <= 1:
            for task in tasks:
                task.function(*task.arguments, progress.add)
        else:
            self._in_processes(tasks, progress)
        progress.finish()

    def _in_processes(self, tasks: list[Task], progress: _Progress) -> None:
        context = multiprocessing.get_context("spawn")
        counter = context.Value("Q", 0)
        executor = ProcessPoolExecutor(
            min(self.workers, len(tasks)), context, _begin, (counter, os.getpid())
        )
        try:
            waiting: set[Future[None]] = {executor.submit(_run, task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                progress.set(counter.value)
                for future in done:
                    future.result()
        except BrokenProcessPool as e:
            raise NodeError(
                "a process of prepare was killed",
                "processes live until their work is done",
                "look for the system's out-of-memory killer, lower --workers, and run the same "
                "command again: finished work is kept",
            ) from e
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_counter: Any = None


def _begin(counter: Any, parent: int) -> None:
    global _counter
    _counter = counter

    def watch() -> None:
        # A killed parent cannot stop its processes: they must notice.
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(task: Task) -> None:
    def report(size: int) -> None:
        with _counter.get_lock():
            _counter.value += size

    task.function(*task.arguments, report)


class _Progress:
    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.say = what, max(total, 1), say
        self.done = 0
        self.begun = self.told = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, size: int) -> None:
        self.set(self.done + size)

    def set(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.told < (0.5 if self.terminal else EVERY):
            return
        self.told = now
        share = min(self.done / self.total, 1.0)
        left = (now - self.begun) * (1 - share) / share if share else 0.0
        clock = time.strftime("%H:%M:%S", time.gmtime(left)) if share else "unknown"
        line = f"{self.what}: {share:.0%} ({self.done / 1e6:,.1f} MB), time left {clock}"
        if self.terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        else:
            self.say(line)

    def finish(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        seconds = time.monotonic() - self.begun
        self.say(f"{self.what}: done in {seconds:,.1f} s")
