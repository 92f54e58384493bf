"""MAC: the memory's answers as context of segment attention (Titans, section 4.1).

Shape letters: B rows, T tokens of a row, n documents of a step, w slots of a step, D model width,
H heads (for keys and values of attention K, which divide them), d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.chunked import begin_backward
from titans_pretrain.memory.layer import HeadLinear, MemoryLayer, per_head
from titans_pretrain.memory.observe import observed
from titans_pretrain.memory.state import MemoryState, concatenate
from titans_pretrain.memory.tally import Rows
from titans_pretrain.model.blocks import Attention, rotate
from titans_pretrain.model.packing import SegmentPlan, SegmentStep, move, segment_plan
from titans_pretrain.model.seams import Seam


@dataclass(frozen=True)
class MacState:
    """What each row carries on: the memory, the convolutions' tails and its open segment."""

    memory: MemoryState
    asked_tail: Tensor | None  # [B, 3, D] of the queries of X
    tails: tuple[Tensor, ...]  # of queries, keys, values of Y, each [B, 3, D]
    frozen: tuple[Tensor, ...]  # the memory's weights at the open segment's start [B, H, a, o]
    segment: tuple[Tensor, ...]  # keys and values of the open segment, each [B, K, slots, d]
    retrieved: tuple[Tensor, ...]  # keys and values of its memory tokens, likewise
    query: Tensor  # [B, H, 1, d] with which the last token asked the memory


class MacMixer(nn.Module):
    """Memory as context (Titans, equations 21-25), read so that no token sees a later one.

    For each segment X of a document, with the memory's weights W at the segment's start:
        h = M(q(X); W)                             asked of the frozen memory
        Y = o(attention(X; persistent | h | X))    h is seen once all its queries are past
        W_t: the memory written with k(Y), v(Y)    token by token
        out(Y * sigmoid(norm(M(q(Y); W_t))))
    Attention is one layer, so the outputs of persistent and h rows are never needed: these rows
    are keys and values alone. Persistent keys are not rotated; h has the position of its last
    query; positions count from the segment's start.

    Whoever shards the heads pays for h and Y, which all heads read in full: in each segment h is
    gathered and Y summed, and in the backward the same again. With block-diagonal projections a
    head reads its own features alone, of X where it asks, of h (by the blocks of attention's k and
    v that map its features to its keys and values), of what attention read, and of Y: nothing
    crosses heads before `out`, and nothing is gathered or summed.
    """

    def __init__(
        self,
        config: ModelConfig,
        memory: MemoryLayer,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, d = config.width, config.head_width
        self.own_features = config.memory.projections == "block_diagonal"
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = Attention(D, d, config.kv_width, output=not self.own_features, **where)
        if self.own_features:
            self.attention.o = HeadLinear(config.heads, d, d, **where)
        self.memory = memory
        self.segment, self.pool = config.segment, config.memory.pool
        self.persistent = self.asked = None
        if config.persistent_tokens:
            shape: tuple[int, ...] = (config.persistent_tokens, D)
            self.persistent = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if self.pool is None:
            shape = (config.heads, config.memory.learned_queries, d)
            self.asked = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        # Where features of all heads meet those of one's own, for whoever shards the heads:
        self.gather_heads = nn.Identity()  # h before the attention's projections
        # Y before the product with what its heads read; block-diagonal: what own features are of
        self.scatter_heads = nn.Identity()
        self.seam = Seam()

    def forward(
        self, x: Tensor, plan: SegmentPlan, state: MacState | None, carry: bool
    ) -> tuple[Tensor, MacState | None]:
        """x [B, T, D] -> [B, T, D], and what the rows carry on."""
        a, m, seam = self.attention, self.memory, self.seam
        # What depends on X alone is formed for all tokens at once, then put into slots.
        q, k, v = a.heads(a.q(x)), a.heads(a.k(x)), a.heads(a.v(x))
        q, k = rotate(q, plan.rotation), rotate(k, plan.rotation)
        joined = torch.cat((q, k, v), dim=1)
        widths = (q.shape[1], k.shape[1], v.shape[1])
        queries: list[Tensor | None] = [None] * len(plan.steps)
        asked_tail = None
        if self.pool is not None:
            before = None if state is None else state.asked_tail
            asked = m.q(self.scatter_heads(x) if self.own_features else x)
            asked, before = seam.take("asked", asked, before, lambda: m.tail(len(x)))
            asked, asked_tail = m.queries(asked, plan.rows, before)
            asked = seam.give("asked", asked, asked_tail)
            queries = [part[0] for part in _slots(asked[None], plan)]
        persistent = None
        if self.persistent is not None:
            p = self.persistent[None]
            persistent = torch.stack((a.heads(a.k(p)), a.heads(a.v(p))))  # [2, 1, K, P, d]

        joined, state = seam.take("segment", joined, state, lambda: self._room(self._blank(x)))
        context = _slots(joined[None], plan)
        open_ = None if state is None else _OpenSegment(state, plan)
        memory = None if open_ is None else open_.memory
        tails: tuple[Tensor | None, ...] = (None,) * 3 if open_ is None else open_.tails
        outputs, closed, reads = [], [], []
        for s, step in enumerate(plan.steps):
            n = step.documents
            query, frozen = queries[s], None if memory is None else memory.weights
            if open_ is not None and s == 0:
                query, frozen = open_.query(query, step), open_.frozen(m.start(n).weights)
            retrieved = self._retrieved(query, frozen, step, plan, x.dtype)  # [2, n, K, r, d]
            q, k, v = context[s][0].split(widths, dim=1)  # each [n, heads, w, d]
            segment = torch.stack((k, v))
            if open_ is not None and s == 0:
                retrieved = open_.retrieved(retrieved, step, self.pool)
                segment = open_.segment(segment, step)
            parts = [retrieved, segment]
            if persistent is not None:
                parts.insert(0, persistent.expand(-1, n, -1, -1, -1))
            k, v = torch.cat(parts, dim=3)
            y = a.project(a.read(q, k, v, step.mask))  # [n, w, D]

            q_m, q_tail = m.queries(m.q(y), step.conv, tails[0])
            k_m, k_tail = m.keys(m.k(y), step.conv, tails[1])
            v_m, v_tail = m.values(m.v(y), step.conv, tails[2])
            rows = _rows(plan, s) if observed() else None
            read, memory = m.write(q_m, k_m, v_m, m.rates(y), step.memory, memory, rows=rows)
            reads.append(read)
            gate = torch.sigmoid(m.normed(read)).to(y.dtype)
            y = y if self.own_features else self.scatter_heads(y)
            outputs.append((y * gate).flatten(0, 1))

            tails = (q_tail, k_tail, v_tail)
            if (carry or seam.gives) and len(step.closing):
                if frozen is None:
                    frozen = m.start(n).weights
                closed.append(_close(step, memory, tails, frozen, segment, retrieved, query))
            if s + 1 < len(plan.steps):  # all documents that go on stand on a chunk boundary
                memory = MemoryState(memory.weights, memory.momentum)
                if plan.steps[s + 1].documents < n:
                    n = plan.steps[s + 1].documents
                    memory, tails = memory.rows(n), tuple(t[:n] for t in tails)
        after, output = None, torch.cat(outputs)
        if carry or seam.gives:
            after = _by_row(closed, asked_tail, plan, state or self._blank(x))
            output = seam.give("segment", output, self._room(after), begin_backward(*reads))
        out = m.out(move(output, plan.tokens, plan.slots).view(*x.shape[:2], -1))
        return out, after if carry else None

    def _retrieved(
        self,
        query: Tensor | None,
        frozen: tuple[Tensor, ...] | None,
        step: SegmentStep,
        plan: SegmentPlan,
        dtype: torch.dtype,
    ) -> Tensor:
        """Keys and values [2, n, K, r, d] of the memory tokens that this step's queries form."""
        a, m = self.attention, self.memory
        if self.asked is not None:
            asked = F.normalize(self.asked.to(m.first_weights()[0].dtype), dim=-1, eps=1e-6)
            query = asked.expand(step.documents, -1, -1, -1)
        assert query is not None
        if self.pool is not None and self.pool > 1:
            query = query.unflatten(2, (-1, self.pool)).mean(3)
        h = m.retrieve(query, frozen).transpose(1, 2).flatten(-2).to(dtype)  # [n, r, H*d]
        if self.own_features:
            k, v = (per_head(h, self._blocks(maps.weight)) for maps in (a.k, a.v))
        else:
            h = self.gather_heads(h)
            k, v = a.k(h), a.v(h)
        cos, sin = (t[:, :, slice(*step.retrieved)] for t in plan.retrieved_rotation)
        return torch.stack((rotate(a.heads(k), (cos, sin)), a.heads(v)))

    def _blocks(self, weight: Tensor) -> Tensor:
        """Of attention's k or v [K*d, D] what maps the features of the H / K heads that share a key
        to it: [K*d, H/K*d]."""
        own = self.scatter_heads(weight).unflatten(0, (-1, self.attention.head_width))
        blocks = own.unflatten(2, (len(own), -1)).diagonal(dim1=0, dim2=2)  # [d, H/K*d, K]
        return blocks.movedim(-1, 0).flatten(0, 1)

    def _blank(self, x: Tensor) -> MacState:
        """The state of rows that have seen no token."""
        memory, tail = self.memory.start(x.shape[0]), self.memory.tail(x.shape[0])
        H, d = memory.weights[0].shape[1], self.attention.head_width
        slots = x.new_zeros(x.shape[0], self.attention.k.weight.shape[0] // d, 0, d)
        return MacState(
            memory=memory,
            asked_tail=None if self.pool is None else tail,
            tails=(tail, tail, tail),
            frozen=memory.weights,
            segment=(slots, slots),
            retrieved=(slots, slots),
            query=tail.new_zeros(x.shape[0], H, 1, d),
        )

    def _room(self, state: MacState) -> MacState:
        """The state with room for a whole segment, whatever the documents; without the tail that
        passes by itself, and without memory tokens that are all formed anew."""

        def slots(parts: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
            return tuple(F.pad(t, (0, 0, 0, n - t.shape[2])) for t in parts)

        return replace(
            state,
            memory=MemoryState(state.memory.weights, state.memory.momentum),
            asked_tail=None,
            segment=slots(state.segment, self.segment),
            retrieved=slots(state.retrieved, self.segment // self.pool if self.pool else 0),
        )

    @staticmethod
    def plan(
        config: ModelConfig,
        positions: Tensor,
        state: Mapping[str, Any] | None,
        like: Tensor,
        before: Tensor | None = None,
    ) -> SegmentPlan:
        return segment_plan(
            positions,
            segment=config.segment,
            chunk=config.memory.chunk,
            persistent=config.persistent_tokens,
            pool=config.memory.pool,
            learned=config.memory.learned_queries,
            carried=bool(state) or before is not None,
            head_width=config.head_width,
            rope_base=config.rope_base,
            dtype=like.dtype,
            device=like.device,
        )


def _slots(x: Tensor, plan: SegmentPlan) -> list[Tensor]:
    """x [c, B, H, T, d] -> for each step [c, n, H, w, d]."""
    tokens = x.permute(1, 3, 0, 2, 4).flatten(0, 1)  # [B * T, c, H, d]
    slots = move(tokens, plan.slots, plan.tokens)
    parts = slots.split([step.positions.numel() for step in plan.steps])
    return [
        part.unflatten(0, tuple(step.positions.shape)).permute(2, 0, 3, 1, 4)
        for part, step in zip(parts, plan.steps, strict=True)
    ]


def _rows(plan: SegmentPlan, s: int) -> Rows:
    """Where the documents of step `s` lie, each with one segment."""
    step = plan.steps[s]
    row = plan.document_rows[: step.documents]
    none = torch.zeros_like(row, dtype=torch.bool)
    return Rows(
        row,
        begun=plan.skipped[: step.documents, 0, 0, 0] > 0 if s == 0 else none,
        last=none.index_fill(0, step.closing, True),
        first=s == 0,
        pads=plan.empty is not None and bool(plan.empty.all()),
    )


class _OpenSegment:
    """The carried state, laid out for the documents of the first step."""

    def __init__(self, state: MacState, plan: SegmentPlan) -> None:
        self.state, self.plan, self.rows = state, plan, plan.document_rows
        self.memory = state.memory.rows(self.rows)
        self.tails = tuple(t[self.rows] for t in state.tails)

    def frozen(self, first: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Weights at the segment's start; `first`: those of a fresh memory."""
        inside = self.plan.skipped > 0
        kept = (
            torch.where(inside, f[self.rows], w)
            for f, w in zip(self.state.frozen, self.memory.weights, strict=True)
        )
        return tuple(torch.where(self.plan.fresh, w0, w) for w0, w in zip(first, kept, strict=True))

    def query(self, query: Tensor | None, step: SegmentStep) -> Tensor | None:
        """The step's queries, with that of the last token before the cut put back."""
        if query is None:
            return None
        slot = torch.arange(step.begin, step.end, device=query.device)[:, None]
        return torch.where(slot == self.plan.skipped - 1, self.state.query[self.rows], query)

    def segment(self, new: Tensor, step: SegmentStep) -> Tensor:
        """Keys and values of slots 0 .. end, from those of begin .. end."""
        return self._resume(self.state.segment, new, step.begin, self.plan.skipped)

    def retrieved(self, new: Tensor, step: SegmentStep, pool: int | None) -> Tensor:
        """Keys and values of the memory tokens so far; learned ones are all formed anew."""
        if pool is None:
            return new
        return self._resume(self.state.retrieved, new, step.retrieved[0], self.plan.skipped // pool)

    def _resume(self, old: tuple[Tensor, ...], new: Tensor, begin: int, count: Tensor) -> Tensor:
        """The first `count` [n, 1, 1, 1] slots from `old`, the others from `new` [2, n, K, w, d]"""
        end = begin + new.shape[3]
        kept = torch.stack(old)[:, self.rows, :, :end]
        kept = F.pad(kept, (0, 0, 0, end - kept.shape[3]))
        slot = torch.arange(end, device=new.device)[:, None]
        return torch.where(slot < count, kept, F.pad(new, (0, 0, begin, 0)))


@dataclass(frozen=True)
class _Closed:
    """The documents that end in one step, as their rows carry them on."""

    memory: MemoryState
    tails: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...]
    segment: Tensor
    retrieved: Tensor
    query: Tensor | None


def _close(
    step: SegmentStep,
    memory: MemoryState,
    tails: tuple[Tensor, ...],
    frozen: tuple[Tensor, ...],
    segment: Tensor,
    retrieved: Tensor,
    query: Tensor | None,
) -> _Closed:
    rows = step.closing
    if query is not None:
        query = query[rows].take_along_dim(step.last[:, None, None, None], dim=2)
    return _Closed(
        memory=memory.rows(rows),
        tails=tuple(t[rows] for t in tails),
        frozen=tuple(w[rows] for w in frozen),
        segment=segment[:, rows],
        retrieved=retrieved[:, rows],
        query=query,
    )


def _by_row(
    closed: list[_Closed], asked_tail: Tensor | None, plan: SegmentPlan, old: MacState
) -> MacState:
    """Puts what ended in any step back into the order of rows; rows without tokens keep `old`."""

    def place(new: list[Tensor], before: Tensor) -> Tensor:
        """By row, from tensors [c, ..]; those of different numbers of slots are filled up."""
        if new[0].dim() == 4 and len({t.shape[2] for t in (*new, before)}) > 1:
            slots = max(t.shape[2] for t in (*new, before))
            new = [F.pad(t, (0, 0, 0, slots - t.shape[2])) for t in new]
            before = F.pad(before, (0, 0, 0, slots - before.shape[2]))
        rows = torch.cat(new)[plan.closed]
        if plan.empty is None:
            return rows
        return torch.where(plan.empty.view(-1, *[1] * (rows.dim() - 1)), before, rows)

    assert closed  # of pads alone one passes for a document
    memory = concatenate([c.memory for c in closed])
    anchor = None
    if memory.anchor is not None or (plan.empty is not None and old.memory.anchor is not None):
        olds = old.memory.anchor or old.memory.weights
        anchor = tuple(place([w], o) for w, o in zip(memory.anchor or memory.weights, olds))
    query = old.query
    if asked_tail is not None:
        query = place([c.query for c in closed if c.query is not None], old.query)
    return MacState(
        memory=MemoryState(
            tuple(place([w], o) for w, o in zip(memory.weights, old.memory.weights)),
            tuple(place([s], o) for s, o in zip(memory.momentum, old.memory.momentum)),
            anchor,
        ),
        asked_tail=asked_tail,
        tails=tuple(place([c.tails[i] for c in closed], t) for i, t in enumerate(old.tails)),
        frozen=tuple(place([c.frozen[i] for c in closed], w) for i, w in enumerate(old.frozen)),
        segment=tuple(place([c.segment[i] for c in closed], t) for i, t in enumerate(old.segment)),
        retrieved=tuple(
            place([c.retrieved[i] for c in closed], t) for i, t in enumerate(old.retrieved)
        ),
        query=query,
    )
