"""Documents in, WebDataset shards out: many documents a member, many members a shard."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.config import ALIGNMENTS
from titans_pretrain.data.files import file_sha256, writing
from titans_pretrain.data.manifest import MEMBER, Shard

HEADER = 512  # bytes of a tar header; contents are padded to multiples of it
MAX_DOCUMENTS = 1 << 20  # of a member, so that its padded counts fit 32 bits


def padded_counts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[alignments]: tokens when each document is padded to a multiple of the alignment."""
    column = np.asarray(ALIGNMENTS, np.int64)
    return (-(-lengths[:, None] // column) * column).sum(axis=0)


class ShardWriter:
    """Writes FOLDER/PREFIX-00000.tar, ... one member of about `member_tokens` after another.

    The bytes depend on the documents alone. Documents are never split. Raises NodeError.
    """

    def __init__(
        self, folder: Path, prefix: str, dtype: np.dtype, member_tokens: int, shard_tokens: int
    ) -> None:
        self.folder, self.prefix, self.dtype = folder, prefix, dtype
        self.member_tokens, self.shard_tokens = member_tokens, shard_tokens
        self.shards: list[Shard] = []
        self.members: list[NDArray[np.void]] = []
        self._documents: list[NDArray] = []
        self._waiting = 0  # tokens of the member to come
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._in_shard: list[NDArray[np.void]] = []

    def add(self, document: NDArray) -> None:
        """Appends one document (its ids, bos and eos included)."""
        self._documents.append(document)
        self._waiting += len(document)
        if self._waiting >= self.member_tokens or len(self._documents) >= MAX_DOCUMENTS:
            self._write_member()

    def close(self) -> tuple[list[Shard], NDArray[np.void]]:
        """Writes what waits; returns the shards and the member table."""
        self._write_member()
        self._close_shard()
        return self.shards, np.concatenate([np.zeros(0, MEMBER), *self.members])

    def _write_member(self) -> None:
        if not self._documents:
            return
        tar = self._open_shard()
        lengths = np.asarray([len(d) for d in self._documents], "<u4")
        tok = np.concatenate(self._documents).astype(self.dtype, copy=False).tobytes()
        lens = lengths.tobytes()
        row = np.zeros(1, MEMBER)
        row["shard"] = len(self.shards)
        row["documents"], row["tokens"] = len(lengths), self._waiting
        row["tok_crc"], row["len_crc"] = zlib.crc32(tok), zlib.crc32(lens)
        row["padded"] = padded_counts(lengths.astype(np.int64))
        # webdataset writes the files of a member in the order of their names: len, then tok.
        row["len"] = tar.tarstream.offset + HEADER
        row["tok"] = row["len"] + -(-len(lens) // HEADER) * HEADER + HEADER
        key = f"{self.prefix}-{len(self.shards):05d}-{len(self._in_shard):05d}"
        with writing(self.folder), self._quietly():
            tar.write({"__key__": key, "len": lens, "tok": tok})
        self._in_shard.append(row)
        self._documents, self._waiting = [], 0
        if sum(int(r["tokens"][0]) for r in self._in_shard) >= self.shard_tokens:
            self._close_shard()

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """After a failed write, keeps tarfile from trying again when it is collected."""
        try:
            yield
        except OSError:
            self._tar.tarstream.fileobj.closed = True
            raise

    def _path(self) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):05d}.tar"

    def _open_shard(self) -> Any:
        if self._tar is None:
            import webdataset  # pulls in torch: only where shards are written

            with writing(self.folder):
                self._file = self._path().open("wb")
            self._tar = webdataset.TarWriter(
                self._file, user="titans", group="titans", mtime=0, encoder=False
            )
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        with writing(self.folder), self._quietly():
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        rows = np.concatenate(self._in_shard)
        path = self._path()
        self.shards.append(
            Shard(
                path.name,
                path.stat().st_size,
                file_sha256(path),
                int(rows["tokens"].sum()),
                int(rows["documents"].sum()),
            )
        )
        self.members.append(rows)
        self._tar, self._file, self._in_shard = None, None, []
