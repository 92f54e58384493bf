"""The unpacked bytes of an input file: plain, .gz, .xz or .zst."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from titans_pretrain.data.content import InputFile
from titans_pretrain.errors import DataError

READ = 1 << 20  # bytes read at a time
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
BROKEN = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


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


@contextmanager
def opened(file: InputFile, start: int = 0) -> Iterator[IO[bytes]]:
    """The unpacked bytes from `start` on.

    A broken archive or an unreadable file becomes a DataError.
    """
    try:
        with Path(file.path).open("rb") as packed, _unpacked(packed, file.compression) as stream:
            if not file.compression:
                stream.seek(start)
            while file.compression and start > 0:
                start -= len(stream.read(min(start, READ))) or start
            yield stream
    except BROKEN as e:
        raise DataError(
            f"input {file.path}: broken {file.compression} archive ({e})",
            "every input can be unpacked to its end",
            "fetch the file again or take it out; nothing prepared so far is lost",
        ) from e
    except OSError as e:
        raise unreadable(file, e) from e


def unreadable(file: InputFile, e: OSError) -> DataError:
    return DataError(
        f"input {file.path}: {e.strerror or e}",
        "every input can be read",
        "check the file and its permissions; nothing prepared so far is lost",
    )
