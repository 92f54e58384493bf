"""Metrics of a run: every record unrounded in metrics.jsonl, and the same curves in TensorBoard.

A line of metrics.jsonl is `{"step": int, "tokens": int, "time": Unix seconds, "values": {...}}`;
`tokens` counts the training tokens up to that step. (A value that is not finite is written as
Python's NaN or Infinity.) An event on the way to a step is a line with "event", what happened in
words, and "tag", its tag in TensorBoard, in the place of "values". TensorBoard shows each value by
step under its own name, and those of training and validation by tokens too, as `by_tokens/<name>`
in the run `by_tokens`: a folder of its own, because TensorBoard drops what a resumed run repeats by
step number, and there a step is a token count. Texts, pictures and the layout of its custom scalars
go to TensorBoard alone.

Rank 0 alone holds a `Metrics`. After each `write` a kill -9 loses nothing that was written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.run.files import storage_error
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import Lines, read_lines

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

BY_TOKENS = ("train/", "validation/")  # groups that are compared at equal tokens

Layout = Mapping[str, Mapping[str, Sequence[Any]]]  # category -> chart -> ["Multiline", tags]

_log = logging.getLogger(__name__)
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. Raises OSError if the file cannot be read."""
    return (record for record in read_lines(path) if "values" in record)


class Metrics:
    """Writes records after `start_step`, the step that the run resumes from (0: from scratch).

    What an earlier life wrote about later steps is removed from metrics.jsonl and hidden in
    TensorBoard, so that each curve is one line with one value a step. With `start_step` 0 that is
    everything. Raises NodeError if the disk refuses, here and in `write`.
    """

    def __init__(self, folder: RunFolder, start_step: int, tensorboard: bool) -> None:
        self._folder = folder.path
        self._first = start_step + 1 if start_step else 0  # step from which this life records
        self._by_step: SummaryWriter | None = None
        self._by_tokens: SummaryWriter | None = None
        self._records = Lines(folder.metrics, start_step)
        if not tensorboard:
            return
        try:
            # Any token count beyond that of the last kept record belongs to a later step.
            tokens = max((record["tokens"] for record in self._records.kept), default=-1)
            self._by_step = _writer(folder.tensorboard, self._first)
            self._by_tokens = _writer(folder.tensorboard / "by_tokens", tokens + 1)
        except OSError as e:
            raise storage_error(e, f"opening the metrics in {folder.path}") from e

    def introduce(self, layout: Layout, texts: Mapping[str, str]) -> None:
        """Shows the custom scalars' `layout`, and Markdown `texts` by tag, from this life's first
        step on. TensorBoard takes the last layout that it finds."""
        if self._by_step is None:
            return
        from torch.utils.tensorboard.summary import custom_scalars

        with self._writing(self._first):
            # Not `add_custom_scalars`: it writes at step 0, where no later life would hide it.
            self._add_summary(custom_scalars(layout), self._first)
            self._add_texts(self._first, texts)

    def tell(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows Markdown texts by tag at `step`, in TensorBoard alone."""
        if self._by_step is None:
            return
        with self._writing(step):
            self._add_texts(max(step, self._first), texts)

    def event(self, step: int, tokens: int, tag: str, text: str) -> None:
        """Records what happened on the way to `step` (Markdown), here and in TensorBoard."""
        what = {"tag": tag, "event": text}
        self._records.append({"step": step, "tokens": tokens, "time": time.time(), **what})
        self.tell(step, {tag: text})

    def cut_events(self, tag: str) -> list[str]:
        """The texts of the events of this tag that an earlier `Metrics` recorded about steps after
        `start_step`."""
        return [r["event"] for r in self._records.cut if r.get("tag") == tag]

    def _add_texts(self, step: int, texts: Mapping[str, str]) -> None:
        from torch.utils.tensorboard.summary import text as as_summary

        assert self._by_step is not None
        for tag, text in texts.items():
            summary = as_summary(tag, text)
            summary.value[0].tag = tag  # without the "/text_summary" that torch puts behind it
            self._add_summary(summary, step)
        self._by_step.flush()

    def _add_summary(self, summary: Any, step: int) -> None:
        assert self._by_step is not None
        writer: Any = self._by_step.file_writer
        writer.add_summary(summary, step)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise storage_error(e, f"writing metrics of step {step} to {self._folder}") from e

    def write(
        self,
        step: int,
        tokens: int,
        scalars: Mapping[str, float],
        histograms: Mapping[str, torch.Tensor] | None = None,
        images: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> None:
        """Records `scalars` (e.g. "train/loss") at `step`, after `tokens` training tokens.

        Histograms and images ([rows, columns, 3]) go to TensorBoard alone.
        """
        values = {name: float(value) for name, value in scalars.items()}
        self._records.append(
            {"step": step, "tokens": tokens, "time": time.time(), "values": values}
        )
        if self._by_step is None or self._by_tokens is None:
            return
        with self._writing(step):
            for name, value in values.items():
                self._by_step.add_scalar(name, value, step)
                if name.startswith(BY_TOKENS):
                    tag = "by_tokens/" + name.replace("/", "_")
                    self._by_tokens.add_scalar(tag, value, tokens)
            for name, tensor in (histograms or {}).items():
                self._by_step.add_histogram(name, tensor, step)
            for name, image in (images or {}).items():
                self._by_step.add_image(name, image, step, dataformats="HWC")
            self._by_step.flush()
            self._by_tokens.flush()

    def close(self) -> None:
        """Every record is on disk already: a disk that refuses now loses nothing."""
        self._records.close()
        for part in (self._by_step, self._by_tokens):
            with contextlib.suppress(OSError):
                if part is not None:
                    part.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
    # In the first life too: TensorBoard takes the first of these marks for no restart.
    return SummaryWriter(os.fspath(folder), purge_step=purge, max_queue=1000, flush_secs=60)
