"""What a memory did in a step, in parts that can be put together: by heads, and by tokens.

Whoever divides a model's heads or its rows' tokens observes the parts and joins them here; what
comes out is what one process that has all of it would report.

Shape letters: N rows of a call, H heads, T tokens, L memory layers, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from titans_pretrain.memory.diagnostics import stability_radius

GATES = ("theta", "alpha", "eta")
SURPRISES = ("surprise", "surprise_untrained")
QUANTILES = (0.1, 0.5, 0.9)
MOST = 1 << 14  # values of a gate that quantiles are taken of; of more, a half, a quarter, ..


@dataclass(frozen=True)
class Rows:
    """Where the rows of a call lie among the rows of a forward.

    A span is what is written for one row of a call; where tokens are divided, the end of one part's
    span and the beginning of the next part's may be one.
    """

    row: Tensor  # [N] of the forward
    begun: Tensor  # [N] bool: if an earlier part has tokens of the row, the span began there
    last: Tensor  # [N] bool: the span is its row's last of this part
    first: bool = True  # the forward's first call
    pads: bool = False  # there is no token: a pad stands in for one

    @staticmethod
    def whole(rows: int, device: torch.device) -> Rows:
        """Of a call that writes all tokens of each row: the row is one span."""
        yes = torch.ones(rows, dtype=torch.bool, device=device)
        return Rows(torch.arange(rows, device=device), yes, yes)


@dataclass(frozen=True)
class Spans:
    """Spans in the order of their calls."""

    place: Tensor  # [S] int64: equal for spans of the same row of the same forward
    begun: Tensor  # [S] bool, as in Rows
    last: Tensor  # [S] bool
    tokens: Tensor  # [S]
    gates: Tensor  # [S, 3, H, L]: sums over tokens
    drift: Tensor  # [S, H] |W - W_init| / |W_init| after the last token
    momentum: Tensor  # [S, H] |S| after the last token

    def pick(self, index: Tensor) -> Spans:
        """Those that an index or a mask names."""
        return Spans(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def join(parts: Sequence[Spans]) -> Spans:
        """One after another."""
        return Spans(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Spans)))

    def whole(self) -> Spans:
        """Parts of one span made one: their tokens together, with the state that the last left."""
        if not len(self.place):
            return self
        found = self.pick(self.place.argsort(stable=True))
        new = ~found.begun
        new[:1] = True
        new[1:] |= found.place[1:] != found.place[:-1]
        of = new.cumsum(0) - 1
        end = torch.cat([new[1:].nonzero()[:, 0], torch.tensor([len(new) - 1])])
        ends = found.pick(end)
        tokens = torch.zeros_like(ends.tokens).index_add_(0, of, found.tokens)
        gates = torch.zeros_like(ends.gates).index_add_(0, of, found.gates)
        return Spans(ends.place, ends.begun, ends.last, tokens, gates, ends.drift, ends.momentum)


@dataclass(frozen=True)
class Ends:
    """What spans come to."""

    spans: int
    drift: Tensor  # [H] sum over spans
    momentum: Tensor  # [H] sum over spans
    radius: Tensor  # [H] largest, over spans and memory layers

    @staticmethod
    def of(spans: Spans, chunk: int) -> Ends:
        """Of whole spans; of none, zeros."""
        theta, alpha, eta = (spans.gates / spans.tokens[:, None, None, None]).unbind(1)  # [S, H, L]
        radius = theta.new_zeros(theta.shape[1])
        if len(spans.place):
            radius = stability_radius(theta, alpha, eta, chunk=chunk).amax((0, 2))
        drift, momentum = (x.sum(0, dtype=torch.float64) for x in (spans.drift, spans.momentum))
        return Ends(len(spans.place), drift, momentum, radius)

    def __add__(self, other: Ends) -> Ends:
        return Ends(
            self.spans + other.spans,
            self.drift + other.drift,
            self.momentum + other.momentum,
            torch.maximum(self.radius, other.radius),
        )


@dataclass(frozen=True)
class Tally:
    """Some heads of a memory over some tokens of a step; small, on the CPU."""

    tokens: int  # real ones
    layers: int  # L
    chunk: int
    sums: dict[str, Tensor]  # figure -> [H] float64, over tokens and (gates) memory layers
    gates: Tensor  # [3, values, H]: those of tokens x layers that `_kept` keeps
    halvings: int  # how often they were halved
    ends: Ends  # of spans that are whole
    open: Spans  # that may have begun, or may go on, in another part

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        spans = [getattr(self.open, f.name) for f in fields(self.open)]
        ends = [self.ends.drift, self.ends.momentum, self.ends.radius]
        return sum(t.nbytes for t in (self.gates, *self.sums.values(), *spans, *ends))

    @staticmethod
    def of(gates: Tensor, surprises: Tensor, spans: Spans, chunk: int, *, cut: bool) -> Tally:
        """gates [3, tokens, H, L]; surprises [2, tokens, H]; cut: the rows are parts of rows."""
        values = gates.movedim(3, 1).flatten(1, 2)  # [3, L * tokens, H]
        halvings = _halvings(values[0].numel())
        kept = values[:, _kept(values.shape[1], halvings).to(values.device)].cpu()
        sums = [*values.sum(1, dtype=torch.float64), *surprises.sum(1, dtype=torch.float64)]
        spans = Spans(*(getattr(spans, f.name).cpu() for f in fields(spans)))
        open_ = spans.begun | spans.last if cut else torch.zeros_like(spans.last)
        return Tally(
            tokens=gates.shape[1],
            layers=gates.shape[3],
            chunk=chunk,
            sums={n: s.cpu() for n, s in zip((*GATES, *SURPRISES), sums, strict=True)},
            gates=kept,
            halvings=halvings,
            ends=Ends.of(spans.pick(~open_), chunk),
            open=spans.pick(open_),
        )

    def thinned(self, halvings: int) -> Tensor:
        """[3, values, H]: the gates as if they had been halved so often."""
        kept = _kept(self.tokens * self.layers, self.halvings)
        return self.gates[:, _stays(kept, halvings)]


# By head: one part for each stretch of tokens, in order.
Parts = Sequence[Sequence[Tally]]
Figures = dict[str, float]
ByHead = dict[str, list[float]]


def figures(parts: Parts) -> tuple[Figures, ByHead]:
    """The figures of a memory (memory/observe.py) over all heads, and by head.

    parts: for each group of heads, in order, its tallies of the tokens that each part had, in
    order. A mean is over all parts' tokens; a span that several parts share counts once, with the
    gates of all its tokens and the state that its last token left. Quantiles are exact up to `MOST`
    values and otherwise of a sample, the same one however heads are divided.
    """
    tokens, layers = sum(t.tokens for t in parts[0]), parts[0][0].layers
    heads: dict[str, Tensor] = {}
    for name in GATES:
        heads[name] = _beside(parts, name) / (tokens * layers)
    ends = [_ends(by_tokens) for by_tokens in parts]
    heads["radius"] = torch.cat([e.radius for e in ends])
    for name in SURPRISES:
        heads[name] = _beside(parts, name) / tokens
    heads["drift"] = torch.cat([e.drift for e in ends]) / ends[0].spans
    heads["momentum"] = torch.cat([e.momentum for e in ends]) / ends[0].spans
    heads["gain"] = 1 - heads["surprise"] / heads["surprise_untrained"].clamp(min=1e-30)

    all_heads = len(heads["gain"])
    halvings = _halvings(tokens * layers * all_heads)
    gates = torch.cat(
        [torch.cat([t.thinned(halvings) for t in by_tokens], 1) for by_tokens in parts], 2
    )
    out: Figures = {}
    for i, name in enumerate(GATES):
        out[f"{name}/mean"] = heads[name].mean().item()
        at = torch.tensor(QUANTILES, dtype=gates.dtype)
        for q, value in zip(QUANTILES, gates[i].flatten().quantile(at).tolist(), strict=True):
            out[f"{name}/p{q * 100:.0f}"] = value
    out["radius"] = heads["radius"].max().item()
    for name in (*SURPRISES, "drift", "momentum"):
        out[name] = heads[name].mean().item()
    out["gain"] = 1 - out["surprise"] / max(out["surprise_untrained"], 1e-30)
    return out, {name: x.tolist() for name, x in heads.items()}


def _beside(parts: Parts, name: str) -> Tensor:
    """[H] of all groups: sums over all tokens."""
    return torch.cat([torch.stack([t.sums[name] for t in ts]).sum(0) for ts in parts])


def _ends(by_tokens: Sequence[Tally]) -> Ends:
    spans = Spans.join([t.open for t in by_tokens]).whole()
    return sum((t.ends for t in by_tokens), Ends.of(spans, by_tokens[0].chunk))


def _halvings(values: int) -> int:
    """How often so many values are halved to be `MOST` at most."""
    return max(0, (values - 1) // MOST).bit_length()


def _stays(index: Tensor, halvings: int) -> Tensor:
    """Which of these numbers stay. Spread evenly, and not in step with rows or chunks: multiples of
    the golden ratio, modulo 1, below 2^-halvings."""
    return (index * 2654435769) % (1 << 32) < (1 << (32 - halvings))


def _kept(values: int, halvings: int) -> Tensor:
    """Of 0 .. values - 1 those that stay."""
    index = torch.arange(values)
    return index[_stays(index, halvings)]
