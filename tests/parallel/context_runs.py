"""Forward and backward over a chain of context ranks, and in one plain process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.model.helpers import config_of, hot_model, labels_of, packed, tokens_like
from titans_pretrain.config import ModelConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.measure.step_benchmark import Collectives
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.context import hand_on, shard
from titans_pretrain.parallel.link import Link

CPU = torch.device("cpu")
Rows = list[list[int]]  # lengths of the documents of each row

# Forwards (F) and backwards (B) of micro-batches 0, 1, 2.
ORDERS = {
    "FB": "F0 B0 F1 B1 F2 B2",
    "FFBB": "F0 F1 F2 B0 B1 B2",
    "FFBB reversed": "F0 F1 F2 B2 B1 B0",
    "skewed": "F0 F1 B0 F2 B1 B2",
}


def model_config(case: str) -> ModelConfig:
    """Four heads; narrower ones are so sensitive that the order of rows alone moves gradients."""
    return config_of(case, width=32, heads=4, mlp_width=24)


def unit(config: ModelConfig) -> int:
    """Tokens in a sixteenth of a row: a chunk, or some."""
    return -(-4 // config.alignment) * config.alignment


def documents(config: ModelConfig) -> list[Rows]:
    """Three micro-batches. Two ranks meet at 8 units of 16, four also at 4 and 12."""
    u = unit(config)
    near = config.alignment  # the least that a document can start beside an edge
    return [
        [
            [16 * u],  # one document over all ranks
            [4 * u, 4 * u, 8 * u],  # documents that start at edges
            [4 * u - near, 2 * near, 4 * u - 1, 5 * u + 1],  # just before, just after; pads end it
            [5 * u - 1],  # some ranks' shares of the row are pads alone
        ],
        [[u + 1], [3 * u]],  # some ranks' shares are pads alone
        [[7 * u, 9 * u - 2], [1, 2, 16 * u - 6 * near], [8 * u - near, 8 * u]],
    ]


def micro_batches(
    config: ModelConfig, rows: list[Rows] | None = None, units: int = 16
) -> list[Batch]:
    """Batches whose rows have so many units, of documents padded to the alignment."""
    made, T = [], units * unit(config)
    for i, lengths in enumerate(rows or documents(config)):
        positions = packed(lengths, config.alignment)
        assert positions.shape[1] <= T
        positions = F.pad(positions, (0, T - positions.shape[1]), value=-1)
        tokens, none = tokens_like(positions, i), torch.zeros(len(lengths), dtype=torch.int64)
        made.append(Batch(tokens, labels_of(tokens), positions, positions >= 0, none, none))
    return made


@dataclass
class Run:
    """What one rank has after a step; losses and gradients are sums over the ranks."""

    loss: float
    gradients: dict[str, Tensor]  # on rank 0
    without_gradient: list[str] = field(default_factory=list)
    sent: int = 0  # bytes
    log: list[tuple[str, str, Any]] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)  # of c10d, in forward and backward


def batch_loss(model: TitansLM, batch: Batch) -> Tensor:
    logits, _ = model(batch.tokens, batch.positions, carry=False)
    losses = token_loss(logits, batch.labels)
    return torch.where(batch.loss_mask, losses, 0).sum()


def count_labels(batches: Sequence[Batch]) -> int:
    return sum(int(b.loss_mask.sum()) for b in batches)


def built(config: ModelConfig, dtype: torch.dtype) -> TitansLM:
    return hot_model(config).to(dtype)


def plain_run(case: str, rows: list[Rows] | None = None, dtype: torch.dtype = torch.float64) -> Run:
    config = model_config(case)
    model, batches = built(config, dtype), micro_batches(config, rows)
    labels, total = count_labels(batches), 0.0
    for batch in batches:
        loss = batch_loss(model, batch) / labels
        loss.backward()
        total += loss.item()
    return Run(total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def context_run(
    link: Link,
    case: str,
    order: str = "FB",
    recompute: bool = False,
    rows: list[Rows] | None = None,
    dtype: torch.dtype = torch.float64,
    count: bool = False,
    blocking: bool = False,
    weigh: Callable[[Tensor, Batch, int], Tensor] | None = None,
) -> Run:
    """One step on this rank. count: c10d's operators; blocking: each send ends when it is received,
    as on one stream of a device; weigh: a share's loss, from its sum and the step's labels."""
    config = model_config(case)
    model, whole = built(config, dtype), micro_batches(config, rows)
    model.recompute = recompute
    hand_on(model, link)
    labels = count_labels(whole)
    shares = [shard(b, link.index, link.size) for b in whole]
    link.log, link.bytes = [], 0
    losses: dict[int, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    counted: Collectives | None = Collectives() if count else None
    watch: AbstractContextManager[Any] = counted or nullcontext()
    if blocking:
        watch = mock.patch.object(dist, "isend", _blocking_send)
    acts = [(act[0], int(act[1:])) for act in ORDERS[order].split()]
    with watch:
        for act, i in acts:
            if i >= len(shares):
                continue
            if act == "F":
                loss = batch_loss(model, shares[i])
                losses[i] = loss / labels if weigh is None else weigh(loss, shares[i], labels)
                total += losses[i].detach()
            else:
                losses.pop(i).backward()
    link.drain()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    run = Run(0.0, reduced(model), without, link.bytes, link.log)
    if counted is not None:
        run.operators = set(counted.counted)
    dist.all_reduce(total)
    run.loss = total.item()
    return run


def _blocking_send(buffer: Tensor, target: int, group: Any) -> Any:
    work = dist.distributed_c10d.isend(buffer, target, group=group)
    assert work is not None
    work.wait()
    return mock.Mock()  # gloo's hangs where it is waited for twice


def reduced(model: TitansLM) -> dict[str, Tensor]:
    """Every gradient, summed over the world; on rank 0 alone."""
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        dist.all_reduce(gradients[name])
    return gradients if dist.get_rank() == 0 else {}


def join() -> Link:
    """The chain of all ranks of a fresh world."""
    dist.init_process_group("gloo")
    return Link.join(range(dist.get_world_size()), CPU, timeout_s=60)


def in_world(steps: dict[str, dict[str, Any]]) -> dict[str, Run]:
    """What a rank of a world runs: one step after another."""
    link = join()
    runs = {name: context_run(link, **step) for name, step in steps.items()}
    dist.barrier()
    return runs


def worst(run: Run, plain: Run) -> tuple[float, str]:
    """The largest difference of any named gradient relative to its largest entry."""
    assert run.gradients.keys() == plain.gradients.keys()
    off = {}
    for n, right in plain.gradients.items():
        largest = right.abs().max().clamp(min=1e-300)  # one of zeros has to be zeros
        off[n] = ((run.gradients[n] - right).abs().max() / largest).item()
    assert all(x == x for x in off.values()), off
    name = max(off, key=off.__getitem__)
    return off[name], name


def message_bytes(config: ModelConfig, rows: int, before: int, wide: int, narrow: int) -> int:
    """What one edge of the chain sees of one micro-batch in one direction, by arithmetic.

    before: tokens of a row on this side of the edge. wide: bytes of a number of memory and
    convolutions; narrow: of keys and values.
    """
    D, H, d, m = config.width, config.heads, config.head_width, config.memory
    G, tail, kv = config.segment, 3 * D, (config.kv_heads or H) * d
    hidden = m.expansion * d
    widths = [d, *[hidden] * (m.depth - 1), d]
    weights = H * sum(a * o for a, o in pairwise(widths))
    window = config.attention_window
    keys = 2 * kv * (before if window is None else min(window - 1, before)) * narrow
    memory = (3 * tail + 2 * weights) * wide
    if config.variant == "transformer":
        numbers = keys
    elif config.variant == "lmm":
        numbers = memory
    elif config.variant == "mac":
        pool = {"pool1": 1, "pool2": 2, "learned": None}[m.retrieved]
        slots = G + (G // pool if pool else 0)
        numbers = memory + (weights + D) * wide + 2 * kv * slots * narrow
        numbers += tail * wide if pool else 0  # of the queries of X
    else:
        numbers = memory + keys
    return rows * config.blocks * numbers
