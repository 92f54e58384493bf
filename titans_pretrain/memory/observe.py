"""Watching memories at work: what each one's gates, surprise and weights do in a forward pass.

Costs nothing unless observed; observed, a memory reads its own keys once more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.diagnostics import stability_radius
from titans_pretrain.memory.packing import PackingPlan
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import (
    MemoryState,
    Norm,
    absolute_weights,
    initial_state,
    memory_forward,
)

QUANTILES = (0.1, 0.5, 0.9)
MOST = 1 << 20  # values that a quantile is taken of; of more, every n-th

Samples = dict[str, list[Tensor]]  # what was seen -> one tensor [values, H] a call


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

    figures: dict[str, dict[str, float]]  # layer -> figure -> value
    heads: dict[str, dict[str, list[float]]]  # layer -> figure (of a gate: its mean) -> [H]
    seconds: float = 0.0  # that looking took


_open: ContextVar[tuple[dict[str, Samples], Observation] | None] = ContextVar(
    "observed memories", default=None
)


@contextmanager
def observe_memory() -> Iterator[Observation]:
    """Fills the observation that it yields when the `with` block ends."""
    samples: dict[str, Samples] = {}
    seen = Observation({}, {})
    token = _open.set((samples, seen))
    try:
        yield seen
    finally:
        _open.reset(token)
    began = time.perf_counter()
    for name, by_figure in samples.items():
        values = {figure: torch.cat(x) for figure, x in by_figure.items()}
        seen.figures[name] = _summary(values)
        seen.heads[name] = _by_head(values)
    seen.seconds += time.perf_counter() - began


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
) -> None:
    """Notes one call of the memory `name`: its arguments, and its state after."""
    opened = _open.get()
    if opened is None:
        return
    samples, seen = opened
    began = time.perf_counter()
    mine = samples.setdefault(name, {})

    def note(figure: str, values: Tensor) -> None:  # [n, H] or [n, H, L]
        by_head = values.detach().movedim(1, -1).movedim(0, -2).flatten(0, -2)  # L outermost
        mine.setdefault(figure, []).append(by_head.float())

    real = torch.ones(plan.shape, dtype=torch.bool, device=k.device)
    if plan.real is not None:
        real = plan.real
    if not real.any():
        return
    for figure, gate in zip(("theta", "alpha", "eta"), gates, strict=True):
        note(figure, gate.transpose(1, 2)[real])
    rows = real.any(1)
    weight = (real / real.sum(1, keepdim=True).clamp(min=1))[:, None, :, None]
    theta, alpha, eta = ((gate * weight).sum(2)[rows] for gate in gates)  # [N, H, L]
    note("radius", stability_radius(theta, alpha, eta, chunk=spec.chunk))

    # Reading at the keys before each write gives what the memory made of them just then.
    theta, alpha, eta = gates
    earlier = dataclasses.replace(spec, read="exclusive")
    told, _ = chunked_memory(
        k, k, v, theta, alpha, eta, w_init, norm, earlier, plan=plan, state=before, start=start
    )
    untold = memory_forward(k, w_init, norm, spec)
    for figure, y in (("surprise", told), ("surprise_untrained", untold)):
        note(figure, 2 * (y - v).norm(dim=-1).transpose(1, 2)[real])

    def size(tensors: tuple[Tensor, ...]) -> Tensor:
        return sum((t.flatten(2).square().sum(-1) for t in tensors), torch.zeros(())).sqrt()

    first = absolute_weights(initial_state(w_init, len(rows), spec), w_init, spec)
    now = absolute_weights(after, w_init, spec)
    moved = size(tuple(a - b for a, b in zip(now, first, strict=True))) / size(first)
    note("drift", moved[rows])
    note("momentum", size(after.momentum)[rows])
    seen.seconds += time.perf_counter() - began


def _summary(values: dict[str, Tensor]) -> dict[str, float]:
    out: dict[str, float] = {}
    for figure, by_head in values.items():
        x = by_head.flatten()
        if figure == "radius":
            out[figure] = x.max().item()
        elif figure in ("theta", "alpha", "eta"):
            out[f"{figure}/mean"] = x.mean().item()
            at = torch.tensor(QUANTILES, device=x.device)
            some = by_head[:: -(-len(x) // MOST)].flatten()
            quantiles = some.quantile(at).tolist()
            for q, value in zip(QUANTILES, quantiles, strict=True):
                out[f"{figure}/p{q * 100:.0f}"] = value
        else:
            out[figure] = x.mean().item()
    if "surprise" in out:
        out["gain"] = 1 - out["surprise"] / max(out["surprise_untrained"], 1e-30)
    return out


def _by_head(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """figure -> [H]: the mean of each head, of the radius its largest."""
    out = {name: x.amax(0) if name == "radius" else x.mean(0) for name, x in values.items()}
    if "surprise" in out:
        out["gain"] = 1 - out["surprise"] / out["surprise_untrained"].clamp(min=1e-30)
    return {name: x.tolist() for name, x in out.items()}
