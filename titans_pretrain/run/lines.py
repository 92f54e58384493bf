"""Records of a run as JSON lines, one a step: appended whole or not at all, and cut on resume.

A record is a JSON object with at least "step" and "tokens" (training tokens up to that step); what
an earlier life wrote about steps after the one that a run resumes from is removed, so that a file
holds each step once. After each `append` a kill -9 loses nothing that was written.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from titans_pretrain.run.files import atomic_write, storage_error

_log = logging.getLogger(__name__)

Record = dict[str, Any]


def read_lines(path: str | Path, needed: Collection[str] = ("step", "tokens")) -> Iterator[Record]:
    """The records in file order that hold the keys `needed`; a torn line (kill -9, full disk) is
    left out.

    Raises OSError if the file cannot be read.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            record = None
            with contextlib.suppress(ValueError):
                record = json.loads(line)
            if isinstance(record, dict) and record.keys() >= set(needed):
                yield record
            else:
                _log.warning("%s line %d is torn: left out", path, number)


class Lines:
    """Appends records after `start_step`, the step that the run resumes from (0: from scratch).

    kept: the earlier records that stay, those up to `start_step`; with 0 none do. Raises NodeError
    if the disk refuses, here and in `append`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        try:
            self.kept = self._keep_until(start_step)
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

    def _keep_until(self, step: int) -> list[Record]:
        """Rewrites the file without records after `step`; returns those kept. Always a new file:
        an older life that still runs keeps appending to the one it had, which nobody sees."""
        records = list(read_lines(self._path)) if self._path.exists() else []
        kept = [r for r in records if r["step"] <= step] if step > 0 else []
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in kept]
        atomic_write(self._path, "".join(lines))
        if len(kept) < len(records):
            gone = len(records) - len(kept)
            _log.info("%s: %d records after step %d removed", self._path, gone, step)
        return kept
