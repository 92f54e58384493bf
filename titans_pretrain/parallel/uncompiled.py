"""Imports of engines without torch's compiler.

Megatron and DeepSpeed decorate functions that are not used here (fused layers, Muon) with
torch.compile, which imports all of the compiler at once. Each rank of each start would pay for that
with one to two seconds of processor time, and some thousand files of a shared disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """In the place of torch.compile, with or without arguments."""
    same: Callable[[Any], Any] = lambda f: f  # noqa: E731
    return same if function is None else function


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """In which what is decorated with torch.compile stays as it is."""
    before = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before
