"""Batch: what one forward-backward reads, and its hash in global sample order.

Shape letters: B rows of a micro-batch, T tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, each document padded to the run's alignment; CPU tensors.

    A document starts where positions == 0 and at a multiple of the alignment; a document longer
    than the row is cut, and its next part starts as a document of its own in the next block.
    """

    tokens: Tensor  # [B, T] int64; pads hold the pad id
    labels: Tensor  # [B, T] int64; next token of the same document, also beyond the row's end
    positions: Tensor  # [B, T] int64; position in the document (part); -1 at pads
    loss_mask: Tensor  # [B, T] bool; True where the label counts
    samples: Tensor  # [B] int64; global sample numbers; -1 for a row that only fills a batch
    source: Tensor  # [B] int64; index into the config's sources


def batch_hash(batches: Iterable[Batch]) -> str:
    """sha256 (hex) over tokens, labels, document starts and mask, in order of sample numbers.

    Equal for any split of the same samples over ranks and micro-batches. Filling rows
    (samples == -1) do not count.
    """
    rows: list[tuple[int, bytes]] = []
    for batch in batches:
        starts = batch.positions == 0
        for i, sample in enumerate(batch.samples.tolist()):
            if sample >= 0:
                parts = (batch.tokens[i], batch.labels[i], starts[i], batch.loss_mask[i])
                rows.append((sample, b"".join(p.contiguous().numpy().tobytes() for p in parts)))
    digest = hashlib.sha256()
    for sample, content in sorted(rows):
        digest.update(sample.to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def concatenate(batches: list[Batch]) -> Batch:
    """The rows of several batches as one."""
    fields = Batch.__dataclass_fields__
    return Batch(**{name: torch.cat([getattr(b, name) for b in batches]) for name in fields})


def uncounted(batch: Batch) -> Batch:
    """The same rows as ones that only fill a batch."""
    return replace(
        batch,
        loss_mask=torch.zeros_like(batch.loss_mask),
        samples=torch.full_like(batch.samples, -1),
    )
