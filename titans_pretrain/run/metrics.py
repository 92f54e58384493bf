"""Metrics of a run: every record unrounded in metrics.jsonl, and the same curves in TensorBoard.

A line of metrics.jsonl is `{"step": int, "tokens": int, "time": Unix seconds, "values": {...}}`;
`tokens` counts the training tokens up to that step. (A value that is not finite is written as
Python's NaN or Infinity.) TensorBoard shows each value by step under its own name, and those of
training and validation by tokens too, as `by_tokens/<name>` in the run `by_tokens`: a folder of its
own, because TensorBoard drops what a resumed run repeats by step number, and there a step is a
token count.

Rank 0 alone holds a `Metrics`. After each `write` a kill -9 loses nothing that was written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.folder import RunFolder

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

BY_TOKENS = ("train/", "validation/")  # groups that are compared at equal tokens

_log = logging.getLogger(__name__)
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl in file order; a torn line (kill -9, full disk) is left out.

    Raises OSError if the file cannot be read.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            record = None
            with contextlib.suppress(ValueError):
                record = json.loads(line)
            if isinstance(record, dict) and {"step", "tokens", "values"} <= record.keys():
                yield record
            else:
                _log.warning("%s line %d is torn: left out", path, number)


class Metrics:
    """Writes records after `start_step`, the step that the run resumes from (0: from scratch).

    What an earlier life wrote about later steps is removed from metrics.jsonl and hidden in
    TensorBoard, so that each curve is one line with one value a step. With `start_step` 0 that is
    everything. Raises NodeError if the disk refuses, here and in `write`.
    """

    def __init__(self, folder: RunFolder, start_step: int, tensorboard: bool) -> None:
        self._path = folder.metrics
        self._by_step: SummaryWriter | None = None
        self._by_tokens: SummaryWriter | None = None
        try:
            kept = self._keep_until(start_step)
            self._file = self._path.open("ab", buffering=0)
            self._size = self._path.stat().st_size
            if tensorboard:
                # Any token count beyond that of the last kept record belongs to a later step.
                tokens = max((record["tokens"] for record in kept), default=-1)
                by_tokens = folder.tensorboard / "by_tokens"
                self._by_step = _writer(folder.tensorboard, start_step + 1 if start_step else 0)
                self._by_tokens = _writer(by_tokens, tokens + 1)
        except OSError as e:
            raise storage_error(e, f"opening the metrics in {folder.path}") from e

    def write(
        self,
        step: int,
        tokens: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, torch.Tensor] | None = None,
        figures: Mapping[str, Figure] | None = None,
    ) -> None:
        """Records `scalars` (e.g. "train/loss") at `step`, after `tokens` training tokens.

        Histograms and figures go to TensorBoard alone; figures are closed.
        """
        values = {name: float(value) for name, value in scalars.items()}
        record = {"step": step, "tokens": tokens, "time": time.time(), "values": values}
        try:
            self._append(json.dumps(record).encode() + b"\n")
            if self._by_step is None or self._by_tokens is None:
                return
            for name, value in values.items():
                self._by_step.add_scalar(name, value, step)
                if name.startswith(BY_TOKENS):
                    tag = "by_tokens/" + name.replace("/", "_")
                    self._by_tokens.add_scalar(tag, value, tokens)
            for name, tensor in (histograms or {}).items():
                self._by_step.add_histogram(name, tensor, step)
            for name, figure in (figures or {}).items():
                self._by_step.add_figure(name, figure, step, close=True)
            self._by_step.flush()
            self._by_tokens.flush()
        except OSError as e:
            raise storage_error(e, f"writing metrics of step {step} to {self._path.parent}") from e

    def close(self) -> None:
        """Every record is on disk already: a disk that refuses now loses nothing."""
        for part in (self._file, self._by_step, self._by_tokens):
            with contextlib.suppress(OSError):
                if part is not None:
                    part.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _keep_until(self, step: int) -> list[dict[str, Any]]:
        """Rewrites the file without records after `step`; returns those kept. Always a new file:
        an older life that still runs keeps appending to the one it had, which nobody sees."""
        records = list(read_records(self._path)) if self._path.exists() else []
        kept = [r for r in records if r["step"] <= step] if step > 0 else []
        atomic_write(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        if len(kept) < len(records):
            _log.info(
                "%s: %d records after step %d removed", self._path, len(records) - len(kept), step
            )
        return kept

    def _append(self, line: bytes) -> None:
        """Appends the whole line, or leaves the file as it was and raises OSError."""
        left = line
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(line)


def _writer(folder: Path, purge: int) -> SummaryWriter:
    """A TensorBoard writer that hides earlier events of step `purge` and later."""
    from torch.utils.tensorboard import SummaryWriter  # seconds: not before it is wanted

    earlier = [int(m[1]) for p in folder.glob("events.*") if (m := _EVENTS.match(p.name))]
    # TensorBoard reads files in the order of their names, which hold whole seconds: ours must
    # come last, or its purge would not reach the events of a life that died this very second.
    while earlier and 0 <= max(earlier) - int(time.time()) < 3:
        time.sleep(0.05)
    if earlier and max(earlier) >= int(time.time()):
        _log.warning("%s holds events from the future: clocks of the nodes differ", folder)
    return SummaryWriter(
        os.fspath(folder), purge_step=purge if earlier else None, max_queue=1000, flush_secs=60
    )
