"""What a model must beat: unigram and bigram losses on a prepared folder's validation split.

Counts come from the train split (its first `limit` labels), over the very labels that a model is
trained on. With c the counts, N their sum, V the vocabulary and b following a:

    P1(b)   = (c(b) + 1) / (N + V)
    P(b|a)  = (c(a, b) + m P1(b)) / (c(a) + m)          Dirichlet smoothing

m is the one of `STRENGTHS` that suits the validation split best, which favours the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.manifest import Manifest, load_manifest
from titans_pretrain.data.shards import BlockReader

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_ROW = 1 << 16  # tokens read at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def baselines(folder: str | Path, limit: int = 20_000_000) -> dict[str, float]:
    """{"unigram": loss, "bigram": loss}: nats a label of the validation split.

    Reads at most `limit` labels of each split. Raises DataError for a folder that is not whole.
    """
    manifest = load_manifest(folder)
    vocabulary = manifest.vocab_size
    before, label = _pairs(manifest, "train", limit)
    asked_before, asked = _pairs(manifest, "validation", limit)

    one = (np.bincount(label, minlength=vocabulary) + 1.0) / (len(label) + vocabulary)
    contexts = np.bincount(before, minlength=vocabulary)[asked_before].astype(np.float64)
    pairs = _occurrences(before * vocabulary + label, asked_before * vocabulary + asked)
    bigram = min(
        float(-np.log((pairs + m * one[asked]) / (contexts + m)).mean()) for m in STRENGTHS
    )
    return {"unigram": float(-np.log(one[asked]).mean()), "bigram": bigram}


def _occurrences(keys: Ints, asked: Ints) -> Floats:
    """How often each of `asked` occurs in `keys`."""
    known, counts = np.unique(keys, return_counts=True)
    place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return np.where(known[place] == asked, counts[place], 0).astype(np.float64)


def _pairs(manifest: Manifest, split: str, limit: int) -> tuple[Ints, Ints]:
    """Each counted label of the split, up to `limit`, and the token before it."""
    parts = list(_blocks(manifest, split, limit))
    before = np.concatenate([b for b, _ in parts])[:limit]
    return before, np.concatenate([a for _, a in parts])[:limit]


def _blocks(manifest: Manifest, split: str, limit: int) -> Iterator[tuple[Ints, Ints]]:
    reader = BlockReader(manifest, split, _ROW, 1)
    found = 0
    for shard, blocks in enumerate(reader.blocks.tolist()):
        for block in range(blocks):
            tokens, labels = np.zeros((2, _ROW), np.int64)
            positions, mask = np.full(_ROW, -1), np.zeros(_ROW, bool)
            reader.read(shard, block, tokens, labels, positions, mask)
            yield tokens[mask], labels[mask]
            found += int(mask.sum())
            if found >= limit:
                reader.close()
                return
    reader.close()
