"""How a command imports what takes long. Knows no torch."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """For a command's first import of torch and the engines: what is imported stays, and Python's
    garbage collector is spared it. Now (0.5 of 2.5 s); and in each later full collection, in which
    one rank would stand for 0.2 s, and all others wait for it.

    Does nothing where torch is imported already: what is alive then may be garbage later.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
