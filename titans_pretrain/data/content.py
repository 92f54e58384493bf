"""What every reader of inputs shares: a file, how to read it, and what a value must be to become
a document: text, bytes or integers, whichever the tokenizer takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Part = str | bytes | NDArray[np.integer]

KEYS = {"text": "text", "bytes": "text", "integers": "input_ids"}  # content -> usual key


@dataclass(frozen=True)
class InputFile:
    path: str
    name: str  # as messages and the manifest call it: relative to the input given
    kind: str  # a suffix: ".txt", ".jsonl", ...; "" for raw bytes
    compression: str  # "", ".gz", ".xz" or ".zst"

    @property
    def sequential(self) -> bool:
        """Whether reading from the middle costs reading all that lies before it."""
        return bool(self.compression) or self.kind == ".tar"


@dataclass(frozen=True)
class Reading:
    """How inputs become documents."""

    key: str = "text"  # of JSON objects; a parquet file's column
    content: str = "text"  # what the tokenizer takes: "text", "bytes" or "integers"
    ids: int = 0  # integers are below this
    document_length: int | None = None  # long sequences are cut into documents of so many units
    separator: int | None = None  # the id between the documents of a .bin file


@dataclass(frozen=True)
class Document:
    """One document, or what kept it from being one (`bad`)."""

    where: str  # file, and line, row, sample or byte
    offset: int  # its place in the file, ascending: a byte, row, ..., as the kind of file has it
    parts: Callable[[], Iterator[Part]]  # its content; raises BadDocument
    bad: str | None = None

    def texts(self) -> Iterator[str]:
        """The parts of a document that was read as text."""
        return (part for part in self.parts() if isinstance(part, str))


class BadDocument(Exception):
    """Why a document cannot be used; counted and listed, not fatal by itself."""


def bad_document(where: str, offset: int, why: str) -> Document:
    return Document(where, offset, lambda: iter(()), bad=why)


def value_document(value: Any, where: str, offset: int, reading: Reading) -> Document:
    """The document that is one value of a JSON object, a column or an array."""
    try:
        part = _CONVERT[reading.content](value, reading)
    except BadDocument as e:
        return bad_document(where, offset, str(e))
    return Document(where, offset, lambda: iter((part,)))


def json_document(data: bytes, where: str, offset: int, reading: Reading) -> Document:
    """The document in a JSON object: the value of `reading.key`."""
    try:
        value = _value_of(data, reading.key)
    except BadDocument as e:
        return bad_document(where, offset, str(e))
    return value_document(value, where, offset, reading)


def _value_of(data: bytes, key: str) -> Any:
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise BadDocument(f"not UTF-8 (byte {e.start} of the line)") from e
    except (ValueError, RecursionError) as e:  # ValueError: also numbers of thousands of digits
        raise BadDocument(f"not JSON ({e})") from e
    if not isinstance(record, dict):
        raise BadDocument(f"no key {key!r}: not an object")
    if key not in record:
        raise BadDocument(
            f"no key {key!r} among {', '.join(map(repr, sorted(record)[:5])) or 'none'}"
        )
    return record[key]


def check_ids(ids: NDArray[np.integer], reading: Reading, first: int = 0) -> NDArray[np.integer]:
    """`ids`, of which ids[0] is number `first` of its document. Raises BadDocument."""
    if len(ids) and (int(ids.max()) >= reading.ids or int(ids.min()) < 0):
        place = int(np.argmax((ids >= reading.ids) | (ids < 0)))
        raise BadDocument(
            f"id {ids[place]} at place {first + place}; ids lie in 0..{reading.ids - 1}"
        )
    return ids


def _text(value: Any, reading: Reading) -> str:
    if not isinstance(value, str):
        raise BadDocument(f"key {reading.key!r} holds {type(value).__name__}, not text")
    if not value.strip():
        raise BadDocument("empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadDocument(f"half a surrogate pair at character {e.start}") from e
    return value


def _bytes(value: Any, reading: Reading) -> bytes:
    if not isinstance(value, bytes):
        return _text(value, reading).encode()
    if not value:
        raise BadDocument("empty")
    return value


def _integers(value: Any, reading: Reading) -> NDArray[np.integer]:
    if not isinstance(value, list | np.ndarray):
        raise BadDocument(f"key {reading.key!r} holds {type(value).__name__}, not a list of ids")
    if not len(value):
        raise BadDocument("empty")
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError) as e:
        raise BadDocument(f"key {reading.key!r}: {e}") from e
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadDocument(
            f"key {reading.key!r} holds a list of {ids.dtype} in {ids.ndim} dimension(s), not of "
            "integers"
        )
    return check_ids(ids, reading)


_CONVERT: dict[str, Callable[[Any, Reading], Part]] = {
    "text": _text,
    "bytes": _bytes,
    "integers": _integers,
}
