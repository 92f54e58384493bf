"""step -> batches of one rank, and the few numbers that resume them.

The order of samples is a function of (manifest, seed, sample number). Step t covers the samples
[S_t, S_t + rows of the step); each data-parallel rank takes its slice of them. The only state is
the next sample number and the intervals to skip: the same on every rank, whatever the layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from titans_pretrain.config import DataConfig
from titans_pretrain.data.batch import Batch, batch_hash, concatenate
from titans_pretrain.data.loader import next_read, start_loader
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.mix import mix_of
from titans_pretrain.data.order import Order, take
from titans_pretrain.data.quarantine import Entry, Substitutes, agreed, members_of, merged
from titans_pretrain.data.shards import BlockReader
from titans_pretrain.data.sources import load_sources
from titans_pretrain.data.state import VERSION, State, differences, skipped, with_skip
from titans_pretrain.errors import ConfigError, DataError, TitansError

__all__ = ["Batch", "TrainStream", "batch_hash", "concatenate"]

Rows = tuple[Tensor, ...]
Read = tuple[Rows, list[Entry]]  # the rows, and what was found bad on the way to them


class _Sources:
    """The open sources of one split: which row each sample number is, and the row itself."""

    def __init__(
        self, manifests: Sequence[Manifest], data: DataConfig, split: str, align: int, vocab: int
    ) -> None:
        length = data.sequence_length
        tolerant = data.on_bad == "quarantine"
        self.readers = [BlockReader(m, split, length, align, vocab, tolerant) for m in manifests]
        self.orders = [
            Order(reader.blocks, f"{reader.manifest.hash}:{data.seed}") for reader in self.readers
        ]
        self._windows: dict[int, range] = {}  # of each source, as its reader was told
        # One source needs no mix: its samples are those of the run.
        self.mix = mix_of(data.sources, data.seed) if len(manifests) > 1 else None
        self.substitutes: Substitutes | None = None
        if tolerant:
            self.substitutes = Substitutes(list(data.sources), self.readers, self.orders)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
        """Source, shard and block of each sample number."""
        source, _, shard, block = self._locate(samples)
        return source, shard, block

    def _locate(self, samples: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
        """Source, index in the source, shard and block."""
        source, index = np.zeros_like(samples), samples
        if self.mix is not None:
            source, index = self.mix.locate(samples)
        shard, block = np.empty_like(samples), np.empty_like(samples)
        for number, order in enumerate(self.orders):
            here = source == number
            if not here.any():
                continue
            address = order.locate(index[here])
            shard[here], block[here] = address.shard, address.block
            self._expect(number, index[here], address.shard)
        return source, index, shard, block

    def _expect(self, number: int, index: NDArray[np.int64], shards: NDArray[np.int64]) -> None:
        """Tells a source's reader which windows its rows come from now, and which comes next."""
        order = self.orders[number]
        windows = range(order.window_of(int(index.min())), order.window_of(int(index.max())) + 2)
        if windows != self._windows.get(number):
            self._windows[number] = windows
            near = (shard for window in windows for shard in order.shards_in(window))
            self.readers[number].expect(list(dict.fromkeys([*shards.tolist(), *near])))

    def rows(self, samples: NDArray[np.int64]) -> Read:
        source, index, shard, block = self._locate(samples)
        met: list[Entry] = []
        if self.substitutes is not None:
            met = self.substitutes.replace(samples, source, index, shard, block)
        return read_rows(self.readers, samples, source, shard, block), met

    def condemn(self, entries: list[Entry]) -> None:
        """Takes for bad what a run has found to be."""
        if self.substitutes is not None:
            self.substitutes.condemn(entries)

    def close(self) -> None:
        """Closes the files, and fetches nothing ahead any more."""
        self._windows.clear()
        for reader in self.readers:
            reader.close()


class _Samples(Dataset[Rows]):
    """Sample numbers -> rows. Travels to the workers as a recipe and opens its files there."""

    def __init__(self, data: DataConfig, split: str, align: int, vocab: int):
        self.recipe = (data, split, align, vocab)
        self.hashes: list[str] = []  # of the manifests as the rank found them, for its workers
        self.quarantine: list[Entry] = []
        self._open: _Sources | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def opened(self, manifests: Sequence[Manifest] | None = None) -> _Sources:
        if self._open is None:
            data, split, align, vocab = self.recipe
            manifests = manifests or list(load_sources(data, self.hashes).values())
            for manifest, known in zip(manifests, self.hashes):
                if manifest.hash != known:
                    raise DataError(
                        f"{manifest.folder}: its manifest changed while the run was starting",
                        "all processes of a run read the same data",
                        "start again",
                    )
            self.hashes = [manifest.hash for manifest in manifests]
            self._open = _Sources(manifests, data, split, align, vocab)
            self._open.condemn(self.quarantine)
        return self._open

    def condemn(self, entries: list[Entry]) -> None:
        self.quarantine = entries
        self.opened().condemn(entries)

    def __getitems__(self, samples: list[int]) -> Read | TitansError:
        """The rows of the samples, or the error that reading them met (raised by the consumer:
        on its way through the loader an exception would lose its fields)."""
        try:
            return self.rows(np.asarray(samples, np.int64))
        except TitansError as e:
            return e

    def rows(self, samples: NDArray[np.int64]) -> Read:
        return self.opened().rows(samples)


def read_rows(
    readers: Sequence[BlockReader],
    samples: NDArray[np.int64],
    source: NDArray[np.int64],
    shards: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> Rows:
    """Rows [B, T] as (tokens, labels, positions, loss_mask, samples, source); sample -1: pads."""
    shape = (len(samples), readers[0].sequence_length)
    pad = readers[0].manifest.pad
    tokens = np.full(shape, pad, np.int64)
    labels = np.full(shape, pad, np.int64)
    positions = np.full(shape, -1, np.int64)
    mask = np.zeros(shape, bool)
    for i in np.flatnonzero(samples >= 0):
        row = (tokens[i], labels[i], positions[i], mask[i])
        readers[source[i]].read(int(shards[i]), int(blocks[i]), *row)
    return tuple(torch.from_numpy(a) for a in (tokens, labels, positions, mask, samples, source))


def as_batches(rows: Rows, micro_batch: int) -> list[Batch]:
    """The rows in batches of `micro_batch`."""
    parts = [part.split(micro_batch) for part in rows]
    return [Batch(*fields) for fields in zip(*parts)]


def require_whole_batches(global_batch: int, micro_batch: int, dp_size: int) -> None:
    """Raises ConfigError where the ranks cannot share a step evenly."""
    if global_batch % (dp_size * micro_batch):
        raise ConfigError(
            f"train.global_batch={global_batch}, data-parallel ranks={dp_size}, "
            f"train.micro_batch={micro_batch}",
            "the global batch is a whole number of micro-batches on each rank",
            f"make global_batch a multiple of {dp_size * micro_batch}",
        )


class TrainStream:
    """The training batches of one rank.

        stream = TrainStream(config.data, global_batch=24, micro_batch=2, align=16)
        for micro_batches, state in stream.batches(stream.start()):
            ...                                        # state: resume here, same on all ranks

    `micro_batches` is a list of Batch with `micro_batch` rows each, `global_batch / dp_size` rows
    in all. `rows` gives the rows of a step by its number from 1, where they are not `global_batch`.
    `vocab_size` is the model's (default: the tokenizer's); larger ids raise DataError.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        global_batch: int,
        micro_batch: int,
        align: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        vocab_size: int | None = None,
        split: str = "train",
        rows: Callable[[int], int] | None = None,
    ) -> None:
        require_whole_batches(global_batch, micro_batch, dp_size)
        self.data, self.align = data, align
        self.manifests = load_sources(data)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rows = rows or (lambda step: global_batch)
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._samples = _Samples(data, split, align, vocab_size or self.manifest.vocab_size)
        opened = self._samples.opened(list(self.manifests.values()))
        # Rows of one epoch of each source.
        self.epoch_rows = {name: o.total for name, o in zip(self.manifests, opened.orders)}

    @property
    def manifest(self) -> Manifest:
        """The first source's. Its tokenizer is that of all."""
        return next(iter(self.manifests.values()))

    def start(self) -> State:
        """The state before the first step."""
        return {
            "version": VERSION,
            **self._identity(),
            "tokenizer": self.manifest.tokenizer_hash,
            "seed": self.data.seed,
            "seq_len": self.data.sequence_length,
            "align": self.align,
            "next_sample": 0,
            "skips": [],
            "quarantine": [],
        }

    def _identity(self) -> dict[str, Any]:
        """What is read, and how it is mixed. One source is known by its content alone."""
        if len(self.manifests) == 1:
            return {"manifest": self.manifest.hash}
        return {
            "sources": {
                name: {
                    "manifest": manifest.hash,
                    "weight": [list(point) for point in self.data.sources[name].points],
                }
                for name, manifest in self.manifests.items()
            }
        }

    def load_state(self, saved: State) -> tuple[State, list[str]]:
        """(the state to go on from, the changes accepted: words for the log).

        Raises DataError where the saved state speaks of other sources, weights, manifests, another
        tokenizer, seed, sequence length or alignment, unless `data.allow_changed` is set.
        """
        now = self.start()
        changes = differences(saved, now, self.data.allow_changed)
        kept = {key: saved[key] for key in ("next_sample", "skips", "quarantine")}
        if any("manifest" in change for change in changes):
            kept["quarantine"] = []  # it names members of the old tables
        return {**now, **kept}, changes

    def progress(self, state: State) -> dict[str, float]:
        """Figures of what was read up to `state`, by source: metric -> value. Skipped samples
        count as read."""
        sample, mix = int(state["next_sample"]), self._samples.opened().mix
        figures: dict[str, float] = {}
        if self.data.on_bad == "quarantine":
            bad = members_of(state["quarantine"], self.manifests)
            figures["data/quarantined"] = sum(bad.values())
        figures |= skipped(state)
        if mix is None:
            epochs = {f"data_epochs/{name}": sample / n for name, n in self.epoch_rows.items()}
            return figures | epochs
        counts, asked = mix.counts(sample).tolist(), mix.shares(sample).tolist()
        for (name, rows), count, share in zip(self.epoch_rows.items(), counts, asked):
            figures[f"data_samples/{name}"] = count
            figures[f"data_epochs/{name}"] = count / rows
            figures[f"data_share/{name}"] = count / max(1, sample)
            figures[f"data_share_asked/{name}"] = share
        return figures

    def agreed(self, before: State, after: State, told: list[list[Entry]]) -> State:
        """`after` with the quarantine that all ranks agree on: that of `before`, and what each
        rank met since. Raises DataError where too much of a source would be left out."""
        limit = self.data.max_bad
        quarantine = agreed(before["quarantine"], told, self.manifests, limit)
        return {**after, "quarantine": quarantine}

    def complete(self, state: State, gather: Callable[[Any], Sequence[Any]]) -> State:
        """The state to save: every rank has the whole of it already."""
        return state

    def skip(self, state: State, start: int, stop: int) -> State:
        """The state with the samples [start, stop) left out from now on, or known to have been."""
        return {**state, "skips": with_skip(state["skips"], start, stop)}

    def batches(
        self, state: State, step: int = 1
    ) -> Generator[tuple[list[Batch], State], None, None]:
        """Endless (micro-batches of this rank, state after them), from step `step` on. Closing the
        iterator stops the workers; what they have read ahead is thrown away. The state's quarantine
        gains what this rank met; ranks merge theirs. Raises DataError and NodeError."""
        known: list[Entry] = state["quarantine"]
        self._samples.condemn(known)
        if self.data.workers == 0:
            try:
                for mine, after in self._plan(state, step):
                    rows, met = self._samples.rows(mine)
                    known = merged(known, met)
                    yield as_batches(rows, self.micro_batch), {**after, "quarantine": known}
            finally:
                self._samples.opened().close()
            return
        loaded = start_loader(
            self._samples, self.data.workers, batch_sampler=_Plan(self, state, step)
        )
        for _, after in self._plan(state, step):
            read = next_read(loaded)
            known = merged(known, read[1])
            yield as_batches(read[0], self.micro_batch), {**after, "quarantine": known}

    def _plan(self, state: State, step: int) -> Iterator[tuple[NDArray[np.int64], State]]:
        """This rank's sample numbers, step by step from `step`, and the state after each step."""
        skips = [(int(a), int(b)) for a, b in state["skips"]]
        for number in itertools.count(step):
            rows = self.rows(number)
            per_rank = rows // self.dp_size
            samples, following = take(int(state["next_sample"]), rows, skips)
            state = {**state, "next_sample": following}
            yield samples[self.dp_rank * per_rank : (self.dp_rank + 1) * per_rank], state


class _Plan:
    """The loader's batch sampler: this rank's sample numbers, step by step."""

    def __init__(self, stream: TrainStream, state: State, step: int) -> None:
        self.stream, self.state, self.step = stream, state, step

    def __iter__(self) -> Iterator[list[int]]:
        for samples, _ in self.stream._plan(self.state, self.step):
            yield samples.tolist()
