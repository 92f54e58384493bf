"""What attention may see, worked out once a forward from the tokens' positions.

positions [B, T] holds each token's position in its document and -1 at pads. A row whose first
position is above 0 continues the document that the carried state belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_pretrain.memory.layer import ConvPlan
from titans_pretrain.memory.onto import onto
from titans_pretrain.memory.packing import PackingPlan, plan_documents
from titans_pretrain.model.blocks import Rotation, rotation


@dataclass(frozen=True)
class AttentionPlan:
    """Masked attention over whole rows. S = carried keys + T; before them P of a prefix."""

    rotation: Rotation
    # [B or 1, 1, T, P + S], `unseen`; None: plain causal attention says the same
    mask: Tensor | None
    positions: Tensor  # [B, S - keep] on the CPU: of the keys to carry on
    keep: int  # the first key to carry on
    before: int  # keys before the rows' first token: S - T
    reach: int  # the first key that a token after the rows could see, whatever the documents


def attention_plan(
    positions: Tensor,
    past: Tensor | None,
    *,
    window: int | None,
    head_width: int,
    rope_base: float,
    dtype: torch.dtype,
    device: torch.device,
    prefix: int = 0,
) -> AttentionPlan:
    """A query sees the keys of its document at distance 0 .. window - 1, and all of the prefix.

    positions [B, T]; past [B, P]: positions of the carried keys, or None.
    """
    positions = positions.cpu()  # branches below would wait for a device
    T = positions.shape[1]
    everything = positions if past is None else torch.cat((past.cpu(), positions), dim=1)
    S = everything.shape[1]
    real, start = everything >= 0, everything == 0
    keep = _first_to_keep(everything, window)
    mask = None
    one_document = not start[:, 1:].any() and not (real[:, 1:] & ~real[:, :-1]).any()
    # Pads at a row's end need no mask: no real token comes after them.
    if S != T or not one_document or (window is not None and window < T):
        document, known, at = (onto(x, device) for x in (start.cumsum(1), real, everything))
        column = torch.arange(S, device=device)
        query = column[S - T :, None]
        mask = (document[:, S - T :, None] == document[:, None, :]) & known[:, None, :]
        mask &= column <= query
        if window is not None:
            mask &= at[:, S - T :, None] - at[:, None, :] < window
        mask |= column == query  # a pad sees itself: a softmax over nothing is NaN
        mask = mask[:, None]
    elif prefix:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril()
    if mask is not None:
        mask = unseen(F.pad(mask, (prefix, 0), value=True), dtype)
    return AttentionPlan(
        rotation=rotation(onto(positions, device), head_width, rope_base, dtype),
        mask=mask,
        positions=everything[:, keep:],
        keep=keep,
        before=S - T,
        reach=0 if window is None else max(0, S - (window - 1)),
    )


def unseen(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a query does not see a key, 0 where it does: what attention adds to the scores.

    Formed once for all blocks: from booleans each block would form, and keep, its own.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _first_to_keep(positions: Tensor, window: int | None) -> int:
    """The first of columns [B, S] that a token after them could see: in any row's open document."""
    S = positions.shape[1]
    column = torch.arange(S).expand_as(positions)
    real = positions >= 0
    begin = column.where(positions == 0, 0).amax(1, keepdim=True)  # of the last document
    near = real & (column >= begin)
    if window is not None:
        last = positions.gather(1, column.where(real, 0).amax(1, keepdim=True))
        near &= positions >= last - (window - 2)
    return int(column.where(near, S).amin())


@dataclass(frozen=True)
class SegmentStep:
    """One segment of each of the n documents that have so many, side by side in slots [n, w].

    Slot j of the step stands for the segment's token `begin + j`.
    """

    documents: int  # n; they are the first n of the plan's documents
    begin: int
    end: int  # w = end - begin
    retrieved: tuple[int, int]  # memory tokens of the segment: formed in this step, from .. to
    positions: Tensor  # [n, w] in the document, -1 at pads; on the CPU
    conv: ConvPlan
    memory: PackingPlan
    # [1, 1, w, persistent + retrieved[1] + end], `unseen`: persistent | retrieved | segment
    mask: Tensor
    closing: Tensor  # [c] which of the n documents end here and are their row's last
    last: Tensor  # [c] the slot of their last token


@dataclass(frozen=True)
class SegmentPlan:
    """Documents cut into segments of G tokens, each counted from its document's start.

    Documents are sorted by their number of segments, so that the documents of a step are a prefix
    of those of the step before. Slots of all steps lie one after another, [M] in all.
    """

    rows: ConvPlan  # for the tokens as they lie in rows
    rotation: Rotation  # of each token by its position in the segment, [B, 1, T, d/2]
    retrieved_rotation: Rotation  # of each memory token, [1, 1, R, d/2]
    slots: Tensor  # [M] the token (row * T + column) in each slot, -1 at pads
    tokens: Tensor  # [B * T] the slot of each token, -1 at pads
    steps: tuple[SegmentStep, ...]
    document_rows: Tensor  # [n of the first step] the row of each document
    fresh: Tensor  # [n, 1, 1, 1] the document starts in this call
    skipped: Tensor  # [n, 1, 1, 1] tokens of the document's first segment that came before
    closed: Tensor  # [B] where each row's last document stands among all steps' `closing`
    empty: Tensor | None  # [B] rows without a token; None: there is none


def segment_plan(
    positions: Tensor,
    *,
    segment: int,
    chunk: int,
    persistent: int,
    pool: int | None,
    learned: int,
    carried: bool,
    head_width: int,
    rope_base: float,
    dtype: torch.dtype,
    device: torch.device,
) -> SegmentPlan:
    """positions [B, T]; pool: queries averaged into one memory token, or None: `learned` of them.

    Raises ValueError where a row continues a document and there is no state (`carried`).
    """
    positions = positions.cpu()
    B, T = positions.shape
    rows, empty = positions, ~(positions >= 0).any(1)
    if empty.all():  # one pad passes for a document: every parameter has a gradient, of zeros
        positions = positions.clone()
        positions[0, 0] = 0
    real = positions >= 0
    first = real & (real.cumsum(1) == 1)
    row, column = (first | (positions == 0)).nonzero(as_tuple=True)
    at = positions[row, column]
    if not carried and (at > 0).any():
        raise ValueError(
            f"a row's first position is {int(at.max())} and no state is given; only the state "
            "of the tokens before can continue a document; pass it, or start at position 0"
        )
    rank = real.flatten().cumsum(0)  # documents are whole runs of real tokens
    begin = rank[row * T + column] - 1
    length = torch.cat((begin[1:], rank[-1:])) - begin
    skipped = at % segment
    count = (skipped + length + segment - 1) // segment
    final = torch.ones_like(row, dtype=torch.bool)  # the document is its row's last
    final[:-1] = row[1:] != row[:-1]
    order = torch.argsort(count, descending=True, stable=True)
    row, column, at, length, skipped, count, final = (
        x[order] for x in (row, column, at, length, skipped, count, final)
    )

    steps, slots, closing = [], [], []
    for s in range(int(count.max()) if len(count) else 0):
        n = int((count > s).sum())
        end = min(segment, int((skipped + length)[:n].max()) - s * segment)
        start = int(skipped.min()) if s == 0 else 0
        if pool is not None:
            start, end = start // pool * pool, -(-end // pool) * pool
        slot = torch.arange(start, end)
        offset = s * segment + slot - skipped[:n, None]  # [n, w] from the document's first token
        inside = (offset >= 0) & (offset < length[:n, None])
        here = ((at - skipped)[:n, None] + s * segment + slot).where(inside, -1)
        slots.append((row * T + column)[:n, None].add(offset).where(inside, -1).flatten())
        ends = ((count[:n] == s + 1) & final[:n]).nonzero().flatten()
        closing.append(ends)
        if pool is None:
            formed, sees = (0, learned), torch.full((learned,), -1)
        else:
            formed = (start // pool, end // pool)
            sees = torch.arange(pool - 1, end, pool)  # the last query pooled into it
        sees = torch.cat((torch.full((persistent,), -1), sees, torch.arange(end)))
        steps.append(
            SegmentStep(
                documents=n,
                begin=start,
                end=end,
                retrieved=formed,
                positions=here,
                conv=ConvPlan.of(here, device),
                memory=plan_documents(here, chunk, device),
                mask=unseen(onto((sees <= slot[:, None])[None, None], device), dtype),
                closing=onto(ends, device),
                last=onto(here[ends].argmax(1), device),
            )
        )
    all_slots = torch.cat(slots) if slots else torch.zeros(0, dtype=torch.long)
    tokens = torch.full((B * T,), -1)
    filled = all_slots >= 0
    tokens[all_slots[filled]] = filled.nonzero().flatten()
    all_closing = torch.cat(closing) if closing else torch.zeros(0, dtype=torch.long)
    closed = torch.zeros(B, dtype=torch.long)
    closed[row[all_closing]] = torch.arange(len(all_closing))
    if pool is None:
        last_query = torch.zeros(1, learned, dtype=torch.long)
    else:
        last_query = torch.arange(pool - 1, segment, pool)[None]
    in_segment = positions.clamp(min=0) % segment
    return SegmentPlan(
        rows=ConvPlan.of(rows, device),
        rotation=rotation(onto(in_segment, device), head_width, rope_base, dtype),
        retrieved_rotation=rotation(onto(last_query, device), head_width, rope_base, dtype),
        slots=onto(all_slots, device),
        tokens=onto(tokens, device),
        steps=tuple(steps),
        document_rows=onto(row, device),
        fresh=onto((at == 0)[:, None, None, None], device),
        skipped=onto(skipped[:, None, None, None], device),
        closed=onto(closed, device),
        empty=onto(empty, device) if empty.any() else None,
    )


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        dx = dy.index_select(0, inverse.clamp(min=0))
        absent = (inverse < 0).view(-1, *[1] * (dx.dim() - 1))
        return dx.masked_fill(absent, 0), None, None


def move(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x[index] along the first axis, where index holds each entry once at most, and -1 where what
    comes does not matter (no gradient flows back from there). `inverse` is the way back."""
    return _Move.apply(x, index, inverse)
