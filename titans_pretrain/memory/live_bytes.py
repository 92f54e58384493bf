"""Counts the bytes of tensors that are alive, and their peak: memory use, measured exactly.

    with LiveBytes() as live:
        loss = f(x)
        loss.backward()
    live.peak    # bytes of storages made inside the block and alive at one time, at most

Counts each storage once, views included in it; storages made before the block do not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._aliasing: dict[Any, bool] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in self._aliasing:  # a view of, or the same as, an argument
            self._aliasing[func] = any(r.alias_info is not None for r in func._schema.returns)
        if not self._aliasing[func]:
            for x in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: weakref.ref[Any]) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = (weakref.ref(storage, gone), size)
        self.now += size
        self.peak = max(self.peak, self.now)
