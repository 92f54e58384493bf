"""The state of a neural memory (fast weights, momentum, anchor) and the memory's own forward pass.

Shapes: N rows, H heads, T tokens, d head width, L memory layers; layer l maps a to o features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.rules import MemorySpec

LAYER_NORM_EPS = 1e-5

Norm = tuple[Tensor, Tensor]  # gain [H, d], bias [H, d]


@dataclass(frozen=True)
class MemoryState:
    """What a memory carries from one token to the next; every tensor is [N, H, a, o].

    weights: with decay_to="init" the deviation D = W - W_init, else W.
    momentum: S. anchor: the weights (same convention) at the start of the current chunk, None if
    every row stands on a chunk boundary; for a row on a boundary it equals `weights`.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...] | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> MemoryState:
        """Applies `f` to every tensor."""
        anchor = None if self.anchor is None else tuple(f(x) for x in self.anchor)
        return MemoryState(
            tuple(f(x) for x in self.weights), tuple(f(x) for x in self.momentum), anchor
        )

    def detach(self) -> MemoryState:
        """The same values without their history."""
        return self.map(lambda x: x.detach())

    def rows(self, index: int | slice | Tensor) -> MemoryState:
        """Some rows: the first `index` of them, a slice, or those an int64 tensor names."""
        pick = slice(index) if isinstance(index, int) else index
        return self.map(lambda x: x[pick])

    @property
    def size(self) -> int:
        """Number of rows N."""
        return self.weights[0].shape[0]


def concatenate(states: Sequence[MemoryState]) -> MemoryState:
    """The rows of several states, one after another.

    Where only some states hold an anchor, the others stand on a chunk boundary: theirs is their
    weights.
    """

    def join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(layer) for layer in zip(*parts))

    anchor = None
    if any(s.anchor is not None for s in states):
        anchor = join([s.weights if s.anchor is None else s.anchor for s in states])
    return MemoryState(
        join([s.weights for s in states]), join([s.momentum for s in states]), anchor
    )


def initial_state(w_init: Sequence[Tensor], n: int, spec: MemorySpec) -> MemoryState:
    """The state of `n` rows before their first token; `w_init`: L tensors [H, a, o]."""
    dtype = torch.promote_types(w_init[0].dtype, torch.float32)
    zeros = tuple(w.new_zeros((n, *w.shape), dtype=dtype) for w in w_init)
    if spec.decay_to == "init":
        return MemoryState(zeros, zeros)
    return MemoryState(tuple(w.to(dtype).expand(n, *w.shape) for w in w_init), zeros)


def first_state(
    w_init: Sequence[Tensor], n: int, spec: MemorySpec, start: MemoryState | None
) -> MemoryState:
    """What `n` documents start from: `start`, one row, or the initial state."""
    if start is None:
        return initial_state(w_init, n, spec)
    return start.map(lambda x: x.expand(n, *x.shape[1:]))


def absolute_weights(
    state: MemoryState, w_init: Sequence[Tensor], spec: MemorySpec
) -> tuple[Tensor, ...]:
    """The fast weights W themselves, L tensors [N, H, a, o]."""
    if spec.decay_to == "init":
        return tuple(w + x for w, x in zip(w_init, state.weights))
    return state.weights


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """In which autocast is off for the device of x; on the meta device there is none."""
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def memory_forward(
    x: Tensor, weights: Sequence[Tensor], norm: Norm | None, spec: MemorySpec
) -> Tensor:
    """M(x; W) in plain differentiable torch (section 1 of MATH.md).

    x [N, H, T, d]; weights: absolute, L tensors [N, H, a, o] or [H, a, o]; norm: (gain, bias), each
    [H, d], or None where spec.residual_norm is False. Returns [N, H, T, d] in the weights' type or
    a wider one.
    """
    act = F.gelu if spec.activation == "gelu" else F.silu
    dtype = torch.promote_types(x.dtype, weights[0].dtype)
    with without_autocast(x):
        x = x.to(dtype)
        out = x @ weights[0].to(dtype)
        for w in weights[1:]:
            out = act(out) @ w.to(dtype)
        if norm is None:
            return out
        gain, bias = (p.to(dtype)[:, None, :] for p in norm)
        return x + gain * F.layer_norm(out, out.shape[-1:], eps=LAYER_NORM_EPS) + bias


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    w_init: Sequence[Tensor],
    norm: Norm | None,
    spec: MemorySpec,
    positions: Tensor | None,
    state: MemoryState | None,
    start: MemoryState | None,
) -> None:
    """Raises ValueError where the arguments of a memory do not fit together."""
    n, h, t, d = q.shape
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; all are [N, H, T, d]"
        )
    for gate in gates:
        if gate.shape != (n, h, t, spec.depth):
            raise ValueError(
                f"gate {tuple(gate.shape)}; theta, alpha and eta are [N, H, T, L] = "
                f"{(n, h, t, spec.depth)}"
            )
        if gate.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gate of type {gate.dtype}; compute gates in float32 or float64")
    shapes = tuple((h, *s) for s in spec.shapes(d))
    if tuple(tuple(w.shape) for w in w_init) != shapes:
        raise ValueError(f"w_init {[tuple(w.shape) for w in w_init]}; this memory has {shapes}")
    if (norm is None) == spec.residual_norm:
        raise ValueError(
            f"norm {'missing' if norm is None else 'given'}, residual_norm={spec.residual_norm}; "
            "gain and bias belong to the residual form and to it alone"
        )
    if state is not None and positions is None:
        raise ValueError(
            "a state without positions; positions say which rows go on from it (first position "
            "> 0) and which start anew; pass positions"
        )
    if state is not None and tuple(tuple(w.shape) for w in state.weights) != tuple(
        (n, *s) for s in shapes
    ):
        raise ValueError(
            f"state {[tuple(w.shape) for w in state.weights]}; {n} rows of {shapes} are needed"
        )
    if start is not None and (
        start.anchor is not None
        or [tuple(w.shape) for w in (*start.weights, *start.momentum)]
        != [(1, *s) for s in shapes] * 2
    ):
        raise ValueError(
            f"start {[tuple(w.shape) for w in start.weights]}, "
            f"{'no' if start.anchor is None else 'an'} anchor; documents start from one row of "
            f"{shapes}, on a chunk boundary: without an anchor"
        )


def check_positions(positions: Tensor, n: int, t: int, chunk: int, anchored: bool) -> None:
    """Raises ValueError unless each row's positions run 0, 1, 2, .. document after document.

    A row may begin anywhere in a document; pads (-1) are skipped. A row that goes on inside a
    chunk needs the anchor of that chunk. `positions`: [N, T] int64 on the CPU.
    """
    if positions.shape != (n, t):
        raise ValueError(f"positions {tuple(positions.shape)}; they are [N, T] = {(n, t)}")
    real = positions >= 0
    row, _ = real.nonzero(as_tuple=True)
    p = positions[real]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    jump = ~first & (p != 0)
    jump[1:] &= p[1:] != p[:-1] + 1
    if bool(jump.any()):
        i = int(jump.nonzero()[0])
        raise ValueError(
            f"position {int(p[i])} follows {int(p[i - 1])} in row {int(row[i])}; positions of a "
            "document count up by one, 0 starts the next, -1 marks a pad"
        )
    inside = first & (p % chunk != 0)
    if not anchored and bool(inside.any()):
        i = int(inside.nonzero()[0])
        raise ValueError(
            f"row {int(row[i])} goes on at position {int(p[i])}, inside a chunk of {chunk}, and "
            "the state holds no anchor; carry the anchor that the previous call returned"
        )
