"""What surrounds a memory: projections, convolutions, gates, norms (Titans, sections 3.1, 4.4).

Written for one device: head counts are read off the tensors, and everything but `out` stays inside
a head, so a layer whose parameters are cut by head computes its heads' share unchanged.

Shape letters: N rows, T tokens of a row, D model width, H heads, d head width, L layers of the
memory, a and o widths into and out of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.observe import observed, record
from titans_pretrain.memory.onto import onto
from titans_pretrain.memory.packing import PackingPlan, plan_rows
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.sizes import TAIL, WIDTH
from titans_pretrain.memory.state import (
    MemoryState,
    absolute_weights,
    initial_state,
    memory_forward,
)
from titans_pretrain.memory.tally import Rows

Device = torch.device | str | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gates, memory and statistics: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ConvPlan:
    """Which rows convolutions see, worked out once from the positions [N, T] of their tokens."""

    fresh: bool  # each row starts a document and holds no other: before it lie zeros
    visible: tuple[Tensor, ...] | None  # at distance 1 .. 3 [N, T, 1]; None: all there is
    first: Tensor | None  # [N, 3]: where carried rows go, among T + 3, if pads lead a row
    last: Tensor | None  # [N, 3]: which of T + 3 rows to carry on, if pads end a row

    @staticmethod
    def of(positions: Tensor, device: Device = None) -> ConvPlan:
        """positions on the CPU, -1 at pads, which may lead a row, end it or part documents.

        A tap at distance j is visible iff j <= position.
        """
        T = positions.shape[1]
        real = positions >= 0
        column = torch.arange(T)
        near = real & (positions < TAIL)  # tokens that can reach beyond their document
        fresh = bool((positions[:, 0] == 0).all() and (near <= (positions == column)).all())
        visible = None
        if not fresh and near.any():
            visible = tuple(onto(positions[..., None] >= j, device) for j in range(1, WIDTH))
        # In a row without real tokens both point at the carried rows themselves.
        lead = column.where(real, T).amin(1) % T
        end = (column + 1).where(real, 0).amax(1)
        rows = torch.arange(TAIL)
        return ConvPlan(
            fresh=fresh,
            visible=visible,
            first=onto(lead[:, None] + rows, device) if lead.any() else None,
            last=onto(end[:, None] + rows, device) if (end < T).any() else None,
        )


class CausalConv(nn.Module):
    """silu(sum_j w_j x_{t-j}), j = 0..3, each channel for itself; a document's first token sees
    nothing before it."""

    def __init__(self, width: int, *, device: Device = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, WIDTH, device=device, dtype=dtype))

    def forward(self, x: Tensor, plan: ConvPlan, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [N, T, D], tail [N, 3, D] (the inputs before x) -> y [N, T, D], the next tail."""
        T = x.shape[1]
        dtype = wide(x.dtype)
        x, w = x.to(dtype), self.weight.to(dtype)
        if tail is None or plan.fresh:
            rows = F.pad(x, (0, 0, TAIL, 0))
        elif plan.first is None:
            rows = torch.cat((tail, x), dim=1)
        else:
            rows = F.pad(x, (0, 0, TAIL, 0))
            rows = rows.scatter(1, plan.first[..., None].expand_as(tail), tail)
        y = x * w[:, 0]
        for j in range(1, WIDTH):
            before = rows[:, TAIL - j : TAIL - j + T]
            if plan.visible is not None:
                before = before.where(plan.visible[j - 1], 0)
            y = torch.addcmul(y, before, w[:, j])
        if plan.last is None:
            after = rows[:, T:]
        else:
            after = rows.gather(1, plan.last[..., None].expand(-1, -1, x.shape[2]))
        return F.silu(y), after


class HeadNorm(nn.Module):
    """RMSNorm of each head, with its own gain: x [.., H, d] in float32 or float64."""

    def __init__(
        self,
        heads: int,
        head_width: int,
        eps: float,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, head_width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight.to(x.dtype)


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's own features alone: x [.., H*a], weight [H*o, a] -> [.., H*o]."""
    weight = weight.to(x.dtype).unflatten(0, (x.shape[-1] // weight.shape[1], -1))
    return torch.einsum("...ha,hoa->...ho", x.unflatten(-1, (len(weight), -1)), weight).flatten(-2)


class HeadLinear(nn.Module):
    """A block-diagonal linear layer: `inputs` to `outputs` features of each of `heads` heads. A cut
    of its weight by rows is a cut by heads. Computes in the dtype of its input."""

    def __init__(
        self,
        heads: int,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(heads * outputs, inputs, **where))
        self.bias = nn.Parameter(torch.empty(heads * outputs, **where)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = per_head(x, self.weight)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@dataclass(frozen=True)
class Rates:
    """The gates of the inner update, each [N, H, T, L]: step, forgetting, momentum."""

    theta: Tensor
    alpha: Tensor
    eta: Tensor


class MemoryLayer(nn.Module):
    """The projections round a neural memory with `heads` heads, and its learned first weights.

    `output_gate` adds the gate that LMM takes from the block's input. With `own_features` a head's
    queries, keys, values and gates come from its own features alone, not from all of the input.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        spec: MemorySpec,
        *,
        eps: float = 1e-5,
        output_gate: bool = False,
        own_features: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d, L = width // heads, spec.depth
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.spec = spec
        self.head_width = d
        self.name = ""  # by which observe_memory reports; the model sets it
        self.q, self.k, self.v = (
            HeadLinear(heads, d, d, **where)
            if own_features
            else nn.Linear(width, width, bias=False, **where)
            for _ in range(3)
        )
        self.q_conv = CausalConv(width, **where)
        self.k_conv = CausalConv(width, **where)
        self.v_conv = CausalConv(width, **where)
        # Outputs ordered [H, L, (theta, alpha, eta)]: a cut by rows is a cut by heads.
        self.gates = (
            HeadLinear(heads, d, L * 3, bias=True, **where)
            if own_features
            else WideLinear(width, heads * L * 3, **where)
        )
        self.initial = nn.ParameterList(
            torch.empty(heads, a, o, **where) for a, o in spec.shapes(d)
        )
        self.inner_gain = self.inner_bias = None
        if spec.residual_norm:
            self.inner_gain = nn.Parameter(torch.ones(heads, d, **where))
            self.inner_bias = nn.Parameter(torch.zeros(heads, d, **where))
        self.read_norm = HeadNorm(heads, d, eps, **where)
        self.output_gate = nn.Linear(width, width, bias=False, **where) if output_gate else None
        self.out = nn.Linear(width, width, bias=False, **where)

    def heads(self, x: Tensor) -> Tensor:
        """[N, T, H*d] -> [N, H, T, d]"""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def queries(self, x: Tensor, plan: ConvPlan, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit queries [N, H, T, d] of x [N, T, D], which `q` has projected, and the next tail."""
        y, tail = self.q_conv(x, plan, tail)
        return F.normalize(self.heads(y), dim=-1, eps=1e-6), tail

    def keys(self, x: Tensor, plan: ConvPlan, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit keys [N, H, T, d] of x [N, T, D], which `k` has projected, and the next tail."""
        y, tail = self.k_conv(x, plan, tail)
        return F.normalize(self.heads(y), dim=-1, eps=1e-6), tail

    def values(self, x: Tensor, plan: ConvPlan, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """Values [N, H, T, d] of x [N, T, D], which `v` has projected, and the next tail."""
        y, tail = self.v_conv(x, plan, tail)
        return self.heads(y), tail

    def rates(self, x: Tensor) -> Rates:
        """theta = sg * min(1/64, (1 - eta) / C), alpha = sg, eta = sg, linear in x [N, T, D].

        theta never exceeds what keeps a chunk of stale gradients at unit keys stable.
        """
        raw = (
            self.gates(x.to(wide(x.dtype))).unflatten(-1, (-1, self.spec.depth, 3)).transpose(1, 2)
        )
        step, alpha, eta = torch.sigmoid(raw).unbind(-1)
        return Rates(step * ((1 - eta) / self.spec.chunk).clamp(max=1 / 64), alpha, eta)

    def first_weights(self) -> tuple[Tensor, ...]:
        """The learned first fast weights, each [H, a, o], in the memory's dtype."""
        return tuple(w.to(wide(w.dtype)) for w in self.initial)

    def inner_norm(self) -> tuple[Tensor, Tensor] | None:
        """Gain and bias [H, d] of the LayerNorm inside the memory, in the memory's dtype."""
        if self.inner_gain is None or self.inner_bias is None:
            return None
        dtype = wide(self.inner_gain.dtype)
        return self.inner_gain.to(dtype), self.inner_bias.to(dtype)

    def start(self, rows: int) -> MemoryState:
        """The state before a document's first token, for each of `rows` rows."""
        return initial_state(self.first_weights(), rows, self.spec)

    def tail(self, rows: int) -> Tensor:
        """What a convolution carries on before a row's first token, zeros [rows, 3, H*d]."""
        weight = self.q.weight
        return weight.new_zeros((rows, TAIL, len(weight)), dtype=wide(weight.dtype))

    def retrieve(self, q: Tensor, weights: tuple[Tensor, ...] | None) -> Tensor:
        """M(q; W) [N, H, T, d] with frozen weights: those of a state, or the first (None)."""
        absolute = first = self.first_weights()
        if weights is not None:
            absolute = absolute_weights(MemoryState(weights, weights, None), first, self.spec)
        return memory_forward(q, absolute, self.inner_norm(), self.spec)

    def write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Rates,
        plan: PackingPlan,
        state: MemoryState | None,
        start: MemoryState | None = None,
        rows: Rows | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Writes k, v and reads at q, token by token [N, H, T, d]; `plan` says what to reset, and
        `start` (one row) what to; default the first weights. rows: for `record`."""
        w_init, norm = self.first_weights(), self.inner_norm()
        gates = (rates.theta, rates.alpha, rates.eta)
        y, after = chunked_memory(
            q, k, v, *gates, w_init, norm, self.spec, plan=plan, state=state, start=start
        )
        if observed():
            record(self.name, k, v, gates, w_init, norm, self.spec, plan, state, after, start, rows)
        return y, after

    def begin(self, x: Tensor) -> tuple[Tensor, MemoryState]:
        """Writes rows x [1, P, D] into the first weights: what is read there [1, H, P, d], and the
        state that they leave for documents to start from (MATH.md, (30)). Not observed."""
        P, gates = x.shape[1], self.rates(x)
        conv = ConvPlan(fresh=True, visible=None, first=None, last=None)
        q, _ = self.queries(self.q(x), conv, None)
        k, _ = self.keys(self.k(x), conv, None)
        v, _ = self.values(self.v(x), conv, None)
        y, state = chunked_memory(
            q,
            k,
            v,
            gates.theta,
            gates.alpha,
            gates.eta,
            self.first_weights(),
            self.inner_norm(),
            self.spec,
            plan=plan_rows(1, P, self.spec.chunk, x.device),
        )
        return y, MemoryState(state.weights, state.momentum)

    def normed(self, y: Tensor) -> Tensor:
        """What was read [N, H, T, d] -> [N, T, H*d], each head normalised."""
        return self.read_norm(y.transpose(1, 2)).flatten(-2)
