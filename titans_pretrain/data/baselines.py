"""What counting alone achieves in validation: a unigram and an interpolated bigram.

A language model that has learned anything lies below both. The bigram mixes three estimates,

    p(next | token) = w_2 c(token, next) / c(token) + w_1 c(next) / N + w_0 / V,

with counts c of the train split (N in all, V pieces) and weights by expectation maximisation on
training documents left out of a first count (Jelinek and Mercer, 1980). The unigram is
(c(next) + 1) / (N + V). Both are judged on exactly the labels that the validation stream counts,
each given the token before it; pads never enter. Of several sources the counts are added up, of
several validation sets the labels are pooled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.config import DataConfig, SourceConfig
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.mix import mix_of
from titans_pretrain.data.order import validation_blocks
from titans_pretrain.data.shards import BlockReader
from titans_pretrain.data.sources import load_sources, validation_sets

HELD_IN = 20  # every 20th training document fits the weights
STEPS = 100  # of expectation maximisation
LIMIT = 20_000_000  # training labels counted, validation labels judged

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Baselines:
    """Nats per token on the validation labels."""

    unigram: float
    bigram: float
    weights: tuple[float, float, float]  # bigram, unigram, uniform
    labels: int


def baselines(folder: str | Path, limit: int = LIMIT) -> dict[str, float]:
    """{"unigram": loss, "bigram": loss}: nats a label of a folder's whole validation split.

    Reads about `limit` labels of each split at most. Raises DataError for a folder not whole.
    """
    found = fit_baselines(DataConfig(sources={"it": SourceConfig(path=str(folder))}), limit=limit)
    return {"unigram": found.unigram, "bigram": found.bigram}


def fit_baselines(
    data: DataConfig, *, align: int = 1, rows: int = 0, samples: int = 0, limit: int = LIMIT
) -> Baselines:
    """Both baselines on the validation rows that a run over `data` with this alignment reads
    (`rows` of each set, 0: all).

    Of the `limit` training labels each source gives its share in a run of `samples` samples (0:
    its share at the start).
    Raises DataError for a folder not whole.
    """
    sources = load_sources(data)
    vocab = next(iter(sources.values())).vocab_size
    shares = np.ones(1)
    if len(sources) > 1:
        mix = mix_of(data.sources, data.seed)
        shares = mix.counts(samples) / samples if samples else mix.shares(0)
    most_parts: Parts = []
    rest_parts: Parts = []
    for manifest, share in zip(sources.values(), shares.tolist()):
        for parts, more in zip((most_parts, rest_parts), _count(manifest, round(limit * share))):
            parts += more
    if not any(len(pairs) for pairs, _ in rest_parts):  # a text this short fits itself
        rest_parts = most_parts
    most, held_in = _merge(most_parts, vocab), _merge(rest_parts, vocab)
    weights = _fit(most.components(held_in.pairs // vocab, held_in.pairs % vocab), held_in)
    everything = _merge([(c.pairs, c.counts) for c in (most, held_in)], vocab)
    # The unigram, too, must give unseen tokens a share: add-one counts.
    unigram = (everything.after + 1) / (everything.total + vocab)

    nats, labels = np.zeros(2), 0
    for manifest in validation_sets(data, sources).values():
        judged = 0
        for before, after in _asked(manifest, data.sequence_length, align, rows):
            mixed = weights @ everything.components(before, after)
            nats -= np.log(unigram[after]).sum(), np.log(mixed).sum()
            judged += len(after)
            if judged >= limit:
                break
        labels += judged
    uni, bi = (nats / max(labels, 1)).tolist()
    w2, w1, w0 = weights.tolist()
    return Baselines(uni, bi, (w2, w1, w0), labels)


class _Counts:
    """How often each pair (token, next token) occurs; pairs are token * V + next, ascending."""

    def __init__(self, pairs: Ints, counts: Ints, vocab: int) -> None:
        self.pairs, self.counts, self.vocab = pairs, counts, vocab
        self.before = np.bincount(pairs // vocab, counts, vocab)
        self.after = np.bincount(pairs % vocab, counts, vocab)
        self.total = float(counts.sum())

    def components(self, before: Ints, after: Ints) -> Floats:
        """[3, n]: the bigram, unigram and uniform probability of each pair."""
        wanted = before * self.vocab + after
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        found = np.where(self.pairs[place] == wanted, self.counts[place], 0)
        seen = self.before[before]
        bigram = np.divide(found, seen, out=np.zeros(len(wanted)), where=seen > 0)
        uniform = np.full(len(wanted), 1 / self.vocab)
        return np.stack([bigram, self.after[after] / self.total, uniform])


def _fit(components: Floats, held_in: _Counts) -> Floats:
    """Weights [3] that make the held-in pairs most likely."""
    weights = np.full(3, 1 / 3)
    for _ in range(STEPS):
        share = weights[:, None] * components
        share /= share.sum(axis=0)
        weights = (share * held_in.counts).sum(axis=1) / held_in.total
    # Never exactly zero: a pair unknown to all counts keeps a probability.
    weights = np.maximum(weights, 1e-6)
    return weights / weights.sum()


Parts = list[tuple[Ints, Ints]]  # (pairs, counts)


def _count(manifest: Manifest, limit: int) -> tuple[Parts, Parts]:
    """Pairs inside the training documents: (of most, of every HELD_IN-th)."""
    vocab = manifest.vocab_size
    most: Parts = []
    rest: Parts = []
    documents = labels = 0
    reader = BlockReader(manifest, "train", 1, 1)
    few = reader.split.documents < HELD_IN
    for member in range(len(reader.split.members)):
        tokens, lengths = reader.member(member)
        number = np.repeat(np.arange(documents, documents + len(lengths)), lengths)
        inside = (number[1:] == number[:-1]) & (np.arange(labels, labels + len(tokens) - 1) < limit)
        # Of a handful of documents none can be spared: leave out stretches of text.
        part = np.arange(len(tokens) - 1) // 100 if few else number[1:]
        held = part % HELD_IN == HELD_IN - 1
        pairs = tokens[:-1] * vocab + tokens[1:]
        most.append(np.unique(pairs[inside & ~held], return_counts=True))
        rest.append(np.unique(pairs[inside & held], return_counts=True))
        documents, labels = documents + len(lengths), labels + len(tokens)
        if labels >= limit:
            break
    reader.close()
    return most, rest


def _merge(parts: Parts, vocab: int) -> _Counts:
    pairs, place = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([c for _, c in parts]), len(pairs))
    return _Counts(pairs, counts.astype(np.int64), vocab)


def _asked(manifest: Manifest, length: int, align: int, rows: int) -> Iterator[tuple[Ints, Ints]]:
    """(token before, label) of each label that the validation stream counts, row by row."""
    reader = BlockReader(manifest, "validation", length, align)
    for shard, block in zip(*validation_blocks(reader.blocks, rows, manifest.hash)):
        tokens, labels = np.zeros((2, length), np.int64)
        positions, mask = np.full(length, -1), np.zeros(length, bool)
        reader.read(int(shard), int(block), tokens, labels, positions, mask)
        yield tokens[mask], labels[mask]
    reader.close()
