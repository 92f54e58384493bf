"""What this process is doing: a stack of phases, told to whoever listens.

    with phase("forward"):
        ...

The same names serve the profile's ranges, the message of a failure ("in which phase") and the
benchmark of a step. While nobody listens a phase costs less than a microsecond, no more.

| phase          | what                                                              |
|----------------|-------------------------------------------------------------------|
| building       | model, optimizer                                                  |
| loading        | a checkpoint                                                      |
| data           | waiting for the step's batches                                    |
| count          | labels of the step, summed over ranks                             |
| forward        | of a micro-batch, with its loss                                   |
| backward       | of a micro-batch; recomputed blocks are in it                     |
| gradient scan  | are all gradients finite; a small reduction of losses, in which   |
|                | ranks wait for the slowest                                        |
| reduce         | gradients over data-parallel ranks                                |
| clip           | the global gradient norm and what it scales                       |
| optimizer      | AdamW                                                             |
| gather         | the updated weights, from the ranks that own them                 |
| watch          | records, console, TensorBoard                                     |
| validation     | its forwards are inside                                           |
| checkpoint     | the copy for one, or its writing where training waits for that    |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol


class Listener(Protocol):
    """Is told of every phase that begins and ends while it listens."""

    def began(self, name: str) -> None: ...

    def ended(self, name: str) -> None: ...


_stack: list[str] = []
_listeners: list[Listener] = []
_step = 0
_pulse = 0


class phase(contextlib.ContextDecorator):
    """`with phase("forward"):`, or `@phase("forward")` on a function; phases nest."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> phase:
        global _pulse
        _pulse += 1
        _stack.append(self.name)
        for listener in _listeners:
            listener.began(self.name)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _pulse
        _pulse += 1
        if error is not None and not hasattr(error, "_phases"):
            # Unwinding pops the stack: the innermost phase notes where it was.
            with contextlib.suppress(AttributeError):
                error._phases = (_step, tuple(_stack))  # type: ignore[attr-defined]
        _stack.pop()
        for listener in _listeners:
            listener.ended(self.name)

    def become(self, name: str) -> None:
        """Ends this phase and begins another in its place."""
        global _pulse
        _pulse += 1
        for listener in _listeners:
            listener.ended(self.name)
        self.name = _stack[-1] = name
        for listener in _listeners:
            listener.began(name)


def at_step(step: int) -> None:
    """Optimizer step `step` (from 1) begins."""
    global _step
    _step = step


def where(error: BaseException) -> tuple[int, tuple[str, ...]]:
    """The step (0: before the first) and the phases, outermost first, in which `error` was raised;
    of an error that was raised in none, where this process is now."""
    found: tuple[int, tuple[str, ...]] = getattr(error, "_phases", (_step, tuple(_stack)))
    return found


def now() -> tuple[int, int, tuple[str, ...]]:
    """How often a phase has begun or ended in this process, the step, and the phases it is in, for
    a thread that looks on."""
    return _pulse, _step, tuple(_stack)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells `listener` of phases inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
