"""The family of memory rules as data: what a memory is, and which rules exist."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MemorySpec:
    """One neural memory: the network that is the memory and how its inner problem is run.

    `depth` linear layers of widths d, m d, .., m d, d (m = `expansion`), `activation` between them
    (GELU is the exact, erf form). `residual_norm`: M(x) = x + gain * LayerNorm(F(x)) + bias, else
    M(x) = F(x). `chunk`: tokens whose inner gradients share one anchor; it is part of the function,
    not a tuning knob. `decay_to`: where forgetting pulls the weights, the learned initial weights
    or zero (the paper). `read`: token t reads with W_t ("inclusive") or W_{t-1} ("exclusive").
    """

    depth: int = 2
    expansion: int = 4
    activation: Literal["gelu", "silu"] = "gelu"
    residual_norm: bool = True
    chunk: int = 16
    decay_to: Literal["init", "zero"] = "init"
    read: Literal["inclusive", "exclusive"] = "inclusive"

    def __post_init__(self) -> None:
        for name in ("depth", "expansion", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}; it counts from 1; use {name}=1 or more"
                )
        for name, known in (
            ("activation", ("gelu", "silu")),
            ("decay_to", ("init", "zero")),
            ("read", ("inclusive", "exclusive")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose one of {known}")

    def shapes(self, width: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each layer's weight for heads of `width` features."""
        hidden = self.expansion * width
        sizes = [width] + [hidden] * (self.depth - 1) + [width]
        return tuple(itertools.pairwise(sizes))


@dataclass(frozen=True)
class Rule:
    """One member of the family, along the axes on which published memories differ."""

    bias: str  # the inner objective (attentional bias)
    retention: str  # how old content is let go
    optimizer: str  # the inner optimiser
    gates: tuple[str, ...]  # functions of the token, one a head and memory layer
    source: str


RULES: dict[str, Rule] = {
    "titans": Rule(
        bias="squared error",
        retention="scalar decay",
        optimizer="gradient descent with momentum",
        gates=("theta", "alpha", "eta"),
        source="arXiv 2501.00663, equations 8-15",
    ),
}
