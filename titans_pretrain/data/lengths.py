"""How long documents are, and how they begin: from the lengths that lie beside the tokens.

The manifest's table tells counts and pads exactly, and at no cost; lengths of single documents are
in the shards' `.len` members. Of very many members, evenly spaced ones are read, and it is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.manifest import Manifest, Split
from titans_pretrain.data.shards import BlockReader

MEMBERS = 256  # looked into, at most
SHARDS = 32  # opened, at most: those of a remote folder are fetched whole
BEGINNING = 64  # tokens shown of a document
BAR = 13  # characters of the longest bar
WIDTH = 100  # columns

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Tokens (bos and eos included) of the documents in some members of a split."""

    members: Ints
    documents: Ints  # [n] lengths
    whole: bool  # all members were read


def spaced(count: int, wanted: int) -> Ints:
    """`wanted` numbers below `count`, evenly spaced; all where there are fewer."""
    wanted = min(count, wanted)
    return (2 * np.arange(wanted, dtype=np.int64) + 1) * count // max(2 * wanted, 1)


def some_members(split: Split, shards: int, members: int) -> Ints:
    """At most so many members of the split, from at most so many shards, evenly spaced."""
    found = [
        np.arange(*split.first_member[shard : shard + 2])
        for shard in spaced(len(split.shards), shards).tolist()
    ]
    candidates = np.concatenate([np.zeros(0, np.int64), *found])
    return candidates[spaced(len(candidates), members)]


def read_lengths(reader: BlockReader, shards: int = SHARDS, members: int = MEMBERS) -> Lengths:
    """Lengths of the documents of some or all members. Raises DataError."""
    chosen = some_members(reader.split, shards, members)
    lengths = [reader.lengths(member) for member in chosen.tolist()]
    whole = len(chosen) == len(reader.split.members)
    return Lengths(chosen, np.concatenate([np.zeros(0, np.int64), *lengths]), whole)


def histogram(lengths: Ints) -> list[tuple[int, int, int]]:
    """(k, documents, tokens) of the documents of 2^k to 2^(k+1) - 1 tokens; no gaps."""
    if not len(lengths):
        return []
    place = np.log2(lengths).astype(np.int64)  # exact: lengths are below 2^32
    first = int(place.min())
    documents = np.bincount(place - first)
    tokens = np.bincount(place - first, lengths).astype(np.int64)
    return [(first + i, int(d), int(t)) for i, (d, t) in enumerate(zip(documents, tokens))]


def describe_lengths(name: str, found: Lengths, members: int) -> Iterator[str]:
    """The histogram in words and bars."""
    from_ = "" if found.whole else f", of {len(found.members):,} of {members:,} members"
    yield f"  lengths of {name} documents, in tokens{from_}"
    rows = histogram(found.documents)
    if not rows:
        return
    documents, tokens = (np.asarray(column) for column in list(zip(*rows))[1:])
    yield f"  {'length':>21} {'documents':>13} {'':>7} {'':<{BAR}} {'tokens':>17}"
    for (k, d, t), a, b in zip(rows, _bars(documents), _bars(tokens)):
        line = (
            f"  {1 << k:>10,}-{(2 << k) - 1:<10,} {d:>13,} {d / documents.sum():>7.2%} {a:<{BAR}} "
            f"{t:>17,} {t / tokens.sum():>7.2%} {b}"
        )
        yield line.rstrip()


def _bars(values: Ints) -> list[str]:
    """A bar each, the longest of BAR characters; at least one where there is anything."""
    return ["#" * -(-BAR * int(v) // int(values.max())) for v in values]


def beginnings(
    manifest: Manifest, reader: BlockReader, found: Lengths, samples: int
) -> Iterator[str]:
    """How `samples` documents begin, decoded; from the members in `found`."""
    tokenizer = manifest.tokenizer()
    before = np.concatenate([[0], np.cumsum(reader.split.members["documents"], dtype=np.int64)])
    wanted = min(samples, len(found.documents))
    # Some members, then some documents in each, until there are enough of them.
    members = found.members[spaced(len(found.members), wanted)]
    for i, member in enumerate(members.tolist()):
        lengths = reader.lengths(member)
        starts = np.cumsum(lengths) - lengths
        share = wanted // len(members) + (i < wanted % len(members))
        for document in spaced(len(lengths), share).tolist():
            begin, length = int(starts[document]), int(lengths[document])
            ids = reader.ids(member, begin, begin + min(length, BEGINNING))
            head = f"  document {before[member] + document:,} ({length:,} tokens): "
            yield head + _clipped(repr(tokenizer.decode(ids)), WIDTH - len(head))


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
