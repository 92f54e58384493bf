"""Watching memories at work: what each one's gates, surprise and weights do in a forward pass.

Costs nothing unless observed; observed, a memory reads its own keys once more.
"""

from __future__ import annotations

import dataclasses
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

Samples = dict[str, list[Tensor]]  # what was seen -> one flat tensor a call

_open: ContextVar[dict[str, Samples] | None] = ContextVar("observed memories", default=None)


@contextmanager
def observe_memory() -> Iterator[dict[str, dict[str, float]]]:
    """Fills the dict it yields when the `with` block ends: memory layer name -> figure -> value.

    Over all real tokens (and, for states, over the rows or documents at the end of each call):
    | figure                                | meaning                                            |
    |---------------------------------------|----------------------------------------------------|
    | theta, alpha, eta: /mean /p10 /p50 /p90 | the gates, all heads and memory layers           |
    | surprise                              | mean |2 (M(k_t; W_{t-1}) - v_t)|: the gradient of  |
    |                                       | the token's inner loss at the memory's output      |
    | surprise_untrained                    | the same with the weights W_init                   |
    | drift                                 | mean over heads of |W - W_init| / |W_init|         |
    | momentum                              | mean over heads of |S|                             |
    | radius                                | largest stability radius of a chunk at a row's and |
    |                                       | head's mean gates; stable below 1                  |
    """
    samples: dict[str, Samples] = {}
    seen: dict[str, dict[str, float]] = {}
    token = _open.set(samples)
    try:
        yield seen
    finally:
        _open.reset(token)
    for name, by_figure in samples.items():
        seen[name] = _summary({figure: torch.cat(x) for figure, x in by_figure.items()})


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
    samples = _open.get()
    if samples is None:
        return
    mine = samples.setdefault(name, {})

    def note(figure: str, values: Tensor) -> None:
        mine.setdefault(figure, []).append(values.detach().flatten().float())

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


def _summary(values: dict[str, Tensor]) -> dict[str, float]:
    out: dict[str, float] = {}
    for figure, x in values.items():
        if figure == "radius":
            out[figure] = x.max().item()
        elif figure in ("theta", "alpha", "eta"):
            out[f"{figure}/mean"] = x.mean().item()
            at = torch.tensor(QUANTILES, device=x.device)
            quantiles = x[:: -(-len(x) // MOST)].quantile(at).tolist()
            for q, value in zip(QUANTILES, quantiles, strict=True):
                out[f"{figure}/p{q * 100:.0f}"] = value
        else:
            out[figure] = x.mean().item()
    return out
