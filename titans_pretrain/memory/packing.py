"""Documents side by side: where each token of a packed batch goes before the memory runs over it.

Every document is cut into chunks of C tokens from its own first token. Documents are sorted by
their number of chunks, most first (stable), and chunks are laid out step by step: step j holds
chunk j of every document that has one. The documents alive at step j are thus a prefix of those
alive at step j - 1, and the states at step j a prefix slice (torch's PackedSequence has the same
layout). A row that goes on inside a chunk opens with the rest of that chunk.

Letters: N rows, H heads, T tokens, C chunk, M chunks in all, f features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.memory.onto import onto
from titans_pretrain.memory.sizes import runs
from titans_pretrain.memory.state import check_positions

Pairs = tuple[Tensor, Tensor]  # documents (by rank) and the rows they lie in, int64


@dataclass(frozen=True)
class PackingPlan:
    """The layout of one batch; it depends on the positions and the chunk alone.

    Layers that see the same positions share one plan.
    """

    shape: tuple[int, int]  # N, T
    chunk: int
    sizes: tuple[int, ...]  # documents alive at each step, non-increasing
    offsets: tuple[int, ...]  # the first chunk of each step, and M at the end
    row: Tensor  # [M * C] where a slot's token is read from; an unused slot repeats some token
    column: Tensor  # [M * C]
    used: Tensor | None  # [M, C] bool: the slot holds a token; None: all do
    last: Tensor | None  # [M] slot of a chunk's last token; None: C - 1 throughout
    chunk_of: Tensor  # [N, T] where a token lies; 0 at pads
    slot_of: Tensor  # [N, T]
    real: Tensor | None  # [N, T] bool: no pad; None: no pads
    resumed: Pairs | None  # documents that go on from the carried state
    inside: Pairs | None  # those of them that go on inside a chunk
    fresh: Tensor  # documents that start from the initial state
    ends: tuple[Pairs | None, ...]  # by step: documents that end their row there
    open_ends: tuple[Pairs | None, ...]  # those of them that end inside a chunk
    empty: Tensor | None  # rows without a token

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of steps; the state is kept at the start of each."""
        return runs(len(self.sizes))

    @property
    def ends_inside(self) -> bool:
        """Some row ends inside a chunk: the state needs an anchor."""
        return any(pair is not None for pair in self.open_ends)

    def pack(self, x: Tensor, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """[N, H, T, f] -> chunks first..end as [chunks, H, C, f]; unused slots are 0."""
        at = slice(first * self.chunk, end * self.chunk)
        x = x.transpose(1, 2)[self.row[at], self.column[at]].to(dtype)
        x = x.unflatten(0, (end - first, self.chunk)).transpose(1, 2).contiguous()
        if self.used is not None:
            x.masked_fill_(~self.used[first:end, None, :, None], 0)
        return x

    def unpack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[M, H, C, f] -> [N, H, T, f]; pads are 0. The adjoint of `pack`, and itself a gather."""
        if len(x) == 0:
            n, t = self.shape
            return x.new_zeros((n, x.shape[1], t, x.shape[3]), dtype=dtype)
        x = x.transpose(1, 2)[self.chunk_of, self.slot_of].to(dtype).transpose(1, 2)
        return x if self.real is None else x.masked_fill(~self.real[:, None, :, None], 0)


def plan_documents(
    positions: Tensor, chunk: int, device: torch.device | None = None, *, anchored: bool = True
) -> PackingPlan:
    """The plan of a batch.

    positions: [N, T] int64, the position in its document, -1 at pads; on the CPU for speed (a plan
    on a GPU waits for it). device: where the memory runs; default: where the positions are.
    anchored: the carried state holds an anchor (or there is none). Raises ValueError on positions
    that do not count up.
    """
    device = positions.device if device is None else device
    positions = positions.detach().cpu()
    n, t = positions.shape
    check_positions(positions, n, t, chunk, anchored)

    real = positions >= 0
    row, column = real.nonzero(as_tuple=True)
    p = positions[real]
    count = len(p)
    new_row = torch.ones(count, dtype=torch.bool)
    new_row[1:] = row[1:] != row[:-1]
    new_document = new_row | (p == 0)
    new_chunk = new_document | (p % chunk == 0)
    document, tile = new_document.cumsum(0) - 1, new_chunk.cumsum(0) - 1  # of each token
    first = new_chunk.nonzero()[:, 0]  # tokens that open a chunk, a document
    head = new_document.nonzero()[:, 0]
    slot = torch.arange(count) - first[tile]

    # Rank the documents and lay their chunks out by step.
    chunks = torch.bincount(document[first], minlength=len(head))
    order = torch.argsort(chunks, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    steps = int(chunks.max()) if len(chunks) else 0
    sizes = torch.bincount(chunks, minlength=1).flip(0).cumsum(0).flip(0)[1:].tolist()
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    step = torch.arange(len(first)) - tile[head][document[first]]
    place = torch.tensor(offsets)[step] + rank[document[first]]  # of each chunk

    chunk_of, slot_of = torch.zeros((2, n, t), dtype=torch.int64)
    chunk_of[row, column], slot_of[row, column] = place[tile], slot
    target = place[tile] * chunk + slot
    source = torch.zeros((2, offsets[-1] * chunk), dtype=torch.int64)
    source[:, target] = torch.stack([row, column])
    used = torch.zeros(offsets[-1] * chunk, dtype=torch.bool)
    used[target] = True
    used = used.view(-1, chunk)

    resumed = new_row[head] & (p[head] > 0)
    inside = resumed & (p[head] % chunk != 0)
    tail = torch.ones(len(head), dtype=torch.bool)  # the document is its row's last
    tail[:-1] = row[head][1:] != row[head][:-1]
    end = torch.cat([head[1:], torch.tensor([count])])[: len(head)] - 1  # a document's last token
    unfinished = tail & ((p[end] + 1) % chunk != 0)

    def pairs(chosen: Tensor) -> Pairs | None:
        if not bool(chosen.any()):
            return None
        return onto(rank[chosen], device), onto(row[head][chosen], device)

    lengths = set(chunks[tail].tolist())
    by_step = [chunks == j + 1 if j + 1 in lengths else None for j in range(steps)]
    full = bool(used.all())
    empty = (~real.any(1)).nonzero()[:, 0]
    return PackingPlan(
        shape=(n, t),
        chunk=chunk,
        sizes=tuple(sizes),
        offsets=tuple(offsets),
        row=onto(source[0], device),
        column=onto(source[1], device),
        used=None if full else onto(used, device),
        last=None if full else onto(used.sum(1) - 1, device),
        chunk_of=onto(chunk_of, device),
        slot_of=onto(slot_of, device),
        real=None if bool(real.all()) else onto(real, device),
        resumed=pairs(resumed),
        inside=pairs(inside),
        fresh=onto(rank[~resumed], device),
        ends=tuple(None if of is None else pairs(tail & of) for of in by_step),
        open_ends=tuple(None if of is None else pairs(unfinished & of) for of in by_step),
        empty=onto(empty, device) if len(empty) else None,
    )


@functools.lru_cache(maxsize=32)
def plan_rows(n: int, t: int, chunk: int, device: torch.device) -> PackingPlan:
    """The plan of `n` rows of one document of `t` tokens each."""
    return plan_documents(torch.arange(t).expand(n, t), chunk, device)
