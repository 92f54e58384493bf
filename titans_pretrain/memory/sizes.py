"""Sizes of a memory that need no tensor to be known."""

from __future__ import annotations

import math

WIDTH = 4  # taps of the convolutions
TAIL = WIDTH - 1  # rows that a convolution carries on


def runs(steps: int) -> tuple[tuple[int, int], ...]:
    """So many steps as ~sqrt(steps) runs (first, end): states are kept at the start of each."""
    run = max(1, math.isqrt(max(steps - 1, 0)) + (steps > 1))
    return tuple((j, min(j + run, steps)) for j in range(0, steps, run))
