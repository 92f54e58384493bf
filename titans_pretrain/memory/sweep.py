"""The forward half of the dual form: the keys' sweep over chunks, and the reads of all of them.

Equation numbers refer to MATH.md. Letters: M chunks, H heads, B chunks times heads (chunk-major),
C chunk, d head width; a memory layer maps a features to o. A state is [B, 2a, o]: the weights
(deviation or absolute) over the momentum. The sweep is the only part that runs chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.memory.coefficients import Coefficients, coefficients
from titans_pretrain.memory.packing import PackingPlan
from titans_pretrain.memory.pointwise import (
    activate,
    standardize,
    standardize_transpose,
    times_slope,
)
from titans_pretrain.memory.rules import MemorySpec

States = list[Tensor]  # one [B, 2a, o] a memory layer


@dataclass(frozen=True)
class Problem:
    """The arguments of one call; slow parameters already in the type that is computed in."""

    spec: MemorySpec
    plan: PackingPlan
    q: Tensor  # [N, H, T, d]
    k: Tensor
    v: Tensor
    theta: Tensor  # [N, H, T, L]
    alpha: Tensor
    eta: Tensor
    w_init: tuple[Tensor, ...]  # L times [H, a, o]
    gain: Tensor | None  # [H, d]
    bias: Tensor | None
    start: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None  # weights, momentum; [1, H, a, o]

    @property
    def dtype(self) -> torch.dtype:
        return self.w_init[0].dtype

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    def tiled(self, x: Tensor, rows: int) -> Tensor:
        """[H, d] -> [rows, 1, d]: the norm's parameters for `rows` chunks times heads."""
        return x.repeat(rows // self.heads, 1)[:, None, :]


@dataclass(frozen=True)
class Part:
    """A run of steps, packed: B rows of C tokens."""

    steps: range
    chunks: slice
    q: Tensor  # [B, C, d]
    k: Tensor
    v: Tensor
    coefficients: Coefficients

    def rows(self, problem: Problem, step: int) -> slice:
        """The rows of one step among the part's B."""
        offsets, h = problem.plan.offsets, problem.heads
        start = self.chunks.start
        return slice((offsets[step] - start) * h, (offsets[step + 1] - start) * h)


@dataclass(frozen=True)
class Swept:
    """What the keys leave: inputs and errors of each layer, and each chunk's entry state."""

    inputs: list[Tensor]  # X_l [B, C, a]
    errors: list[Tensor]  # Delta_l [B, C, o]
    states: States
    # for the adjoint
    before: list[Tensor]  # a_l [B, C, o], l < L
    back: list[Tensor]  # Delta_{l+1} A_{l+1}^T [B, C, o], l < L
    xhat: Tensor | None  # [B, C, d]
    rstd: Tensor | None


@dataclass
class Ends:
    """The state of each row after its last token, filled in as documents end; L x [N, H, a, o]."""

    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor] | None


def pack_part(problem: Problem, steps: range) -> Part:
    """Gathers tokens and gates of some steps and computes their coefficients."""
    plan, dtype = problem.plan, problem.dtype
    first, end = plan.offsets[steps.start], plan.offsets[steps.stop]
    q, k, v = (
        plan.pack(x, first, end, dtype).flatten(0, 1) for x in (problem.q, problem.k, problem.v)
    )
    theta, alpha, eta = (
        plan.pack(x, first, end, dtype).flatten(0, 1).permute(2, 0, 1).contiguous()
        for x in (problem.theta, problem.alpha, problem.eta)
    )
    last = None if plan.last is None else plan.last[first:end].repeat_interleave(problem.heads)
    exclusive = problem.spec.read == "exclusive"
    return Part(steps, slice(first, end), q, k, v, coefficients(theta, alpha, eta, last, exclusive))


def start_states(
    problem: Problem, weights: tuple[Tensor, ...] | None, momentum: tuple[Tensor, ...] | None
) -> States:
    """The state before step 0 of every document; carried weights and momentum [N, H, a, o]."""
    plan, h = problem.plan, problem.heads
    documents = plan.sizes[0] if plan.sizes else 0
    states = []
    for layer, w in enumerate(problem.w_init):
        _, a, o = w.shape
        state = w.new_zeros((documents, h, 2, a, o))
        if problem.start is not None:  # (30)
            for kind, given in enumerate(problem.start):
                state[plan.fresh, :, kind] = given[layer].to(state.dtype)
        elif problem.spec.decay_to == "zero":
            state[:, :, 0] = w
        if plan.resumed is not None and weights is not None and momentum is not None:
            here, rows = plan.resumed
            state[here, :, 0] = weights[layer][rows].to(state.dtype)
            state[here, :, 1] = momentum[layer][rows].to(state.dtype)
        states.append(state.view(documents * h, 2 * a, o))
    return states


def start_anchors(
    problem: Problem, states: States, anchor: tuple[Tensor, ...] | None
) -> list[Tensor] | None:
    """Where step 0 takes its gradients if some row goes on inside a chunk; L x [B, a, o]."""
    if problem.plan.inside is None or anchor is None:
        return None
    here, rows = problem.plan.inside
    out = []
    for state, given in zip(states, anchor):
        at = weights_of(state, problem.heads).clone()
        at[here] = given[rows].to(at.dtype)
        out.append(at.flatten(0, 1))
    return out


def state_room(problem: Problem, part: int | None = None) -> States:
    """Room for the entry states of all chunks of a part; of any (None): parts take turns in it.

    Fresh memory costs more to touch than the sweep to fill it.
    """
    offsets, groups = problem.plan.offsets, problem.plan.groups
    groups = groups if part is None else groups[part : part + 1]
    chunks = max((offsets[b] - offsets[a] for a, b in groups), default=0)
    return [w.new_empty((chunks * len(w), 2 * w.shape[1], w.shape[2])) for w in problem.w_init]


def weights_of(state: Tensor, heads: int) -> Tensor:
    """[B, 2a, o] -> the weights in it as a view [M, H, a, o]."""
    return state.view(-1, heads, 2, state.shape[1] // 2, state.shape[2])[:, :, 0]


def momentum_of(state: Tensor, heads: int) -> Tensor:
    """[B, 2a, o] -> the momentum in it as a view [M, H, a, o]."""
    return state.view(-1, heads, 2, state.shape[1] // 2, state.shape[2])[:, :, 1]


def absolute_at(problem: Problem, layer: int, state: Tensor, anchor: Tensor | None) -> Tensor:
    """The weights [B, a, o] at which a step takes its gradients, (2)."""
    h = problem.heads
    at = weights_of(state, h) if anchor is None else anchor.unflatten(0, (-1, h))
    if problem.spec.decay_to == "init":
        at = at + problem.w_init[layer]
    return at.flatten(0, 1)


def sweep(
    problem: Problem,
    part: Part,
    start: States,
    anchors: list[Tensor] | None,
    ends: Ends | None,
    room: States,
) -> tuple[Swept, States]:
    """Runs the keys of one part, (12), (13) and (15); returns also the state after its last step.

    start: the state before the first step; anchors: of that step (only at step 0). Documents that
    end their row write their state into `ends`. room: from `state_room`, for the entry states.
    """
    spec, plan, h, layers = problem.spec, problem.plan, problem.heads, problem.spec.depth
    co = part.coefficients
    xs: list[list[Tensor]] = [[] for _ in range(layers)]
    deltas: list[list[Tensor]] = [[] for _ in range(layers)]
    before: list[list[Tensor]] = [[] for _ in range(layers - 1)]
    back: list[list[Tensor]] = [[] for _ in range(layers - 1)]
    hats: list[Tensor] = []
    rstds: list[Tensor] = []
    states = [s[: len(part.k)] for s in room]
    for buffer, s in zip(states, start):
        buffer[: len(s)] = s
    after: States = []

    for step in part.steps:
        rows = part.rows(problem, step)
        at = [
            absolute_at(problem, n, states[n][rows], anchors[n] if anchors and step == 0 else None)
            for n in range(layers)
        ]
        x = part.k[rows]
        for n in range(layers):
            xs[n].append(x)
            x = torch.bmm(x, at[n])  # (12)
            if n < layers - 1:
                before[n].append(x)
                x = activate(x, spec.activation)
        if problem.gain is not None and problem.bias is not None:
            xhat, rstd = standardize(x)
            gain, bias = problem.tiled(problem.gain, len(x)), problem.tiled(problem.bias, len(x))
            u = (part.k[rows] - part.v[rows] + bias).addcmul_(gain, xhat).mul_(2 * gain)
            delta = standardize_transpose(u, xhat, rstd)
            hats.append(xhat)
            rstds.append(rstd)
        else:
            delta = (x - part.v[rows]).mul_(2)
        deltas[-1].append(delta)
        for n in range(layers - 2, -1, -1):  # (13)
            m = torch.bmm(delta, at[n + 1].transpose(1, 2))
            delta = times_slope(m, before[n][-1], spec.activation)
            back[n].append(m)
            deltas[n].append(delta)

        ending = plan.ends[step] if ends is not None else None
        alive = plan.sizes[step + 1] * h if step + 1 < len(plan.sizes) else 0
        needed = len(x) if ending is not None else alive
        inner = step + 1 < part.steps.stop
        after = []
        for n in range(layers):
            old = states[n][rows]
            if needed == 0:
                after.append(old[:0])
                continue
            target = states[n][rows.stop : rows.stop + alive] if inner else old[:0]
            new = target if inner and needed == alive else torch.empty_like(old[:needed])
            torch.bmm(
                co.carry[n, rows][:needed],
                old[:needed].view(needed, 2, -1),
                out=new.view(needed, 2, -1),
            )
            outer = spread(xs[n][-1][:needed], co.write[n, rows][:needed])
            new.baddbmm_(outer.transpose(1, 2), deltas[n][-1][:needed])  # (15)
            if inner and new is not target:
                target.copy_(new[:alive])
            if ends is not None and ending is not None:
                _record_ends(problem, ends, n, step, old, new, anchors[n] if anchors else None)
            after.append(new[:alive])

    swept = Swept(
        [_joined(x) for x in xs],
        [_joined(x) for x in deltas],
        states,
        [_joined(x) for x in before],
        [_joined(x) for x in back],
        _joined(hats) if hats else None,
        _joined(rstds) if rstds else None,
    )
    return swept, after


def _joined(steps: list[Tensor]) -> Tensor:
    """All rows; the pieces are let go."""
    whole = torch.cat(steps)
    steps.clear()
    return whole


def _record_ends(
    problem: Problem,
    ends: Ends,
    n: int,
    step: int,
    old: Tensor,
    new: Tensor,
    opening: Tensor | None,
) -> None:
    """Hands the final state of documents that end their row at `step` to those rows."""
    plan, h = problem.plan, problem.heads
    pair = plan.ends[step]
    if pair is None:
        return
    here, rows = pair
    ends.weights[n][rows] = weights_of(new, h)[here]
    ends.momentum[n][rows] = momentum_of(new, h)[here]
    if ends.anchor is None:
        return
    ends.anchor[n][rows] = ends.weights[n][rows]
    open_pair = plan.open_ends[step]
    if open_pair is not None:
        here, rows = open_pair
        at = weights_of(old, h)
        if opening is not None and step == 0:
            at = opening.unflatten(0, (-1, h))
        ends.anchor[n][rows] = at[here]


def spread(x: Tensor, pair: Tensor) -> Tensor:
    """[B, C, a] and two coefficients a token [B, C, 2] -> both multiples of x, [B, C, 2a]."""
    return (x[:, :, None, :] * pair[..., None]).flatten(2)


def static_product(problem: Problem, u: Tensor, w: Tensor) -> Tensor:
    """u [B, C, a] times a weight that all chunks share, [H, a, o]: one product a head."""
    m, c = len(u) // problem.heads, u.shape[1]
    flat = u.view(m, problem.heads, c, -1).transpose(0, 1).reshape(problem.heads, m * c, -1)
    return (
        torch.bmm(flat, w).view(problem.heads, m, c, -1).transpose(0, 1).reshape(m * len(w), c, -1)
    )


@dataclass(frozen=True)
class Reads:
    """One pass of the queries: y, and what its adjoint needs."""

    y: Tensor  # [B, C, d]
    inputs: list[Tensor]  # U_l [B, C, a]
    before: list[Tensor]  # O_l [B, C, o], l < L
    products: list[Tensor]  # U_l X_l^T [B, C, C]
    xhat: Tensor | None
    rstd: Tensor | None


def read(problem: Problem, part: Part, swept: Swept) -> Reads:
    """The queries of one part, every token with its own weights, (14)."""
    spec, co = problem.spec, part.coefficients
    u = part.q
    inputs, before, products = [], [], []
    for n in range(spec.depth):
        inputs.append(u)
        product = torch.bmm(u, swept.inputs[n].transpose(1, 2))
        products.append(product)
        out = torch.bmm(spread(u, co.read[n]), swept.states[n])
        out.baddbmm_(co.scores[n] * product, swept.errors[n])
        if spec.decay_to == "init":
            out += static_product(problem, u, problem.w_init[n])
        if n < spec.depth - 1:
            before.append(out)
            u = activate(out, spec.activation)
    if problem.gain is None or problem.bias is None:
        return Reads(out, inputs, before, products, None, None)
    yhat, rstd = standardize(out)
    rows = len(out)
    y = torch.addcmul(
        part.q + problem.tiled(problem.bias, rows), problem.tiled(problem.gain, rows), yhat
    )
    return Reads(y, inputs, before, products, yhat, rstd)
