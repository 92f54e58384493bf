"""Blocks of a model and waits of its context ranks as ranges, seen from outside.

`watch_blocks` wraps and hooks as `watch_parts` does: a model that is not watched runs its own code
alone, and no number changes.

| range                              | what                                                     |
|------------------------------------|----------------------------------------------------------|
| blocks.3 forward                   | of a micro-batch                                         |
| blocks.3 recompute                 | the same once more, inside its backward                  |
| blocks.3 backward                  | from the gradient of its output to that of its input     |
| blocks.3 waits for memory          | for a state of the rank that has the tokens before       |
| blocks.3 waits for gradient of ... | for its gradient, from the rank that has those after     |

On CUDA the host only asks for what it waits for; there the device's ranges count.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from titans_pretrain import phases
from titans_pretrain.parallel.link import Key
from titans_pretrain.parallel.pipeline import Stage


@contextlib.contextmanager
def watch_blocks(stages: Sequence[Stage], listener: phases.Listener) -> Iterator[None]:
    """Tells `listener` of the blocks of the stages' models, and of their waits, in the `with`."""
    with contextlib.ExitStack() as undo:
        backward, links = _Backward(listener), set()
        for stage in stages:
            model: Any = stage.model
            for number, block in model.blocks.items():
                forward = _forward(block.forward, f"blocks.{number}", listener, backward)
                undo.callback(_put(block, "forward", forward))
            link = getattr(getattr(model, "seam", None), "link", None)
            if link is not None and link.size > 1 and link not in links:
                links.add(link)
                undo.callback(_put(link, "receive", _receive(link.receive, listener)))
        yield


class _Backward:
    """The range of the block that backward is in. A hook on a tensor between two blocks runs when
    its gradient is whole: all of the later block's backward is done then."""

    def __init__(self, listener: phases.Listener) -> None:
        self._listener, self._block = listener, ""

    def enters(self, block: str) -> None:
        self.leaves(self._block)
        self._listener.began(f"{block} backward")
        self._block = block

    def leaves(self, block: str) -> None:
        if block and block == self._block:
            self._listener.ended(f"{block} backward")
            self._block = ""


def _put(owner: Any, name: str, watched: Callable[..., Any]) -> Callable[[], None]:
    setattr(owner, name, watched)
    return lambda: delattr(owner, name)


def _forward(
    original: Callable[..., Any], block: str, listener: phases.Listener, backward: _Backward
) -> Callable[..., Any]:
    @functools.wraps(original)
    def watched(x: Any, *args: Any) -> Any:
        again = phases.now()[2][-1:] == ("backward",)  # a forward inside backward
        name = f"{block} {'recompute' if again else 'forward'}"
        listener.began(name)
        try:
            y, state = original(x, *args)
        finally:
            listener.ended(name)
        if y.requires_grad and x.requires_grad and not again:
            y.register_hook(lambda _: backward.enters(block))
            x.register_hook(lambda _: backward.leaves(block))
        return y, state

    return watched


def _receive(original: Callable[..., Any], listener: phases.Listener) -> Callable[..., Any]:
    @functools.wraps(original)
    def watched(way: str, key: Key, *args: Any) -> Any:
        _, mixer, what = key
        gradient = "gradient of " if way == "backward" else ""
        name = f"{mixer.removesuffix('.mixer')} waits for {gradient}{what}"
        listener.began(name)
        try:
            return original(way, key, *args)
        finally:
            listener.ended(name)

    return watched
