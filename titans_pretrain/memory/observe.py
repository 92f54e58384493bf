"""Watching memories at work: what each one's gates, surprise and weights do in a forward pass.

Costs nothing unless observed; observed, a memory reads its own keys once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import torch
from torch import Tensor

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.packing import PackingPlan
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import (
    MemoryState,
    Norm,
    absolute_weights,
    initial_state,
    memory_forward,
)
from titans_pretrain.memory.tally import ByHead, Figures, Parts, Rows, Spans, Tally, figures


@dataclasses.dataclass
class Observation:
    """What memories did, by the name of their layer; filled when the observation ends.

    Over all real tokens (and, for states, over the rows or documents at the end of each call):
    | figure                                | meaning                                            |
    |---------------------------------------|----------------------------------------------------|
    | theta, alpha, eta: /mean /p10 /p50 /p90 | the gates, all heads and memory layers           |
    | surprise                              | mean |2 (M(k_t; W_{t-1}) - v_t)|: the gradient of  |
    |                                       | the token's inner loss at the memory's output      |
    | surprise_untrained                    | the same with the weights W_init                   |
    | gain                                  | 1 - surprise / surprise_untrained: what learning   |
    |                                       | while reading takes off; 0 if it does nothing      |
    | drift                                 | mean over heads of |W - W_init| / |W_init|         |
    | momentum                              | mean over heads of |S|                             |
    | radius                                | largest stability radius of a chunk at a row's and |
    |                                       | head's mean gates; stable below 1                  |
    """

    parts: dict[str, Parts]  # layer -> what was observed of it, by heads and tokens
    seconds: float = 0.0  # that looking took

    @cached_property
    def _figures(self) -> dict[str, tuple[Figures, ByHead]]:
        return {name: figures(parts) for name, parts in self.parts.items()}

    @property
    def figures(self) -> dict[str, Figures]:
        """Layer -> figure -> value."""
        return {name: whole for name, (whole, _) in self._figures.items()}

    @property
    def heads(self) -> dict[str, ByHead]:
        """Layer -> figure (of a gate: its mean; of the radius the head's largest) -> [H]."""
        return {name: by_head for name, (_, by_head) in self._figures.items()}


@dataclasses.dataclass
class _Calls:
    """What the calls of one memory have left so far."""

    chunk: int
    forwards: int = 0
    gates: list[Tensor] = dataclasses.field(default_factory=list)  # [3, tokens, H, L]
    surprises: list[Tensor] = dataclasses.field(default_factory=list)  # [2, tokens, H]
    spans: list[Spans] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Open:
    """An observation under way."""

    calls: dict[str, _Calls]
    seconds: float = 0.0


_open: ContextVar[_Open | None] = ContextVar("observed memories", default=None)


@contextmanager
def observe_memory(*, cut: bool = False) -> Iterator[Observation]:
    """Fills the observation that it yields when the `with` block ends.

    cut: the rows seen here are parts of rows, whose observations are to be joined.
    """
    opened, seen = _Open({}), Observation({})
    token = _open.set(opened)
    try:
        yield seen
    finally:
        _open.reset(token)
    began = time.perf_counter()
    for name, calls in opened.calls.items():
        if calls.gates:
            gates, surprises = torch.cat(calls.gates, 1), torch.cat(calls.surprises, 1)
            spans = Spans.join(calls.spans)
            seen.parts[name] = [[Tally.of(gates, surprises, spans, calls.chunk, cut=cut)]]
    seen.seconds = opened.seconds + time.perf_counter() - began


@contextmanager
def unobserved() -> Iterator[None]:
    """In which nothing is noted: what is computed here has been seen before."""
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)


def observed() -> bool:
    """Somebody watches."""
    return _open.get() is not None


@torch.no_grad()
def record(
    name: str,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    w_init: tuple[Tensor, ...],
    norm: Norm | None,
    spec: MemorySpec,
    plan: PackingPlan,
    before: MemoryState | None,
    after: MemoryState,
    start: MemoryState | None = None,
    rows: Rows | None = None,
) -> None:
    """Notes one call of the memory `name`: its arguments, and its state after.

    rows: where the call's rows lie in those of the forward; None: they are these rows.
    """
    opened = _open.get()
    if opened is None:
        return
    began = time.perf_counter()
    rows = Rows.whole(len(k), k.device) if rows is None else rows
    mine = opened.calls.setdefault(name, _Calls(spec.chunk))
    mine.forwards += rows.first
    real = torch.ones(plan.shape, dtype=torch.bool, device=k.device)
    if plan.real is not None:
        real = plan.real
    if rows.pads or not real.any():
        return
    wide = torch.promote_types(gates[0].dtype, torch.float32)
    every = torch.stack(gates).to(wide)  # [3, N, H, T, L]
    mine.gates.append(every.transpose(2, 3)[:, real])

    # Reading at the keys before each write gives what the memory made of them just then.
    theta, alpha, eta = gates
    earlier = dataclasses.replace(spec, read="exclusive")
    told, _ = chunked_memory(
        k, k, v, theta, alpha, eta, w_init, norm, earlier, plan=plan, state=before, start=start
    )
    untold = memory_forward(k, w_init, norm, spec)
    by_token = [2 * (y - v).norm(dim=-1).transpose(1, 2)[real].to(wide) for y in (told, untold)]
    mine.surprises.append(torch.stack(by_token))

    def size(tensors: tuple[Tensor, ...]) -> Tensor:
        return sum((t.flatten(2).square().sum(-1) for t in tensors), torch.zeros(())).sqrt()

    first = absolute_weights(initial_state(w_init, len(real), spec), w_init, spec)
    now = absolute_weights(after, w_init, spec)
    moved = size(tuple(a - b for a, b in zip(now, first, strict=True))) / size(first)
    spans = Spans(
        place=rows.row + (mine.forwards << 32),
        begun=rows.begun,
        last=rows.last,
        tokens=real.sum(1),
        gates=(every * real[:, None, :, None]).sum(3).transpose(0, 1),
        drift=moved,
        momentum=size(after.momentum),
    )
    mine.spans.append(spans.pick(real.any(1)))
    opened.seconds += time.perf_counter() - began
