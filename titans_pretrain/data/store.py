"""Where the shards of a prepared source lie: in a folder, or behind a URL with the node's cache."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from titans_pretrain.data.remote import FetchFailed, Wanted, join, shown

if TYPE_CHECKING:
    from titans_pretrain.data.cache import Cache
    from titans_pretrain.data.manifest import Shard

from titans_pretrain.errors import DataError

log = logging.getLogger("titans_pretrain.data.store")

REPAIR = "fetch the shard again, or prepare the folder anew"
# What a file system says of a file that is not there, or no longer readable.
UNREADABLE = {errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EISDIR}


class Unusable(DataError):
    """A shard, or a member of it, that is not what was prepared: data.on_bad decides.

    `why` says so in a few words; `offset` is the byte of the shard where it shows.
    """

    def __init__(self, value: str, rule: str, remedy: str, why: str = "", offset: int = 0) -> None:
        super().__init__(value, rule, remedy)
        self.why, self.offset = why or value, offset

    def __reduce__(self) -> tuple[type[Unusable], tuple[str, str, str, str, int]]:  # type: ignore[override]
        return type(self), (self.value, self.rule, self.remedy, self.why, self.offset)


class Store(Protocol):
    """The shards of one source."""

    def where(self, shard: Shard) -> str:
        """The shard's place, for messages."""

    def open(self, shard: Shard) -> int:
        """A file descriptor of the shard. Raises Unusable, NodeError."""

    def open_damaged(self, shard: Shard) -> int | None:
        """What there is of a shard that `open` calls unusable."""

    def renew(self, shard: Shard) -> bool:
        """Whether a shard that turned out damaged should be opened anew: it was but a copy."""

    def expect(self, reader: object, shards: Iterable[Shard]) -> None:
        """The shards that a reader needs now and soon, most urgent first."""

    def close(self, reader: object) -> None:
        """The reader needs nothing any more."""


class Folder:
    """A folder that is read in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def where(self, shard: Shard) -> str:
        return str(self.folder / shard.file)

    def open(self, shard: Shard) -> int:
        path = self.folder / shard.file
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            kind = Unusable if e.errno in UNREADABLE else DataError
            rule = "the shards lie beside their manifest"
            raise kind(f"{path}: {e.strerror}", rule, REPAIR) from e
        size = os.fstat(file).st_size
        if size != shard.bytes:
            os.close(file)
            end = f"it ends at offset {size}" if size < shard.bytes else "it is too long"
            why = f"{size} bytes, manifest {shard.bytes}; {end}"
            rule = "a shard has the size it was written with"
            raise Unusable(f"{path}: {why}", rule, REPAIR, why, min(size, shard.bytes))
        return file

    def open_damaged(self, shard: Shard) -> int | None:
        try:
            return os.open(self.folder / shard.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            if e.errno not in UNREADABLE:
                raise DataError(
                    f"{self.where(shard)}: {e.strerror}", "shards can be read", REPAIR
                ) from e
        return None

    def renew(self, shard: Shard) -> bool:
        return False

    def expect(self, reader: object, shards: Iterable[Shard]) -> None:
        pass

    def close(self, reader: object) -> None:
        pass


class Remote:
    """A folder behind a URL, read through the node's cache."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url, self.cache = url, cache

    def where(self, shard: Shard) -> str:
        return shown(join(self.url, shard.file))

    def open(self, shard: Shard) -> int:
        try:
            return self.cache.open(self._wanted(shard))
        except FetchFailed as e:
            raise Unusable(
                f"{self.where(shard)}: at byte {e.offset}: {e.reason}",
                "a shard comes whole and with the checksum it was prepared with, after "
                f"{self.cache.patience.retries} retries at the latest (data.cache.retries)",
                "look at the server or bucket, or put the shard back there; "
                "data.on_bad=quarantine goes on without what stays bad",
                e.reason,
                e.offset,
            ) from e

    def open_damaged(self, shard: Shard) -> int | None:
        return self.cache.damaged(self._wanted(shard))

    def renew(self, shard: Shard) -> bool:
        if not self.cache.discard(self._wanted(shard)):
            return False
        log.warning("%s: its copy in %s is damaged", self.where(shard), self.cache.folder)
        return True

    def expect(self, reader: object, shards: Iterable[Shard]) -> None:
        self.cache.want(reader, [self._wanted(shard) for shard in shards])

    def close(self, reader: object) -> None:
        self.cache.want(reader, [])

    def _wanted(self, shard: Shard) -> Wanted:
        return Wanted(join(self.url, shard.file), shard.bytes, shard.sha256)
