"""Seams: where a sequence may be cut and its parts computed apart. The plain model cuts nothing.

What a mixer carries on from token to token is all that a later part needs of an earlier one. Each
mixer has a seam that sees it go by, and so has the model for what it must know beforehand. These
here let everything pass as it is; whoever cuts sequences replaces them from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor, nn

S = TypeVar("S")  # a tensor, or tuples and dataclasses of tensors and None
Early = Callable[[bool], None]  # told whether it may keep more in memory than without haste


class Seam(nn.Module):
    """A mixer's. `what` names a hand-over within the mixer; each is taken, then given.

    `tie` fixes the order of hand-overs in backward: all that a part computes from what it takes
    comes after take's tie, and everything after give depends on give's.
    """

    gives = False  # whether anyone reads what is given: then it must be formed

    def take(self, what: str, tie: Tensor, state: S, blank: Callable[[], S]) -> tuple[Tensor, S]:
        """The tie, and what the tokens before have carried on: `state` is what the caller knows of
        it (None: nothing). blank: makes a state of the same form and any values."""
        return tie, state

    def give(self, what: str, tie: Tensor, state: Any, early: Early | None = None) -> Tensor:
        """The tie. state: what these tokens carry on; its form depends on no token. early: what
        backward may do before it has the state's gradient."""
        return tie


class ModelSeam(nn.Module):
    """The model's, asked once a forward, before any mixer."""

    def before(self, positions: Tensor) -> Tensor | None:
        """positions [B, T] of the tokens at hand -> [B, P] of those before them that belong to the
        same rows, -1 where no token at hand can see one; None: nothing is handed over."""
        return None

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """In which a block is computed, and computed again for backward."""
        return nullcontext(), nullcontext()
