"""Made-up training data, and the clock: what benchmarks and checks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans_pretrain.data.batch import Batch

if TYPE_CHECKING:
    from titans_pretrain.config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def made_row(config: RunConfig, sample: int) -> tuple[Tensor, ...]:
    """Documents of random lengths from the chunk grid, pads between them. Three tokens in four
    are a fixed function of the one before, so that there is something to learn."""
    g = torch.Generator().manual_seed(1000 + sample)
    length, vocab = config.data.sequence_length, config.model.vocab_size or 0
    chunk = config.model.memory.chunk
    text = torch.randint(4, vocab, (length + 1,), generator=g).tolist()
    bound = (torch.rand(length + 1, generator=g) < 0.75).tolist()
    for t in range(1, length + 1):
        text[t] = (5 * text[t - 1] + 7) % (vocab - 4) + 4 if bound[t] else text[t]
    tokens, labels = torch.tensor(text[:-1]), torch.tensor(text[1:])
    positions = torch.full((length,), -1)
    start = 0
    while start < length:
        n = min(int(torch.randint(1, length // 2, (), generator=g)), length - start)
        positions[start : start + n] = torch.arange(n)
        start += -(-n // chunk) * chunk
    mask = positions >= 0
    mask[:-1] &= positions[1:] == positions[:-1] + 1  # the last token of a document has no label
    tokens[positions < 0] = 3
    return tokens, labels, positions, mask


def made_batches(config: RunConfig, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    """The micro-batches of `step` (from 1) for one of `ranks`."""
    total, micro = config.train.global_batch, config.train.micro_batch
    mine = total // ranks
    begin = step * total + rank * mine
    batches = []
    for first in range(begin, begin + mine, micro):
        samples = list(range(first, first + micro))
        columns = zip(*(made_row(config, s) for s in samples), strict=True)
        tokens, labels, positions, mask = (torch.stack(c) for c in columns)
        source = torch.zeros(micro, dtype=torch.int64)
        batches.append(Batch(tokens, labels, positions, mask, torch.tensor(samples), source))
    return batches


def timed(act: Callable[[], Any], device: str, count: int) -> tuple[float, int | None]:
    """(seconds a call after two to warm up, peak bytes allocated on the device)."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):
        act()
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(count):
        act()
    wait()
    seconds = (time.perf_counter() - began) / count
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one square matrix product: what this machine does at best, near enough."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds, _ = timed(lambda: torch.mm(a, b, out=out), device.type, 5)
    return 2.0 * n**3 / seconds
