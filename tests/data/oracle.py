"""Rows by plain loops over lists, from documents read by stock WebDataset."""

import itertools
import json
import random

import numpy as np
import webdataset

from titans_pretrain.config import DataConfig
from titans_pretrain.data.stream import batch_hash

WORDS = [
    "the",
    "whale",
    "and",
    "a",
    "sea",
    "of",
    "ships",
    "went",
    "to",
    "old",
    "houses",
    "by",
    "night",
]


def write_corpus(path, documents, seed=0, longest=400):
    """A JSONL file of random documents; returns their texts."""
    draw = random.Random(seed)
    texts = []
    for n in range(documents):
        words = draw.choices(WORDS, k=draw.randint(1, longest))
        texts.append(f"{n} " + " ".join(words) + draw.choice([".", "!\n\nThen.", "\n"]))
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


def documents_of(folder, shard_file, dtype="<u2"):
    """Token lists of a shard's documents, through stock WebDataset."""
    found = []
    for sample in webdataset.WebDataset(str(folder / shard_file), shardshuffle=False):
        ids = np.frombuffer(sample["tok"], dtype).tolist()
        lengths = np.frombuffer(sample["len"], "<u4").tolist()
        assert sum(lengths) == len(ids)
        for length in lengths:
            found.append(ids[:length])
            ids = ids[length:]
    return found


def rows_of(documents, length, align, pad):
    """All rows of a shard: lists of (tokens, labels, positions, mask), token by token."""
    places = []  # (document, index in it) or None for a pad
    for d, ids in enumerate(documents):
        places += [(d, i) for i in range(len(ids))]
        places += [None] * (-len(ids) % align)
    places += [None] * (-len(places) % length)
    rows = []
    for begin in range(0, len(places), length):
        row = []
        first = {}
        for place in places[begin : begin + length]:
            if place is None:
                row.append((pad, None, -1, False))
                continue
            d, i = place
            first.setdefault(d, i)
            has_next = i + 1 < len(documents[d])
            label = documents[d][i + 1] if has_next else None
            row.append((documents[d][i], label, i - first[d], has_next))
        rows.append(row)
    return rows


def assert_row(row, tokens, labels, positions, mask):
    assert tokens.tolist() == [r[0] for r in row]
    assert positions.tolist() == [r[2] for r in row]
    assert mask.tolist() == [r[3] for r in row]
    kept = [(label, r[1]) for label, r in zip(labels.tolist(), row) if r[3]]
    assert all(a == b for a, b in kept)


def data_config(folder, **more):
    more.setdefault("sequence_length", 64)
    more.setdefault("workers", 0)
    return DataConfig.model_validate({"sources": {"corpus": {"path": str(folder)}}, **more})


def read_together(ranks, state, steps):
    """(the global batch's hash, the state that all ranks agree on) of each step."""
    found = []
    for together in itertools.islice(zip(*(rank.batches(state) for rank in ranks)), steps):
        states = [after for _, after in together]
        assert all(s == states[0] for s in states)
        found.append((batch_hash(b for batches, _ in together for b in batches), states[0]))
    return found
