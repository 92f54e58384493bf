"""The memory token by token, inner gradient by autograd: slow and obviously right.

The reference for every other implementation. It shares no arithmetic with them: of memory/ it
imports the state and the spec alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import (
    MemoryState,
    Norm,
    check_inputs,
    check_positions,
    initial_state,
    memory_forward,
)


def oracle_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    w_init: tuple[Tensor, ...],
    norm: Norm | None,
    spec: MemorySpec,
    *,
    positions: Tensor | None = None,
    state: MemoryState | None = None,
    start: MemoryState | None = None,
) -> tuple[Tensor, MemoryState]:
    """Titans, equations 8-15 (arXiv 2501.00663), with the gradient taken at the chunk's anchor.

        G_t = d ||M(k_t; A) - v_t||^2 / dA        A: the weights at the start of t's chunk
        S_t = eta_t S_{t-1} - theta_t G_t
        W_t = W* + (1 - alpha_t) (W_{t-1} - W*) + S_t        W*: W_init, or 0
        y_t = M(q_t; W_t), or M(q_t; W_{t-1}) with read="exclusive"

    A document starts at position 0 from W = W_init, S = 0, or from `start`; chunks count from
    there. At a pad (position -1) nothing changes and y = 0. Arguments and results as in
    `chunked_memory`.
    """
    check_inputs(q, k, v, (theta, alpha, eta), w_init, norm, spec, positions, state, start)
    n, _, t, _ = q.shape
    if positions is None:
        positions = torch.arange(t, device=q.device).expand(n, t)
    anchored = state is None or state.anchor is not None
    check_positions(positions.cpu(), n, t, spec.chunk, anchored)

    dtype = torch.promote_types(torch.promote_types(q.dtype, theta.dtype), torch.float32)
    q, k, v, theta, alpha, eta = (x.to(dtype) for x in (q, k, v, theta, alpha, eta))
    w_init = tuple(w.to(dtype) for w in w_init)
    given = state
    begin = initial_state(w_init, 1, spec) if start is None else start
    state = begin.map(lambda x: x.expand(n, *x.shape[1:])) if state is None else state
    offset = w_init if spec.decay_to == "init" else tuple(torch.zeros_like(w) for w in w_init)
    target = offset  # forgetting pulls the weights to here; the state counts them from here
    weights = [x.to(dtype) + w for x, w in zip(state.weights, offset)]
    momentum = [x.to(dtype) for x in state.momentum]
    anchor = [x.to(dtype) + w for x, w in zip(state.anchor or state.weights, offset)]
    first = [x.to(dtype) + w for x, w in zip(begin.weights, offset)]
    moving = [x.to(dtype) for x in begin.momentum]

    outputs = []
    for i in range(t):
        at = positions[:, i, None, None, None]  # [N, 1, 1, 1]
        starts, opens, real = at == 0, (at >= 0) & (at % spec.chunk == 0), at >= 0
        weights = [torch.where(starts, w0, w) for w0, w in zip(first, weights)]
        momentum = [torch.where(starts, s0, s) for s0, s in zip(moving, momentum)]
        anchor = [torch.where(opens, w, a) for w, a in zip(weights, anchor)]

        gradient = _inner_gradient(k[:, :, i], v[:, :, i], anchor, norm, spec)
        before = weights
        weights, momentum = list(weights), list(momentum)
        for layer in range(spec.depth):
            rate, forget, keep = (
                g[:, :, i, layer, None, None] for g in (theta, alpha, eta)
            )  # [N, H, 1, 1]
            new = keep * momentum[layer] - rate * gradient[layer]
            pulled = target[layer] + (1 - forget) * (weights[layer] - target[layer]) + new
            momentum[layer] = torch.where(real, new, momentum[layer])
            weights[layer] = torch.where(real, pulled, weights[layer])
        read = weights if spec.read == "inclusive" else before
        y = memory_forward(q[:, :, i, None], read, norm, spec)  # [N, H, 1, d]
        outputs.append(torch.where(real, y, torch.zeros_like(y)))

    y = torch.cat(outputs, 2).to(q.dtype) if outputs else q
    ends = _rows_inside_chunk(positions, spec.chunk, given is not None and given.anchor is not None)
    closed = ~ends[:, None, None, None]
    kept = None
    if bool(ends.any()):
        kept = tuple(torch.where(closed, w, a) - o for w, a, o in zip(weights, anchor, offset))
    return y, MemoryState(tuple(w - o for w, o in zip(weights, offset)), tuple(momentum), kept)


def _inner_gradient(
    key: Tensor, value: Tensor, anchor: list[Tensor], norm: Norm | None, spec: MemorySpec
) -> tuple[Tensor, ...]:
    """d ||M(key; A) - value||^2 / dA of each row and head; key, value [N, H, d]."""
    outer = torch.is_grad_enabled()
    with torch.enable_grad():
        at = [a if a.requires_grad else a.detach().requires_grad_() for a in anchor]
        miss = memory_forward(key[:, :, None], at, norm, spec)[:, :, 0] - value
        # Rows and heads do not touch each other: one sum yields each one's own gradient.
        return torch.autograd.grad(miss.square().sum(), at, create_graph=outer)


def _rows_inside_chunk(positions: Tensor, chunk: int, anchored: bool) -> Tensor:
    """[N] bool: the row ends inside a chunk; a row without tokens stays where it was."""
    last = positions.amax(1) if positions.shape[1] else positions.new_full(positions.shape[:1], -1)
    for n, row in enumerate(positions):
        real = row[row >= 0]
        last[n] = real[-1] if len(real) else -1
    return torch.where(last >= 0, (last + 1) % chunk != 0, torch.full_like(last, anchored).bool())
