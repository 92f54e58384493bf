"""Documents of a plain WebDataset tar, read once from front to back through `wds.WebDataset`.

Stock reading takes a tar that was cut between two members, or has a damaged header, for one that
ends there. So the bytes are watched on their way in: every header's checksum, and the end mark.
Transfers that break are tried again and go on where they ended (remote.py).
"""

from __future__ import annotations

import importlib
import tarfile
import warnings
from collections.abc import Generator, Iterator
from typing import Any

from titans_pretrain.data.content import BadDocument, Document, InputFile, Part, Reading
from titans_pretrain.data.remote import FetchFailed, Patience, read_through, shown
from titans_pretrain.data.tars import MEMBERS, sample_documents
from titans_pretrain.errors import DataError, TitansError

SCHEME = "watched-tar"
BLOCK = tarfile.BLOCKSIZE


class _Broken(Exception):
    """A tar that is not whole."""


class _Watched:
    """The file that webdataset reads: a tar's bytes, its headers checked as they pass."""

    def __init__(self, url: str, patience: Patience) -> None:
        self._pieces: Generator[bytes, None, None] = read_through(url, patience)
        self._left = b""  # come, and not yet asked for
        self._at = 0  # bytes come so far
        self._next = 0  # where the next header begins
        self._head = bytearray()
        self._whole = False

    def read(self, size: int) -> bytes:
        parts, have = [self._left], len(self._left)
        while have < size:
            piece = next(self._pieces, b"")
            if not piece:
                if not self._whole:
                    raise _Broken(f"it ends at byte {self._at}, before its end mark")
                break
            self._watch(piece)
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        self._left = data[size:]
        return data[:size]

    def close(self) -> None:
        self._pieces.close()

    def __del__(self) -> None:
        self.close()

    def _watch(self, piece: bytes) -> None:
        begin, self._at = self._at, self._at + len(piece)
        while not self._whole and self._next < self._at:
            start = self._next + len(self._head) - begin
            self._head += piece[start : start + BLOCK - len(self._head)]
            if len(self._head) < BLOCK:
                return
            head = bytes(self._head)
            self._head.clear()
            self._whole = not any(head)
            try:
                sums = tarfile.calc_chksums(head)  # type: ignore[attr-defined]
                good = self._whole or tarfile.nti(head[148:156]) in sums  # type: ignore[attr-defined]
                size = 0 if self._whole else tarfile.nti(head[124:136])  # type: ignore[attr-defined]
            except tarfile.HeaderError:
                good, size = False, 0
            if not good or size < 0 or head[156:157] == tarfile.GNUTYPE_SPARSE:
                raise _Broken(f"at byte {self._next} there is no header of an uncompressed tar")
            self._next += BLOCK + -(-size // BLOCK) * BLOCK


_patience: dict[str, Patience] = {}  # of the URLs being read


def _open(url: str, mode: str = "rb", bufsize: int = 8192) -> _Watched:
    url = url.removeprefix(f"{SCHEME}:")
    return _Watched(url, _patience[url])


def tar_documents(
    url: str, patience: Patience, reading: Reading, start: int = 0
) -> Iterator[tuple[int, list[Part]]]:
    """(number, content) of the documents of a tar from number `start` on. Blank ones are left out,
    though counted.

    Raises DataError for a tar that does not come whole or has a sample without a document.
    """
    import webdataset

    importlib.import_module("webdataset.gopen").gopen_schemes[SCHEME] = _open
    _patience[url] = patience
    name = shown(url)
    file = InputFile(name, name, ".tar", "")
    # No splitting, no shuffling: the one who reads a shard is chosen already. A seed, or the
    # constructor would draw from the global generator.
    options: dict[str, Any] = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = webdataset.WebDataset([f"{SCHEME}:{url}"], seed=0, empty_check=False, **options)
    number = 0
    try:
        for sample in samples:
            for document in sample_documents(sample, file, reading, number):
                number += 1
                if number > start and (parts := _content(document)):
                    yield number - 1, parts
    except FetchFailed as e:
        raise _unreadable(name, f"at byte {e.offset}: {e.reason}") from e
    except (_Broken, tarfile.TarError, ValueError) as e:  # ValueError: two members of one name
        raise _unreadable(name, f"broken tar: {e.args[0]}") from e
    except TitansError as e:  # webdataset adds to the arguments of what passes through it
        raise type(e)(e.value, e.rule, e.remedy) from e
    if number == 0:
        raise _unreadable(name, f"no sample with a member .{', .'.join(MEMBERS[reading.content])}")


def _content(document: Document) -> list[Part]:
    """Empty for a blank document."""
    try:
        if document.bad is not None:
            raise BadDocument(document.bad)
        return list(document.parts())
    except BadDocument as e:
        if str(e) == "empty":
            return []
        raise DataError(
            f"document {document.where}: {e}",
            "every sample of a streamed source holds a document that can be used",
            "mend or remove it; or prepare the source (`titans-pretrain prepare --on-bad skip`)",
        ) from e


def _unreadable(name: str, why: str) -> DataError:
    return DataError(
        f"{name}: {why}",
        "every tar of a streamed source comes whole and holds documents",
        "put the file back, or take it out of the source (which begins another order); prepared "
        "sources can go on without it (data.on_bad)",
    )
