"""Documents of files of integers: .npy (1-D: one document; 2-D: one a row) and .bin.

Files are mapped, not read: nothing here holds more than a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.content import (
    BadDocument,
    Document,
    InputFile,
    Reading,
    check_ids,
    value_document,
)
from titans_pretrain.data.unpack import unreadable
from titans_pretrain.errors import ConfigError, DataError

READ = 1 << 18  # ids looked at at a time

Ids = NDArray[np.integer]


def read_npy(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The documents from row `start` (2-D) or place `start` (1-D) on."""
    try:
        array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except OSError as e:
        raise unreadable(file, e) from e
    except (ValueError, EOFError) as e:
        raise DataError(
            f"input {file.path}: {e}",
            "a .npy file holds one array of integers, whole",
            "write it anew with numpy.save, or take it out",
        ) from e
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise DataError(
            f"input {file.path}: {array.ndim}-D array of {array.dtype}",
            "a .npy file holds integers: one document (1-D), or one a row (2-D)",
            "quantise or reshape it; for documents of several lengths use JSON lines or parquet",
        )
    if array.ndim == 2 and reading.document_length is not None:
        raise ConfigError(
            f"--document-length {reading.document_length} with {file.name}, a 2-D array",
            "1-D arrays are cut by length; the rows of a 2-D array are documents",
            "leave it out, or flatten the array",
        )
    if array.ndim == 1:
        yield from _sequence(array, file, reading, start, separator=None)
        return
    for row in range(start, len(array)):
        yield value_document(np.asarray(array[row]), f"{file.name} row {row}", row, reading)


def read_bin(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The documents from place `start` on, of little-endian ids without a header: 16 bits wide
    for a vocabulary of at most 65,536, else 32."""
    width = 2 if reading.ids <= 1 << 16 else 4
    try:
        whole = np.memmap(file.path, np.uint8, "r")
    except OSError as e:
        raise unreadable(file, e) from e
    except ValueError:  # an empty file cannot be mapped
        whole = np.zeros(0, np.uint8)  # type: ignore[assignment]
    remedy = "write ids of the right width, or a .npy file, which tells its own"
    rule = f"with {reading.ids} ids a .bin file holds {8 * width}-bit integers"
    if len(whole) % width:
        raise DataError(f"input {file.path}: {len(whole)} bytes", rule, remedy)
    ids = whole.view(f"<u{width}")
    if width == 2 and len(ids) >= 1024 and not ids[1:8192:2].any():
        raise DataError(f"input {file.path}: every second id is 0: 32-bit integers?", rule, remedy)
    yield from _sequence(ids, file, reading, start, reading.separator)


def _sequence(
    ids: Ids, file: InputFile, reading: Reading, start: int, separator: int | None
) -> Iterator[Document]:
    """Documents of one long array: divided by the separator, which is left out, and cut where
    they are longer than `reading.document_length`."""
    longest = reading.document_length or len(ids)
    begin = start
    for end in _ends(ids, start, separator):
        while True:
            stop = min(begin + longest, end)
            yield _stretch(ids, begin, stop, file, reading)
            if stop == end:
                break
            begin = stop
        begin = end + 1


def _ends(ids: Ids, start: int, separator: int | None) -> Iterator[int]:
    last = start - 1
    for begin in range(start, len(ids), READ) if separator is not None else ():
        for place in np.flatnonzero(ids[begin : begin + READ] == separator).tolist():
            last = begin + place
            yield last
    if last + 1 < len(ids) or (start == 0 and not len(ids)):
        yield len(ids)


def _stretch(ids: Ids, begin: int, end: int, file: InputFile, reading: Reading) -> Document:
    def parts() -> Iterator[Ids]:
        if begin == end:
            raise BadDocument("empty")
        for place in range(begin, end, READ):
            part = np.asarray(ids[place : min(place + READ, end)])
            yield check_ids(part, reading, place - begin)

    whole = begin == 0 and end == len(ids)
    return Document(file.name if whole else f"{file.name} id {begin}", begin, parts)
