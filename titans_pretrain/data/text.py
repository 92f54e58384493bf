"""Text files as streams of documents: .txt (one document a file), .jsonl (one a line), compressed.

Nothing here holds more than one JSON line, or a few pieces of a plain text file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from titans_pretrain.errors import DataError

READ = 1 << 20  # bytes read at a time
KINDS = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
BROKEN = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


@dataclass(frozen=True)
class InputFile:
    path: str
    name: str  # as messages and the manifest call it: relative to the input given
    kind: str  # ".txt" or ".jsonl"
    compression: str  # "", ".gz", ".xz" or ".zst"


@dataclass(frozen=True)
class Document:
    """One document, or what kept it from being one (`bad`)."""

    where: str  # file, and line or byte
    offset: int  # of its first byte in the unpacked file
    parts: Callable[[], Iterator[str]]  # its text; raises BadDocument
    bad: str | None = None


class BadDocument(Exception):
    """Why a document cannot be used; counted and listed, not fatal by itself."""


def find_inputs(inputs: list[str]) -> list[InputFile]:
    """The text files named, or found in the folders named, in a fixed order. Raises DataError."""
    found: list[InputFile] = []
    for given in inputs:
        root = Path(given)
        if root.is_dir():
            files = [p for p in sorted(root.rglob("*")) if p.is_file() and _kind(p)]
            names = [path.relative_to(root) for path in files]
            found += [
                _input_file(path, f"{root.name}/{name.as_posix()}")
                for path, name in zip(files, names)
                if not any(part.startswith(".") for part in name.parts)
            ]
        elif root.is_file():
            if not _kind(root):
                raise DataError(
                    f"input {given}: unknown kind of file",
                    "inputs are .txt or .jsonl, plain or with .gz, .xz or .zst, or folders of them",
                    "convert or rename the file",
                )
            found.append(_input_file(root, root.name))
        else:
            raise DataError(f"input {given}: not found", "inputs exist", "check the path")
    if not found:
        raise DataError(
            f"input {', '.join(inputs)}: no text files",
            "inputs are .txt or .jsonl, plain or with .gz, .xz or .zst, or folders of them",
            "check the folder",
        )
    seen: set[str] = set()
    for file in found:
        if file.path in seen:
            raise DataError(
                f"input {file.path}: given twice",
                "each file is read once",
                "name it once, or only the folder that holds it",
            )
        seen.add(file.path)
    return found


def _kind(path: Path) -> tuple[str, str] | None:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = Path(path.stem).suffix if compression else path.suffix
    return (kind, compression) if kind in KINDS else None


def _input_file(path: Path, name: str) -> InputFile:
    kind, compression = _kind(path) or ("", "")
    return InputFile(str(path.resolve()), name, kind, compression)


class _Zstandard(io.RawIOBase):
    """Unpacks frame after frame. The library's own reader takes a cut file for a whole one."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._packed.read(1 << 16)
            if not data and self._frame is not None:
                raise zstandard.ZstdError("it ends inside a frame")
            if not data:
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._packed.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _unpacked(packed: IO[bytes], compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.open(packed)  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.open(packed)
    return io.BufferedReader(_Zstandard(packed), READ) if compression == ".zst" else packed


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(stream.read(min(count, READ))) or count


@contextmanager
def _opened(file: InputFile) -> Iterator[IO[bytes]]:
    """The unpacked bytes; a broken archive or an unreadable file becomes a DataError."""
    try:
        with Path(file.path).open("rb") as packed, _unpacked(packed, file.compression) as stream:
            yield stream
    except BROKEN as e:
        raise DataError(
            f"input {file.path}: broken {file.compression} archive ({e})",
            "every input can be unpacked to its end",
            "fetch the file again or take it out; nothing prepared so far is lost",
        ) from e
    except OSError as e:
        raise DataError(
            f"input {file.path}: {e.strerror or e}",
            "every input can be read",
            "check the file and its permissions; nothing prepared so far is lost",
        ) from e


def documents(
    file: InputFile, text_key: str = "text", start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The documents that begin in the bytes [start, stop) of the unpacked file."""
    if file.kind == ".txt":
        yield Document(file.name, 0, lambda: _plain_parts(file))
        return
    with _opened(file) as stream:
        if file.compression:
            _skip(stream, start)
        else:
            stream.seek(start)
        offset, number = start, 0
        while stop is None or offset < stop:
            line = stream.readline()
            if not line:
                return
            number += 1
            if line.strip():
                place = f"line {number}" if start == 0 else f"byte {offset}"
                yield _json_document(line, f"{file.name} {place}", offset, text_key)
            offset += len(line)


def _json_document(line: bytes, where: str, offset: int, text_key: str) -> Document:
    try:
        text = _text_of(line, text_key)
    except BadDocument as e:
        return Document(where, offset, lambda: iter(()), bad=str(e))
    return Document(where, offset, lambda: iter((text,)))


def _text_of(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise BadDocument(f"not UTF-8 (byte {e.start} of the line)") from e
    except (ValueError, RecursionError) as e:  # ValueError: also numbers of thousands of digits
        raise BadDocument(f"not JSON ({e})") from e
    if not isinstance(record, dict) or text_key not in record:
        raise BadDocument(f"no key {text_key!r}")
    text = record[text_key]
    if not isinstance(text, str):
        raise BadDocument(f"key {text_key!r} holds {type(text).__name__}, not text")
    if not text.strip():
        raise BadDocument("empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise BadDocument(f"half a surrogate pair at character {e.start}") from e
    return text


def _plain_parts(file: InputFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    blank, offset = True, 0
    with _opened(file) as stream:
        while True:
            data = stream.read(READ)
            try:
                part = decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:
                raise BadDocument(f"not UTF-8 (near byte {offset + e.start})") from e
            blank = blank and not part.strip()
            if part:
                yield part
            if not data:
                break
            offset += len(data)
    if blank:
        raise BadDocument("empty")
