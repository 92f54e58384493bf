"""The parts of a model, seen from outside: embedding, attention, memory, MLP, head and loss.

`watch_parts` puts wrappers round a model's modules and takes them off again: a model that is not
watched runs its own code alone. Wrappers and hooks only look: every number stays bitwise the same.

| part          | what is in it                                                                |
|---------------|------------------------------------------------------------------------------|
| embedding     | the lookup                                                                   |
| attention     | the token mixer, without what belongs to the memory                          |
| memory        | queries, keys, values, gates, retrieval, the write and read, output maps     |
| mlp           | SwiGLU                                                                       |
| head and loss | logits, cross entropy                                                        |
| rest          | all else: norms, residual sums, reading positions, giving memory back        |
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from torch import Tensor

from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.model.blocks import Attention
from titans_pretrain.parallel.pipeline import Stage

PARTS = ("embedding", "attention", "memory", "mlp", "head and loss", "rest")

_MEMORY = ("queries", "keys", "values", "rates", "retrieve", "write", "begin", "normed")


class Watcher(Protocol):
    """Is told of parts that begin and end in forward (`where`: a block's path, or ""), and in
    backward of the part whose gradients are formed from now on."""

    backward: bool  # whether backward is watched: a hook on each tensor between parts

    def entered(self, part: str, where: str) -> None: ...

    def left(self, part: str, where: str) -> None: ...

    def turned_back(self, part: str) -> None: ...


@contextlib.contextmanager
def watch_parts(stages: Sequence[Stage], watcher: Watcher) -> Iterator[None]:
    """Tells `watcher` of the parts of the stages' models inside the block."""
    undo: list[Callable[[], None]] = []
    stack: list[str] = []
    for stage in stages:
        for owner, name, part, where in _calls(stage):
            undo.append(_wrap(owner, name, part, where, watcher, stack))
    try:
        yield
    finally:
        for take_off in undo:
            take_off()


def _calls(stage: Stage) -> Iterator[tuple[Any, str, str, str]]:
    """(owner, name of its method, part, block) of all that is wrapped."""
    model: Any = stage.model
    if model.embedding is not None:
        yield model.embedding, "forward", "embedding", ""
    if model.head is not None:
        yield model.head, "forward", "head and loss", ""
    yield stage, "token_loss", "head and loss", ""
    for number, block in model.blocks.items():
        where = f"blocks.{number}"
        alone = isinstance(getattr(block.mixer, "attention", None), Attention)
        yield block.mixer, "forward", "attention" if alone else "memory", where
        yield block.mlp, "forward", "mlp", where
        for module in block.mixer.modules():
            if isinstance(module, Attention):
                # Inside the mixer, which is attention's already; named again so that backward,
                # coming out of the memory, says so.
                yield module, "read", "attention", where
                for projection in (module.q, module.k, module.v, module.o):
                    if projection is not None:
                        yield projection, "forward", "attention", where
            elif isinstance(module, MemoryLayer):
                for method in _MEMORY:
                    yield module, method, "memory", where
                for map_ in (module.q, module.k, module.v, module.out, module.output_gate):
                    if map_ is not None:
                        yield map_, "forward", "memory", where


def _wrap(
    owner: Any, name: str, part: str, where: str, watcher: Watcher, stack: list[str]
) -> Callable[[], None]:
    """Puts a wrapper round `owner.name`; returns what takes it off."""
    original, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        outer = stack[-1] if stack else "rest"
        if watcher.backward:
            for tensor in _tensors(args):
                _hook(tensor, watcher, outer)
        stack.append(part)
        watcher.entered(part, where)
        try:
            out = original(*args, **kwargs)
        finally:
            stack.pop()
            watcher.left(part, where)
        if watcher.backward:
            for tensor in _tensors(out):
                _hook(tensor, watcher, part)
        return out

    setattr(owner, name, watched)
    return (lambda: setattr(owner, name, original)) if own else (lambda: delattr(owner, name))


def _hook(tensor: Tensor, watcher: Watcher, part: str) -> None:
    """When the gradient of `tensor` is whole, what made it runs backward next: `part`.

    The first to name a tensor is right: it comes out of the innermost part that returns it, or was
    made by the part that hands it on.
    """
    if tensor.requires_grad and not tensor.is_leaf and not hasattr(tensor, "_part"):
        tensor._part = part  # type: ignore[attr-defined]
        tensor.register_hook(lambda _: watcher.turned_back(part))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
