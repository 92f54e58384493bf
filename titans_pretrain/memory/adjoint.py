"""The backward half of the dual form, by hand: section 5 of MATH.md. Letters as in sweep.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.memory.coefficients import coefficients_adjoint
from titans_pretrain.memory.pointwise import (
    curvature,
    standardize_transpose,
    times_slope,
    transpose_curvature,
)
from titans_pretrain.memory.sweep import (
    Part,
    Problem,
    Reads,
    States,
    Swept,
    absolute_at,
    spread,
    static_product,
    weights_of,
)


@dataclass
class Gradients:
    """Accumulated over the parts, last part first."""

    q: Tensor  # [M * H, C, d]
    k: Tensor
    v: Tensor
    theta: Tensor  # [L, M * H, C]
    alpha: Tensor
    eta: Tensor
    gain: Tensor | None  # [H, d]
    bias: Tensor | None
    w_init: list[Tensor]  # L x [H, a, o]
    state: States  # of the state before the step in hand, L x [B, 2a, o]
    opening: list[Tensor] | None  # of step 0's anchors, L x [B, a, o]


@dataclass(frozen=True)
class _FromReads:
    """What the reads of a part add to the gradients of the keys' sweep."""

    inputs: list[Tensor]  # dX_l [B, C, a]
    errors: list[Tensor]  # dDelta_l [B, C, o]
    states: States  # [B, 2a, o]
    scores: list[Tensor]  # dP_l [B, C, C]
    read: list[Tensor]  # d(b, c) [B, C, 2]


def part_adjoint(
    problem: Problem,
    part: Part,
    swept: Swept,
    reads: Reads,
    anchors: list[Tensor] | None,
    dy: Tensor,
    final: States,
    last_anchor: States | None,
    grads: Gradients,
    room: States,
) -> None:
    """Adds one part to `grads`; parts come in reverse.

    dy [B, C, d]; final: gradients of the states of documents that end their row, by document;
    last_anchor: likewise of their anchors, where they end inside a chunk ([documents * H, a, o]).
    room: from `state_room`, for the gradients of entry states.
    """
    h = problem.heads
    at = slice(part.chunks.start * h, part.chunks.stop * h)
    from_reads, dq = _read_adjoint(problem, part, swept, reads, dy, grads, room)
    dk, dv, d_write, d_carry = _sweep_adjoint(
        problem, part, swept, anchors, from_reads, final, last_anchor, grads
    )
    grads.q[at], grads.k[at], grads.v[at] = dq, dk, dv
    grads.theta[:, at], grads.alpha[:, at], grads.eta[:, at] = coefficients_adjoint(
        part.coefficients,
        torch.stack(from_reads.scores),
        torch.stack(from_reads.read),
        d_write,
        d_carry,
    )


def _read_adjoint(
    problem: Problem,
    part: Part,
    swept: Swept,
    reads: Reads,
    dy: Tensor,
    grads: Gradients,
    room: States,
) -> tuple[_FromReads, Tensor]:
    """(16) for the layers L..1 of all chunks of a part at once."""
    spec, co, h = problem.spec, part.coefficients, problem.heads
    dq = torch.zeros_like(dy)
    d_out = dy
    if problem.gain is not None and reads.xhat is not None and reads.rstd is not None:
        assert grads.gain is not None and grads.bias is not None
        _add_per_head(grads.gain, dy * reads.xhat)
        _add_per_head(grads.bias, dy)
        dq = dy
        d_out = standardize_transpose(
            dy * problem.tiled(problem.gain, len(dy)), reads.xhat, reads.rstd
        )
    inputs, errors, states, scores, pairs = [], [], [], [], []
    for n in range(spec.depth - 1, -1, -1):
        u, x, delta = reads.inputs[n], swept.inputs[n], swept.errors[n]
        rho = torch.bmm(d_out, delta.transpose(1, 2))
        scores.append(rho * reads.products[n])
        rho *= co.scores[n]
        errors.append(torch.bmm((co.scores[n] * reads.products[n]).transpose(1, 2), d_out))
        inputs.append(torch.bmm(rho.transpose(1, 2), u))
        states.append(room[n][: len(u)])
        torch.bmm(spread(u, co.read[n]).transpose(1, 2), d_out, out=states[-1])
        both = torch.bmm(d_out, swept.states[n].transpose(1, 2)).unflatten(2, (2, -1))
        pairs.append(_dots(both, u))
        du = _fold(both, co.read[n]).baddbmm_(rho, x)
        if spec.decay_to == "init":
            du += static_product(problem, d_out, problem.w_init[n].transpose(1, 2))
            grads.w_init[n] += _static_outer(u, d_out, h)
        if n:
            d_out = times_slope(du, reads.before[n - 1], spec.activation)
        else:
            dq = dq + du
    for lists in (inputs, errors, states, scores, pairs):
        lists.reverse()
    return _FromReads(inputs, errors, states, scores, pairs), dq


def _sweep_adjoint(
    problem: Problem,
    part: Part,
    swept: Swept,
    anchors: list[Tensor] | None,
    extra: _FromReads,
    final: States,
    last_anchor: States | None,
    grads: Gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(17)-(20) chunk by chunk, last first. Returns dk, dv, and those of write and carry."""
    spec, layers = problem.spec, problem.spec.depth
    co = part.coefficients
    d_write, d_carry = torch.empty_like(co.write), torch.empty_like(co.carry)
    dk = torch.empty_like(part.k)
    # Everything about the norm and the second derivatives that needs no state gradient, at once.
    bent = [m * curvature(a, spec.activation) for m, a in zip(swept.back, swept.before)]
    miss2 = u = du_all = None
    if problem.gain is not None and problem.bias is not None:
        assert swept.xhat is not None and swept.rstd is not None
        gain = problem.tiled(problem.gain, len(part.k))
        miss2 = 2 * (part.k - part.v + problem.tiled(problem.bias, len(part.k)) + gain * swept.xhat)
        u, du_all = miss2 * gain, torch.empty_like(part.k)
    dv = None if du_all is not None else torch.empty_like(part.k)

    for step in reversed(part.steps):
        rows = part.rows(problem, step)
        count = rows.stop - rows.start
        state = [s[rows] for s in swept.states]
        first_anchors = anchors if step == 0 else None
        at = [
            absolute_at(problem, n, state[n], first_anchors[n] if first_anchors else None)
            for n in range(layers)
        ]
        d_errors, d_inputs = [], []
        for n in range(layers):  # (17)
            g = grads.state[n]
            if len(g) < count:  # documents whose last chunk this is
                g = torch.cat([g, final[n][len(g) : count]])
            x, delta = swept.inputs[n][rows], swept.errors[n][rows]
            write, carry = co.write[n, rows], co.carry[n, rows]
            d_errors.append(torch.baddbmm(extra.errors[n][rows], spread(x, write), g))
            both = torch.bmm(delta, g.transpose(1, 2)).unflatten(2, (2, -1))
            d_inputs.append(_fold(both, write).add_(extra.inputs[n][rows]))
            d_write[n, rows] = _dots(both, x)
            g = g.view(count, 2, -1)
            torch.bmm(g, state[n].view(count, 2, -1).transpose(1, 2), out=d_carry[n, rows])
            new = torch.baddbmm(extra.states[n][rows].view(count, 2, -1), carry.transpose(1, 2), g)
            grads.state[n] = new.view_as(state[n])

        # (18): the errors, front to back
        d_before: list[Tensor] = []
        d_at: list[Tensor | None] = [None] * layers
        for n in range(layers - 1):
            e = times_slope(d_errors[n], swept.before[n][rows], spec.activation)
            d_before.append(d_errors[n] * bent[n][rows])
            d_errors[n + 1].baddbmm_(e, at[n + 1])
            d_at[n + 1] = torch.bmm(e.transpose(1, 2), swept.errors[n + 1][rows])
        w = d_errors[-1]
        if u is not None and du_all is not None and problem.gain is not None:  # (19)
            assert swept.xhat is not None and swept.rstd is not None
            xhat, rstd = swept.xhat[rows], swept.rstd[rows]
            gain = problem.tiled(problem.gain, count)
            du = standardize_transpose(w, xhat, rstd)
            du_all[rows] = du
            d_before.append(
                transpose_curvature(
                    w, u[rows], swept.errors[-1][rows], xhat, rstd, 2 * gain.square() * du
                )
            )
        else:
            d_before.append(2 * w)
            assert dv is not None
            dv[rows] = -2 * w
        for n in range(layers - 1, -1, -1):  # (20): the inputs, back to front
            d_inputs[n].baddbmm_(d_before[n], at[n].transpose(1, 2))
            x_t, now = swept.inputs[n][rows].transpose(1, 2), d_at[n]
            g = torch.bmm(x_t, d_before[n]) if now is None else now.baddbmm_(x_t, d_before[n])
            if n:
                d_before[n - 1] += times_slope(
                    d_inputs[n], swept.before[n - 1][rows], spec.activation
                )
            _add_anchor(problem, n, step, g, last_anchor, first_anchors is not None, grads)
        dk[rows] = d_inputs[0]

    if du_all is not None and miss2 is not None and problem.gain is not None:
        assert grads.gain is not None and grads.bias is not None and swept.xhat is not None
        d_miss = 2 * du_all * problem.tiled(problem.gain, len(du_all))
        _add_per_head(grads.gain, miss2 * du_all + d_miss * swept.xhat)
        _add_per_head(grads.bias, d_miss)
        dk += d_miss
        dv = -d_miss
    assert dv is not None
    return dk, dv, d_write, d_carry


def _add_anchor(
    problem: Problem,
    n: int,
    step: int,
    g: Tensor,
    last_anchor: States | None,
    opening: bool,
    grads: Gradients,
) -> None:
    """The gradient g [B, a, o] of the weights that a step's keys saw, to where those came from."""
    h = problem.heads
    g = g.unflatten(0, (-1, h))
    if problem.spec.decay_to == "init":
        grads.w_init[n] += g.sum(0)
    pair = problem.plan.open_ends[step]
    if last_anchor is not None and pair is not None:
        # A row that ends inside this chunk hands its anchor on.
        g[pair[0]] += last_anchor[n].unflatten(0, (-1, h))[pair[0]]
    if opening and grads.opening is not None and problem.plan.inside is not None:
        here = problem.plan.inside[0]
        grads.opening[n].unflatten(0, (-1, h))[here] = g[here]
        g[here] = 0
    weights_of(grads.state[n], h).add_(g)


def _fold(both: Tensor, pair: Tensor) -> Tensor:
    """The adjoint of `spread` by x: [B, C, 2, a], [B, C, 2] -> [B, C, a]."""
    first, second = both.unbind(2)
    return (first * pair[..., :1]).addcmul_(second, pair[..., 1:])


def _dots(both: Tensor, x: Tensor) -> Tensor:
    """The adjoint of `spread` by its pair: [B, C, 2, a], [B, C, a] -> [B, C, 2]."""
    return (both @ x[..., None])[..., 0]


def _static_outer(u: Tensor, g: Tensor, heads: int) -> Tensor:
    """sum over chunks and tokens of u^T g, per head: [B, C, a], [B, C, o] -> [H, a, o]."""
    m, c = len(u) // heads, u.shape[1]
    u, g = (x.view(m, heads, c, -1).transpose(0, 1).reshape(heads, m * c, -1) for x in (u, g))
    return torch.bmm(u.transpose(1, 2), g)


def _add_per_head(total: Tensor, x: Tensor) -> None:
    """Adds [B, C, d], summed over chunks and tokens, to [H, d]."""
    total += x.view(-1, *total.shape[:1], *x.shape[1:]).sum((0, 2))
