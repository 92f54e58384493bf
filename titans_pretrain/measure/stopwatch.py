"""Where the time of a step goes: every moment belongs to one phase and one part of the model.

On a CPU by the clock; on CUDA by events on the stream, read when all of it is done: a moment there
is one of the device, and belongs to what the device was doing.
"""

from __future__ import annotations

import time
from typing import Any

import torch

Key = tuple[str, str]  # phase; part of the model in forward, backward and recompute, else ""

MODEL = ("forward", "backward", "recompute")


class Stopwatch:
    """A listener of phases and a watcher of parts."""

    backward = True

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._phases: list[str] = []
        self._parts: list[str] = []
        self._back = "rest"  # the part that backward runs through
        self._marks: list[tuple[Key, Any]] = []  # what begins, when

    def began(self, name: str) -> None:
        self._phases.append(name)
        self._mark()

    def ended(self, name: str) -> None:
        self._phases.pop()
        self._back = "rest"
        self._mark()

    def entered(self, part: str, where: str) -> None:
        self._parts.append(part)
        self._mark()

    def left(self, part: str, where: str) -> None:
        self._parts.pop()
        self._mark()

    def turned_back(self, part: str) -> None:
        self._back = part
        self._mark()

    def start(self) -> None:
        """A step begins."""
        self._marks.clear()
        self._mark()

    def stop(self) -> dict[Key, float]:
        """Seconds of the step by phase and part; they add up to the whole."""
        self._mark()
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[Key, float] = {}
        for (key, began), (_, ended) in zip(self._marks, self._marks[1:]):
            took = began.elapsed_time(ended) / 1e3 if self._cuda else ended - began
            seconds[key] = seconds.get(key, 0.0) + took
        return seconds

    def _mark(self) -> None:
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._key(), now))

    def _key(self) -> Key:
        name = self._phases[-1] if self._phases else "other"
        if name == "backward" and self._parts:  # a forward inside backward
            return "recompute", self._parts[-1]
        if name == "backward":
            return name, self._back
        return name, (self._parts[-1] if self._parts else "rest") if name in MODEL else ""
