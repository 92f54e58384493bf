"""First pass over the text: count, hash, find bad documents; then what to hold out, and the units.

Reading and hashing cost a few percent of what tokenizing costs, and buy: bad inputs reported
before hours of work, a held-out share that fits even a small corpus, and units of work that do
not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.content import BadDocument, InputFile, Part, Reading
from titans_pretrain.data.files import write_atomically
from titans_pretrain.data.inputs import documents
from titans_pretrain.errors import DataError

BAD_SHARE = 0.01  # of the documents; more stops the preparation
UNIT = (1 << 20, 1 << 28)  # bytes of text in a unit of work: least and most
UNITS = 16  # wanted at least, where units need not become smaller than the least

Hashes = NDArray[np.uint64]


class Hashed:
    """Passes a document's parts on and sums them up; an integer counts as four bytes."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = parts
        self._digest = hashlib.blake2b(digest_size=8)
        self.size = 0  # bytes

    def __iter__(self) -> Iterator[Part]:
        for part in self._parts:
            data = _as_bytes(part)
            self._digest.update(data)
            self.size += len(data)
            yield part

    @property
    def hash(self) -> int:
        return int.from_bytes(self._digest.digest(), "little")


def _as_bytes(part: Part) -> bytes:
    if isinstance(part, np.ndarray):
        return part.astype("<u4").tobytes()
    return part.encode() if isinstance(part, str) else part


@dataclass(frozen=True)
class Scan:
    """What one file holds; arrays over its good documents."""

    hashes: Hashes
    sizes: NDArray[np.uint64]  # bytes of text
    offsets: NDArray[np.uint64]  # places in the file (Document.offset)
    bad: list[tuple[str, str]]  # (where, why)


def scan_file(file: InputFile, reading: Reading, on_bad: str, read: Callable[[int], None]) -> Scan:
    """Reads a file through. Raises DataError at the first bad document if on_bad is "stop"."""
    hashes, sizes, offsets = array("Q"), array("Q"), array("Q")
    bad: list[tuple[str, str]] = []
    for document in documents(file, reading):
        parts = Hashed(document.parts())
        why = document.bad
        if why is None:
            try:
                for _ in parts:
                    pass
            except BadDocument as e:
                why = str(e)
        if why is not None:
            if on_bad == "stop":
                raise DataError(
                    f"document {document.where}: {why}",
                    "with --on-bad stop every document must be usable",
                    "mend or remove it, or use --on-bad skip",
                )
            bad.append((document.where, why))
            continue
        hashes.append(parts.hash)
        sizes.append(parts.size)
        offsets.append(document.offset)
        read(parts.size)
    columns = [np.frombuffer(column, np.uint64) for column in (hashes, sizes, offsets)]
    return Scan(columns[0], columns[1], columns[2], bad)


def save_scan(path: Path, scan: Scan) -> None:
    buffer = io.BytesIO()
    bad = np.frombuffer(json.dumps(scan.bad).encode(), np.uint8)
    np.savez(buffer, hashes=scan.hashes, sizes=scan.sizes, offsets=scan.offsets, bad=bad)
    write_atomically(path, buffer.getvalue())


def load_scan(path: Path) -> Scan:
    with np.load(path) as told:
        bad = [(where, why) for where, why in json.loads(told["bad"].tobytes())]
        return Scan(told["hashes"], told["sizes"], told["offsets"], bad)


def refuse_bad(good: int, bad: list[tuple[str, str]]) -> None:
    """Raises DataError for an empty corpus and for more than BAD_SHARE bad documents."""
    listed = "".join(f"\n    {where}: {why}" for where, why in bad[:5])
    more = f"\n    and {len(bad) - 5} more" if len(bad) > 5 else ""
    if good == 0:
        raise DataError(
            f"no usable document ({len(bad)} skipped){listed}{more}",
            "a corpus holds text",
            "check the inputs and --text-key",
        )
    if len(bad) > BAD_SHARE * (good + len(bad)):
        raise DataError(
            f"{len(bad)} of {good + len(bad)} documents cannot be used{listed}{more}",
            f"at most {BAD_SHARE:.0%} of the documents may be skipped",
            "mend or remove them, or check --text-key",
        )


@dataclass(frozen=True)
class HeldOut:
    """The documents of validation: those whose hash is at most `threshold`, but for `spared`."""

    threshold: int
    spared: frozenset[int]

    def __contains__(self, document_hash: int) -> bool:
        return document_hash <= self.threshold and document_hash not in self.spared


def choose_validation(hashes: Hashes, sizes: NDArray[np.uint64], share: float) -> HeldOut:
    """Holds out about `share` of the text: the documents of lowest hash.

    Equal documents stay together. Where single documents are so large that the plain cut would
    miss `share` by more than a third below or two thirds above, documents that overshoot are
    spared. At least one document is held out and one is kept. Raises DataError for fewer than two
    different documents.
    """
    unique, inverse = np.unique(hashes, return_inverse=True)
    size = np.bincount(inverse, weights=sizes.astype(np.float64))
    if len(unique) < 2:
        raise DataError(
            f"{len(hashes)} document(s), {len(unique)} different",
            "at least one document is held out for validation and one kept for training",
            "give more documents: cut the text into chapters, articles, ... (one a JSON line)",
        )
    total = float(size.sum())
    held = np.cumsum(size)
    count = max(1, int(np.argmin(np.abs(held - share * total))) + 1)
    low, high = 2 / 3 * share * total, 5 / 3 * share * total
    if count < len(unique) and low <= held[count - 1] <= high:
        return HeldOut(int(unique[count - 1]), frozenset())
    taken, sum_taken = [], 0.0
    for i in range(len(unique)):
        if sum_taken >= share * total:
            break
        if sum_taken + size[i] <= high:
            taken.append(i)
            sum_taken += float(size[i])
    if not taken:
        taken = [int(np.argmin(size))]
    taken = taken[: len(unique) - 1]
    last = taken[-1]
    spared = set(range(last)) - set(taken)
    return HeldOut(int(unique[last]), frozenset(int(unique[i]) for i in spared))


@dataclass(frozen=True)
class Piece:
    """The documents of file number `file` with offsets in [start, stop)."""

    file: int
    start: int
    stop: int | None  # None: to the end


Unit = list[Piece]


def cut_units(scans: Iterable[Scan], unit_bytes: int) -> list[Unit]:
    """Units of work of about `unit_bytes` of text, in the order of the files."""
    units: list[Unit] = [[]]
    room = unit_bytes
    for number, scan in enumerate(scans):
        ends = np.cumsum(scan.sizes.astype(np.int64))
        first = start = 0  # document, and its place, that the unit under way takes from this file
        while first < len(ends):
            if room <= 0:
                units.append([])
                room = unit_bytes
            begun = int(ends[first - 1]) if first else 0
            # The document that fills the unit still belongs to it.
            stop = int(np.searchsorted(ends, begun + room)) + 1
            last = stop >= len(ends)
            end = None if last else int(scan.offsets[stop])
            units[-1].append(Piece(number, start, end))
            room -= int(ends[min(stop, len(ends)) - 1]) - begun
            first, start = stop, end or 0
    return units


def unit_size(total_bytes: int) -> int:
    """Bytes of text in a unit of work, for a corpus of so many."""
    return min(max(total_bytes // UNITS, UNIT[0]), UNIT[1])
