"""The rows of a validation set: the same rows and labels for any layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.order import validation_blocks
from titans_pretrain.data.shards import BlockReader
from titans_pretrain.data.stream import as_batches, read_rows


def validation_batches(
    manifest: Manifest,
    data: DataConfig,
    *,
    micro_batch: int,
    align: int,
    rows: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """The manifest's validation split, once: every rank yields the same number of batches.

    `rows` > 0 reads so many rows, chosen by the manifest's hash alone; 0 reads all. Missing rows
    of the last batches are pads throughout (sample -1, mask False), so that a mean weighted by
    the mask's tokens is the same for every layout. `source` is 0.
    """
    reader = BlockReader(manifest, "validation", data.sequence_length, align, vocab_size)
    shards, blocks = validation_blocks(reader.blocks, rows, manifest.hash)
    step = dp_size * micro_batch
    missing = -len(shards) % step
    samples = np.concatenate([np.arange(len(shards)), np.full(missing, -1)])
    shards, blocks = (np.pad(a, (0, missing)) for a in (shards, blocks))
    source = np.zeros_like(samples)
    for begin in range(dp_rank * micro_batch, len(samples), step):
        mine = slice(begin, begin + micro_batch)
        read = read_rows([reader], samples[mine], source[mine], shards[mine], blocks[mine])
        yield as_batches(read, micro_batch)[0]
    reader.close()
