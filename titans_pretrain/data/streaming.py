"""The streaming fallback: plain WebDataset tars of texts, never prepared, tokenized on the fly.

Weaker than a prepared source, for what cannot be prepared first:
- no global shuffle: V virtual workers own the tars v, v + V, ... and read each from front to back,
  in a seeded order of tars; row k of virtual worker v is sample k * V + v;
- elastic only for data-parallel sizes that divide V (rank r of D owns the v with v % D == r), and
  V cannot change in a run;
- resuming reads each virtual worker's current tar again up to where it was (without tokenizing
  it); the position of each is part of the state, which ranks complete when they save;
- content has no checksums: tars are known by their names alone;
- one source, on_bad=stop; samples are read to be skipped; validation needs prepared sets.

Rows are packed as prepared ones are (batch.py): documents padded to the alignment, none beyond
its tar, labels past the row's end, a cut document going on as one of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from titans_pretrain.config import ALIGNMENTS, DataConfig, SourceConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.data.loader import next_read, start_loader
from titans_pretrain.data.manifest import MEMBER, Manifest, Split
from titans_pretrain.data.quarantine import Entry
from titans_pretrain.data.remote import Patience, is_url, shown
from titans_pretrain.data.state import VERSION, State, differences, skipped, with_skip
from titans_pretrain.data.stream import TrainStream, as_batches, require_whole_batches
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.data.virtual_worker import Position, Row, VirtualWorker, list_tars
from titans_pretrain.errors import ConfigError, TitansError


class _Part:
    """One process's share of a step: rows of its virtual workers."""

    def __init__(self, samples: list[int], rows: list[Row], positions: dict[int, Position]) -> None:
        self.samples, self.positions = samples, positions
        self.rows = [np.stack(column) for column in zip(*rows)] if rows else []


class _Rows(IterableDataset[Any]):
    """The rows of one rank, step by step; each loader process reads for some virtual workers."""

    def __init__(self, stream: StreamedStream, state: State, step: int) -> None:
        super().__init__()
        self.source, self.tars, self.data = stream.source, stream.tars, stream.data
        self.key, self.shape = stream.key, (stream.data.sequence_length, stream.align)
        self.rank = stream.dp_rank, stream.dp_size
        self.plan = stream.rows, int(state["next_sample"]), step
        self.positions: list[Position] = state["positions"]

    def __iter__(self) -> Iterator[_Part | TitansError]:
        info = get_worker_info()
        mine = (info.id, info.num_workers) if info is not None else (0, 1)
        try:
            yield from self._parts(*mine)
        except TitansError as e:  # as a value: on its way an exception would lose its fields
            yield e

    def _parts(self, process: int, processes: int) -> Iterator[_Part]:
        count, (rank, ranks) = self.source.virtual_workers, self.rank
        cache = self.data.cache
        patience = Patience(cache.retries, cache.timeout, cache.backoff)
        tokenizer = Tokenizer.load(str(self.source.tokenizer))
        own: dict[int, Generator[tuple[Row, Position], None, None]] = {}
        rows_of_step, begin, first = self.plan
        with contextlib.ExitStack() as open_rows:
            for step in itertools.count(first):
                end = begin + rows_of_step(step)
                read: list[Row] = []
                samples: list[int] = []
                positions: dict[int, Position] = {}
                for sample in range(begin, end):
                    v = sample % count
                    if v % ranks != rank or v // ranks % processes != process:
                        continue
                    if v not in own:
                        tars = self.tars[v::count]
                        parts = (tars, f"{self.key}:{v}", tokenizer, patience, self.shape)
                        own[v] = VirtualWorker(*parts, self.positions[v]).rows()
                        open_rows.enter_context(contextlib.closing(own[v]))
                    row, positions[v] = next(own[v])
                    read.append(row)
                    samples.append(sample)
                yield _Part(samples, read, positions)
                begin = end


class StreamedStream:
    """The training batches of one rank from tars that were not prepared; used as TrainStream.

    Raises ConfigError where the data-parallel size does not divide the virtual workers or a
    virtual worker would have no tar; DataError for a path without tars.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        align: int,
        rows: Callable[[int], int],
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        [(self.name, self.source)] = data.sources.items()
        count = self.source.virtual_workers
        require_whole_batches(global_batch, micro_batch, dp_size)
        if count % dp_size:
            raise ConfigError(
                f"data.sources.{self.name}.virtual_workers={count}, data-parallel ranks={dp_size}",
                "each virtual worker belongs to one rank: their number is a multiple of the ranks'",
                f"use a number of ranks that divides {count}; a new run may choose "
                f"virtual_workers={-(-count // dp_size) * dp_size}",
            )
        self.tars = list_tars(self.source)
        if len(self.tars) < count:
            fitting = len(self.tars) // dp_size * dp_size
            raise ConfigError(
                f"data.sources.{self.name}: {len(self.tars)} tars, virtual_workers={count}",
                "each virtual worker owns one tar or more",
                f"set virtual_workers={fitting}" if fitting else "cut the text into more tars",
            )
        self.data, self.align, self.rows = data, align, rows
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        tokenizer = Tokenizer.load(str(self.source.tokenizer))
        self.manifest = _as_manifest(self.source, self.tars, tokenizer)
        self.manifests = {self.name: self.manifest}
        self.key = f"{self.manifest.hash}:{data.seed}"

    def start(self) -> State:
        """The state before the first step."""
        count = self.source.virtual_workers
        return {
            "version": VERSION,
            "streamed": self.manifest.hash,
            "virtual_workers": count,
            "tokenizer": self.manifest.tokenizer_hash,
            "seed": self.data.seed,
            "seq_len": self.data.sequence_length,
            "align": self.align,
            "next_sample": 0,
            "skips": [],
            "quarantine": [],
            "positions": [[0, 0, 0, 0] for _ in range(count)],
        }

    def load_state(self, saved: State) -> tuple[State, list[str]]:
        """(the state to go on from, the changes accepted: words for the log).

        Changed tars, virtual workers, tokenizer, seed, lengths: DataError, or, where
        `data.allow_changed` is set, the beginning of the new order.
        """
        now = self.start()
        changes = differences(saved, now, self.data.allow_changed)
        if changes:
            kept = {key: saved[key] for key in ("next_sample", "skips")}
            return {**now, **kept}, [
                *changes,
                "streaming begins at its first tars again",
            ]
        return {**now, **{key: saved[key] for key in ("next_sample", "skips", "positions")}}, []

    def complete(self, state: State, gather: Callable[[Any], Sequence[Any]]) -> State:
        """Collective. The state with the positions of all ranks' virtual workers, to be saved."""
        told = gather(state["positions"])
        positions = [told[v % self.dp_size][v] for v in range(self.source.virtual_workers)]
        return {**state, "positions": positions}

    def skip(self, state: State, start: int, stop: int) -> State:
        """The state with the samples [start, stop), which lie behind it, known to be left out."""
        return {**state, "skips": with_skip(state["skips"], start, stop)}

    def agreed(self, before: State, after: State, told: list[list[Entry]]) -> State:
        """As TrainStream's: there is no quarantine here."""
        return after

    def progress(self, state: State) -> dict[str, float]:
        """Epochs of this rank's virtual workers, on average."""
        count = self.source.virtual_workers
        done = [
            state["positions"][v][0] + state["positions"][v][1] / len(self.tars[v::count])
            for v in range(self.dp_rank, count, self.dp_size)
        ]
        return {f"data_epochs/{self.name}": sum(done) / len(done), **skipped(state)}

    def batches(
        self, state: State, step: int = 1
    ) -> Generator[tuple[list[Batch], State], None, None]:
        """Endless (micro-batches of this rank, state after them), from step `step` on. Closing the
        iterator stops the workers. Raises DataError and NodeError."""
        dataset, processes = _Rows(self, state, step), max(1, self.data.workers)
        loaded = iter(dataset)
        if self.data.workers:
            loaded = start_loader(dataset, processes, batch_size=None)
        positions: list[Position] = list(state["positions"])
        for number in itertools.count(step):
            parts: list[_Part] = [next_read(loaded) for _ in range(processes)]
            for part in parts:
                for v, position in part.positions.items():
                    positions[v] = position
            state = {
                **state,
                "next_sample": int(state["next_sample"]) + self.rows(number),
                "positions": list(positions),
            }
            yield as_batches(_joined(parts), self.micro_batch), state


Stream = TrainStream | StreamedStream


def open_batches(
    data: DataConfig,
    *,
    rows: Callable[[int], int],
    vocab_size: int | None = None,
    **place: Any,
) -> Stream:
    """The training batches of one rank: from prepared sources, or from one that is streamed.

    Arguments are TrainStream's. Raises ConfigError, DataError, NodeError.
    """
    if any(source.stream for source in data.sources.values()):
        return StreamedStream(data, rows=rows, **place)
    stream = TrainStream(data, rows=rows, vocab_size=vocab_size, **place)
    for manifest in stream.manifests.values():
        manifest.require_tokenizer()
    return stream


def _joined(parts: list[_Part]) -> tuple[torch.Tensor, ...]:
    """The rows of all processes in the order of their sample numbers, as `read_rows` has them."""
    samples = np.concatenate([np.asarray(part.samples, np.int64) for part in parts])
    order = np.argsort(samples)
    columns = [np.concatenate(c)[order] for c in zip(*(part.rows for part in parts if part.rows))]
    source = np.zeros_like(samples)
    return tuple(torch.from_numpy(c) for c in (*columns, samples[order], source))


def _as_manifest(source: SourceConfig, tars: list[str], tokenizer: Tokenizer) -> Manifest:
    """What is known of the source in a manifest's words: its tokenizer, and no shard."""
    names = [shown(tar) if is_url(tar) else Path(tar).name for tar in tars]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    header = {**tokenizer.header(), "alignments": list(ALIGNMENTS)}
    empty = {name: Split([], np.zeros(0, MEMBER)) for name in ("train", "validation")}
    return Manifest(Path(source.path), digest, header, empty)
