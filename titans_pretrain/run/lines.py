"""Records of a run as JSON lines, one a step: appended whole or not at all, and cut on resume.

A record is a JSON object with at least "step" and "tokens" (training tokens up to that step); what
an earlier life wrote about steps after the one that a run resumes from is removed, so that a file
holds each step once. After each `append` a kill -9 loses nothing that was written.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from titans_pretrain.run.files import atomic_write, storage_error

_log = logging.getLogger(__name__)

Record = dict[str, Any]
NEEDED = ("step", "tokens")  # of a record
TAIL = 1 << 16  # bytes


def read_lines(
    path: str | Path,
    needed: Collection[str] = NEEDED,
    damaged: Callable[[str], None] | None = None,
) -> Iterator[Record]:
    """The records in file order that hold the keys `needed`; a torn line (kill -9, full disk) is
    left out, and told to `damaged` (default: the log).

    Raises OSError if the file cannot be read.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line, needed)
            if record is not None:
                yield record
            elif damaged is None:
                _log.warning("%s line %d is torn: left out", path, number)
            else:
                damaged(f"{path} line {number}")


def read_tail(path: Path, size: int = TAIL) -> tuple[list[Record], int]:
    """The last records of a file of any length, and how many lines among them are damaged.

    Reads the last `size` bytes, or more where no record lies in them; none where there is no file.
    The last line may be one that is being written: if it is not whole, it counts for nothing.
    Raises OSError.
    """
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        length = file.seek(0, 2)
        while True:
            begin = max(0, length - size)
            file.seek(begin)
            lines = file.read(length - begin).decode(errors="replace").split("\n")
            whole = lines[bool(begin) : -1]  # without the ends of two others
            found = [_parse(line, NEEDED) for line in whole]
            records = [record for record in found if record is not None]
            if records or not begin:
                return records, len(found) - len(records)
            size *= 4


def _parse(line: str, needed: Collection[str]) -> Record | None:
    record = None
    with contextlib.suppress(ValueError):
        record = json.loads(line)
    return record if isinstance(record, dict) and record.keys() >= set(needed) else None


class Lines:
    """Appends records after `start_step`, the step that the run resumes from (0: from scratch).

    kept: the earlier records that stay, those up to `start_step`; with 0 none do. cut: the others.
    Raises NodeError if the disk refuses, here and in `append`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        try:
            self.kept, self.cut = self._keep_until(start_step)
            self._file = path.open("ab", buffering=0)
            self._size = path.stat().st_size
        except OSError as e:
            raise storage_error(e, f"opening {path}") from e

    def append(self, record: Record) -> None:
        """Appends the whole line, or leaves the file as it was and raises NodeError."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            self._write(line)
        except OSError as e:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise storage_error(e, f"writing step {record['step']} to {self._path}") from e
        self._size += len(line)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Every record is on disk already: a disk that refuses now loses nothing."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _keep_until(self, step: int) -> tuple[list[Record], list[Record]]:
        """Rewrites the file without records after `step`; returns those kept, and the others.
        Always a new file: an older life that still runs keeps appending to the one it had, which
        nobody sees."""
        records = list(read_lines(self._path)) if self._path.exists() else []
        kept = [r for r in records if 0 < step >= r["step"]]
        cut = [r for r in records if not 0 < step >= r["step"]]
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in kept]
        atomic_write(self._path, "".join(lines))
        if cut:
            _log.info("%s: %d records after step %d removed", self._path, len(cut), step)
        return kept, cut
