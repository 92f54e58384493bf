"""Writing files so that nothing is lost, and telling a failed write as an error to act on."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from titans_pretrain.errors import ConfigError, NodeError, TitansError

# What the user can set right; everything else that a file system answers is the node's fault.
_USER_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def storage_error(error: OSError, doing: str, *, starting: bool = False) -> TitansError:
    """The error to raise for a failed write: `doing` is e.g. "writing metrics.jsonl in runs/a".

    At the start of a run a wrong path or missing permission is a ConfigError; a full, read-only or
    broken disk, and anything during the run, is a NodeError (exit 76).
    """
    found = f"{doing}: {error.strerror or error} (on {socket.gethostname()})"
    if starting and error.errno in _USER_ERRORS:
        return ConfigError(
            found, "the run folder can be created and written", "mend its permission or set folder="
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space and start again: the run continues from its last checkpoint"
    else:
        remedy = "mend the disk or use another node: the run continues from its last checkpoint"
    if starting:
        remedy += "; or set another folder="
    return NodeError(found, "the run folder stays writable during the run", remedy)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes `content` so that `path` holds the former or the new one whole. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
