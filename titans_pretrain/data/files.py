"""Writing files so that a kill, a full disk or a read-only folder leaves nothing half done."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titans_pretrain.errors import NodeError

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again: finished work is kept",
    errno.EDQUOT: "raise the quota and run the same command again: finished work is kept",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EACCES: "choose a folder you may write to, or change its permissions",
    errno.EPERM: "choose a folder you may write to, or change its permissions",
}


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what the operating system says against writing under `path` into a NodeError."""
    try:
        yield
    except OSError as e:
        raise NodeError(
            f"cannot write {e.filename or path}: {e.strerror or e}",
            "the output folder is writable and has room",
            REMEDIES.get(e.errno or 0, "mend what the message says and run the same command again"),
        ) from e


def write_atomically(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing. Raises NodeError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """sha256 (hex) of a file, about 2 GB/s."""
    with Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
