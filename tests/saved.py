"""Counts what autograd keeps: the storages of tensors saved for backward inside a block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Saved:
    """Bytes of storages that are kept and not among `own` (parameters), each once, by shape."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {t.untyped_storage()._cdata for t in own}
        self._kept: dict[int, tuple[Tensor, int]] = {}  # kept alive: addresses stay theirs
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._kept.setdefault(storage._cdata, (tensor.detach(), storage.nbytes()))
        return tensor

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def bytes(self, shapes: Iterable[tuple[int, ...]] | None = None) -> int:
        """Of all, or of matrices of these last two sizes."""
        wanted = None if shapes is None else set(shapes)
        return sum(
            n for t, n in self._kept.values() if wanted is None or tuple(t.shape[-2:]) in wanted
        )
