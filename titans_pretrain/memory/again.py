"""What a memory's backward computes again of its forward: the keys' sweep, and the reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.memory.packing import PackingPlan
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import without_autocast
from titans_pretrain.memory.sweep import (
    Part,
    Problem,
    Reads,
    States,
    Swept,
    pack_part,
    read,
    start_anchors,
    start_states,
    state_room,
    sweep,
)

Redone = tuple[Part, list[Tensor] | None, Swept, Reads]  # a part, step 0's anchors, both passes


@dataclass
class Again:
    """The forward of one call, computed again for its backward part by part, the last one first."""

    problem: Problem
    tensors: tuple[Tensor | None, ...]  # the function's arguments
    carried: tuple[tuple[Tensor, ...] | None, ...]  # weights, momentum, anchor
    boundaries: tuple[Tensor, ...]  # states before all parts but the first
    room: States | None = None  # parts that are done one by one take turns in it
    done: dict[int, Redone] = field(default_factory=dict)

    @staticmethod
    def of(ctx: Any) -> Again:
        """The one of this node of autograd, begun now if need be."""
        if getattr(ctx, "again", None) is None:
            saved = ctx.saved_tensors  # once: under block recompute a second look is an error
            tensors, boundaries = saved[: ctx.given], saved[ctx.given :]
            with without_autocast(tensors[0]):
                problem, *carried = unflatten(ctx.spec, ctx.plan, ctx.started, tensors)
            ctx.again = Again(problem, tensors, tuple(carried), boundaries)
        again: Again = ctx.again
        return again

    @torch.no_grad()
    def hurry(self, whole: bool) -> None:
        """Computes the last part now, or all of them, each in a room of its own."""
        with without_autocast(self.problem.q):
            parts = range(len(self.problem.plan.groups))
            for index in reversed(parts if whole else parts[-1:]):
                room = state_room(self.problem, index) if whole else self._room()
                self.done[index] = self._compute(index, room)

    def take(self, index: int) -> Redone:
        """A part; parts that are not done yet, one by one."""
        done = self.done.pop(index, None)
        return done or self._compute(index, self._room())

    def _room(self) -> States:
        if self.room is None:
            self.room = state_room(self.problem)
        return self.room

    def _compute(self, index: int, room: States) -> Redone:
        problem, layers = self.problem, self.problem.spec.depth
        first, stop = problem.plan.groups[index]
        part = pack_part(problem, range(first, stop))
        anchors = None
        if first:
            state = list(self.boundaries[(index - 1) * layers : index * layers])
        else:
            weights, momentum, anchor = self.carried
            state = start_states(problem, weights, momentum)
            anchors = start_anchors(problem, state, anchor)
        swept, _ = sweep(problem, part, state, anchors, None, room)
        return part, anchors, swept, read(problem, part, swept)


def unflatten(
    spec: MemorySpec, plan: PackingPlan, started: bool, tensors: tuple[Tensor | None, ...]
) -> tuple[
    Problem,
    tuple[Tensor, ...] | None,
    tuple[Tensor, ...] | None,
    tuple[Tensor, ...] | None,
]:
    """The function's flat arguments as the problem and the carried weights, momentum, anchor."""
    layers = spec.depth
    q, k, v, theta, alpha, eta, gain, bias, *rest = tensors
    assert q is not None and k is not None and v is not None
    assert theta is not None and alpha is not None and eta is not None
    dtype = torch.promote_types(q.dtype, theta.dtype)
    whole = [x for x in rest if x is not None]
    first, *parts = [tuple(whole[i : i + layers]) for i in range(0, len(whole), layers)]
    start = (parts.pop(0), parts.pop(0)) if started else None
    problem = Problem(
        spec,
        plan,
        q,
        k,
        v,
        theta,
        alpha,
        eta,
        tuple(w.to(dtype) for w in first),
        None if gain is None else gain.to(dtype),
        None if bias is None else bias.to(dtype),
        start,
    )
    weights, momentum, anchor = (parts[i] if i < len(parts) else None for i in (0, 1, 2))
    return problem, weights, momentum, anchor
