"""The neural memory in chunks: the dual form with its analytic backward, one autograd function.

The same function as oracle.py, in matrix products over whole chunks: no weight ever exists for a
single token. MATH.md derives it; sweep.py is the forward half, adjoint.py the backward half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_pretrain.memory.adjoint import Gradients, part_adjoint
from titans_pretrain.memory.again import Again, unflatten
from titans_pretrain.memory.packing import PackingPlan, plan_documents, plan_rows
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import (
    MemoryState,
    Norm,
    check_inputs,
    first_state,
    without_autocast,
)
from titans_pretrain.memory.sweep import (
    Ends,
    Problem,
    States,
    momentum_of,
    pack_part,
    read,
    start_anchors,
    start_states,
    state_room,
    sweep,
    weights_of,
)


def chunked_memory(
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
    plan: PackingPlan | None = None,
) -> tuple[Tensor, MemoryState]:
    """Titans' memory over packed documents (arXiv 2501.00663, equations 8-15; MATH.md).

    q, k, v: [N, H, T, d]; k and q of unit norm, v free. theta (rate), alpha (forgetting), eta
    (momentum): [N, H, T, L], one a head and memory layer, float32 or float64. w_init: the learned
    initial weights, L tensors [H, a, o]. norm: (gain, bias), each [H, d], or None without
    spec.residual_norm. positions: [N, T] int64, a token's place in its document, -1 at pads;
    default 0..T-1 in each row. state: what the rows go on from; a row whose first token is at
    position 0 starts anew. start: one row, what every document starts from; default w_init and no
    momentum. plan: `plan_documents(positions, spec.chunk, device)`, to share among layers; it
    stands for `positions`.

    Returns y [N, H, T, d] in q's type, 0 at pads, and the state after each row's last token.
    States, gates and sums are float32, or float64 where the arguments are. Raises ValueError where
    the arguments do not fit together.
    """
    n, _, t, _ = q.shape
    checked = positions if plan is None else plan.chunk_of
    check_inputs(q, k, v, (theta, alpha, eta), w_init, norm, spec, checked, state, start)
    if plan is None and positions is None:
        plan = plan_rows(n, t, spec.chunk, q.device)
    elif plan is None:
        assert positions is not None
        anchored = state is None or state.anchor is not None
        plan = plan_documents(positions, spec.chunk, q.device, anchored=anchored)
    elif plan.inside is not None and state is not None and state.anchor is None:
        raise ValueError(
            "a row goes on inside a chunk and the state holds no anchor; carry the anchor that the "
            "previous call returned"
        )
    if plan.shape != (n, t) or plan.chunk != spec.chunk:
        raise ValueError(
            f"plan for [N, T]={plan.shape} and chunk {plan.chunk}; the arguments have {(n, t)} and "
            f"chunk {spec.chunk}; plan anew"
        )
    if state is None and (plan.resumed is not None or plan.empty is not None):
        state = first_state(w_init, n, spec, start)
    given = [] if start is None else [*start.weights, *start.momentum]
    if state is not None:
        given += [*state.weights, *state.momentum, *(state.anchor or ())]
    gain, bias = (None, None) if norm is None else norm
    with without_autocast(q):
        gates = (theta, alpha, eta)
        y, *out = _ChunkedMemory.apply(
            spec, plan, start is not None, q, k, v, *gates, gain, bias, *w_init, *given
        )
    layers = spec.depth
    parts = [tuple(out[i : i + layers]) for i in range(0, len(out), layers)]
    return y, MemoryState(parts[0], parts[1], parts[2] if len(parts) > 2 else None)


class _ChunkedMemory(torch.autograd.Function):
    """Keeps its arguments and the states at ~sqrt(steps) boundaries; recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: MemorySpec,
        plan: PackingPlan,
        started: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        problem, weights, momentum, anchor = unflatten(spec, plan, started, tensors)
        ends = _open_ends(problem, weights, momentum, anchor)
        state = start_states(problem, weights, momentum)
        boundaries: list[Tensor] = []
        ys, room = [], state_room(problem)
        for first, stop in plan.groups:
            part = pack_part(problem, range(first, stop))
            anchors = start_anchors(problem, state, anchor) if first == 0 else None
            if first:
                boundaries += state
            swept, state = sweep(problem, part, state, anchors, ends, room)
            ys.append(read(problem, part, swept).y.unflatten(0, (-1, problem.heads)))
        q = problem.q
        y = torch.cat(ys) if ys else q.new_empty((0, q.shape[1], spec.chunk, q.shape[3]))
        ctx.spec, ctx.plan, ctx.started, ctx.given = spec, plan, started, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *boundaries)
        return (plan.unpack(y, q.dtype), *ends.weights, *ends.momentum, *(ends.anchor or ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        again = Again.of(ctx)
        del ctx.again
        problem, plan, layers = again.problem, ctx.plan, ctx.spec.depth
        with without_autocast(problem.q):
            dy, *d_out = upstream
            kinds: list[list[Tensor | None]] = [
                list(d_out[i : i + layers]) for i in range(0, len(d_out), layers)
            ]
            grads = _zero_gradients(problem, again.carried[2] is not None)
            d_room = state_room(problem)
            final, last_anchor = _final_gradients(problem, kinds)
            for index in range(len(plan.groups) - 1, -1, -1):
                part, anchors, swept, reads = again.take(index)
                if dy is None:
                    d_part = torch.zeros_like(part.q)
                else:
                    at = part.chunks
                    d_part = plan.pack(dy, at.start, at.stop, problem.dtype).flatten(0, 1)
                part_adjoint(
                    problem, part, swept, reads, anchors, d_part, final, last_anchor, grads, d_room
                )
                # Before the next part is computed again.
                del part, anchors, swept, reads, d_part
            return (None, None, None, *_gather_gradients(problem, grads, kinds, again.tensors))


# What autograd makes of the function: its context is a node of the graph.
_Node = _ChunkedMemory._backward_cls


def begin_backward(*reads: Tensor) -> Callable[[bool], None] | None:
    """What backward can do before any gradient is there: compute again the chunks that it needs
    first (called with False; they are in memory at once anyway), or all of them (True; the states
    of all chunks are then). Gradients are the same, bit by bit.

    reads: as chunked_memory returned them, one call after another. None: without gradients. Call
    it in backward, before that of the reads.
    """
    nodes = [y.grad_fn for y in reads if isinstance(y.grad_fn, _Node)]

    def begin(whole: bool) -> None:
        for node in reversed(nodes if whole else nodes[-1:]):
            Again.of(node).hurry(whole)

    return begin if nodes else None


def _open_ends(
    problem: Problem,
    weights: tuple[Tensor, ...] | None,
    momentum: tuple[Tensor, ...] | None,
    anchor: tuple[Tensor, ...] | None,
) -> Ends:
    """Final states still to be filled in; rows without a token keep what they came with."""
    plan = problem.plan

    def room(given: tuple[Tensor, ...] | None) -> list[Tensor]:
        out = [w.new_empty((plan.shape[0], *w.shape)) for w in problem.w_init]
        if plan.empty is not None and given is not None:
            for x, old in zip(out, given):
                x[plan.empty] = old[plan.empty].to(x.dtype)
        return out

    keeps_anchor = plan.empty is not None and anchor is not None
    anchors = room(anchor or weights) if plan.ends_inside or keeps_anchor else None
    return Ends(room(weights), room(momentum), anchors)


def _zero_gradients(problem: Problem, anchored: bool) -> Gradients:
    plan, spec, q = problem.plan, problem.spec, problem.q
    h, d, dtype = problem.heads, q.shape[3], problem.dtype
    rows = plan.offsets[-1] * h

    def tokens() -> Tensor:
        return q.new_empty((rows, spec.chunk, d), dtype=dtype)

    def gates() -> Tensor:
        return q.new_empty((spec.depth, rows, spec.chunk), dtype=dtype)

    opening = None
    if anchored and plan.inside is not None:
        documents = plan.sizes[0] * h
        opening = [w.new_zeros((documents, *w.shape[1:])) for w in problem.w_init]
    return Gradients(
        tokens(),
        tokens(),
        tokens(),
        gates(),
        gates(),
        gates(),
        None if problem.gain is None else torch.zeros_like(problem.gain),
        None if problem.bias is None else torch.zeros_like(problem.bias),
        [torch.zeros_like(w) for w in problem.w_init],
        [w.new_empty((0, 2 * w.shape[1], w.shape[2])) for w in problem.w_init],
        opening,
    )


def _final_gradients(
    problem: Problem, kinds: list[list[Tensor | None]]
) -> tuple[States, States | None]:
    """Gradients of the returned state by document: of the states, and of anchors inside a chunk."""
    plan, h = problem.plan, problem.heads
    documents = plan.sizes[0] if plan.sizes else 0
    final, last_anchor = [], []
    for n, w in enumerate(problem.w_init):
        _, a, o = w.shape
        state = w.new_zeros((documents * h, 2 * a, o))
        opened = w.new_zeros((documents * h, a, o)) if plan.ends_inside else w.new_zeros(0)
        for pair, open_pair in zip(plan.ends, plan.open_ends):
            for kind, view in ((0, weights_of(state, h)), (1, momentum_of(state, h))):
                given = kinds[kind][n]
                if pair is not None and given is not None:
                    view[pair[0]] = given[pair[1]]
            given = kinds[2][n] if len(kinds) > 2 else None
            if pair is not None and given is not None:  # on a boundary the anchor is the weights
                closed = torch.ones(documents, dtype=torch.bool, device=w.device)
                if open_pair is not None:
                    closed[open_pair[0]] = False
                    opened.unflatten(0, (-1, h))[open_pair[0]] = given[open_pair[1]]
                mine = closed[pair[0]]
                weights_of(state, h)[pair[0][mine]] += given[pair[1][mine]]
        final.append(state)
        last_anchor.append(opened)
    return final, last_anchor if plan.ends_inside else None


def _gather_gradients(
    problem: Problem,
    grads: Gradients,
    kinds: list[list[Tensor | None]],
    tensors: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients in the order and types of the function's arguments."""
    plan, spec, h, layers = problem.plan, problem.spec, problem.heads, problem.spec.depth
    out: list[Tensor | None] = []
    for x in (grads.q, grads.k, grads.v):
        out.append(plan.unpack(x.unflatten(0, (-1, h)), x.dtype))
    for x in (grads.theta, grads.alpha, grads.eta):
        out.append(plan.unpack(x.permute(1, 2, 0).unflatten(0, (-1, h)), x.dtype))
    out += [grads.gain, grads.bias]
    starts: list[list[Tensor | None]] = [[], []]  # of the start's weights, momentum
    carried: list[list[Tensor | None]] = [[], [], []]  # of weights, momentum, anchor
    given = len(tensors) - 8 - layers * (1 if problem.start is None else 3)  # carried tensors
    has_anchor = given > 2 * layers
    for n, total in enumerate(grads.w_init):
        state = grads.state[n]
        both = (weights_of(state, h), momentum_of(state, h))
        if problem.start is not None:
            for kind, here in enumerate(both):
                starts[kind].append(here[plan.fresh].sum(0, keepdim=True))
        elif spec.decay_to == "zero" and len(plan.fresh):
            total += both[0][plan.fresh].sum(0)
        out.append(total)
        if not given:
            continue
        for kind, here in enumerate(both):
            carried[kind].append(_to_rows(problem, here, plan.resumed, kinds[kind][n]))
        passed = kinds[2][n] if len(kinds) > 2 else None
        if has_anchor:
            opening = None if grads.opening is None else grads.opening[n].unflatten(0, (-1, h))
            carried[2].append(_to_rows(problem, opening, plan.inside, passed))
        elif passed is not None and plan.empty is not None:
            own = carried[0][-1]
            assert own is not None
            own[plan.empty] += passed[plan.empty]
    out += [x for kind in (*starts, *carried) for x in kind]
    return [g if x is None or g is None else g.to(x.dtype) for g, x in zip(out, tensors)]


def _to_rows(
    problem: Problem, x: Tensor | None, pair: tuple[Tensor, Tensor] | None, passed: Tensor | None
) -> Tensor | None:
    """By document [documents, H, a, o] -> by row [N, H, a, o]; empty rows pass `passed` on."""
    plan = problem.plan
    shape = passed.shape if passed is not None else None if x is None else x.shape
    if shape is None:
        return None
    out = torch.zeros((plan.shape[0], *shape[1:]), dtype=problem.dtype, device=problem.q.device)
    if pair is not None and x is not None:
        out[pair[1]] = x[pair[0]]
    if plan.empty is not None and passed is not None:
        out[plan.empty] = passed[plan.empty]
    return out
