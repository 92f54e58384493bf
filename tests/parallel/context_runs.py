"""Forward and backward over a chain of context ranks, and in one plain process, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.helpers import config_of, hot_model, labels_of, packed, tokens_like
from titans_pretrain.config import ModelConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.measure.step_benchmark import Collectives
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.context import Link, hand_on, shard

CHUNKS = 16  # of a row: four a rank where there are four ranks

# Forwards (F) and backwards (B) of micro-batches 0, 1, 2.
ORDERS = {
    "FB": "F0 B0 F1 B1 F2 B2",
    "FFBB": "F0 F1 F2 B0 B1 B2",
    "FFBB reversed": "F0 F1 F2 B2 B1 B0",
    "skewed": "F0 F1 B0 F2 B1 B2",
}


def unit(config: ModelConfig) -> int:
    """Tokens in a sixteenth of a row."""
    return -(-4 // config.alignment) * config.alignment


def documents(config: ModelConfig) -> list[list[list[int]]]:
    """Micro-batches of rows of lengths of documents. Ranks meet at u, 2u and 3u quarters."""
    u = unit(config)
    near = config.alignment  # the least that a document can start beside an edge
    return [
        [
            [16 * u],  # one document over all ranks
            [4 * u, 4 * u, 8 * u],  # documents that start at edges
            [4 * u - near, 2 * near, 4 * u - 1, 5 * u + 1],  # just before, just after; pads end it
            [5 * u - 1],  # some ranks' shares are pads alone
        ],
        [[u + 1], [3 * u]],  # whole shares of pads alone
        [[7 * u, 9 * u - 2], [1, 2, 16 * u - 6 * near], [8 * u - near, 8 * u]],
    ]


def micro_batches(config: ModelConfig) -> list[Batch]:
    made = []
    for i, rows in enumerate(documents(config)):
        T = CHUNKS * unit(config)
        positions = packed(rows, config.alignment)
        positions = torch.nn.functional.pad(positions, (0, T - positions.shape[1]), value=-1)
        assert positions.shape[1] == T
        tokens = tokens_like(positions, i)
        none = torch.zeros(len(rows), dtype=torch.int64)
        made.append(Batch(tokens, labels_of(tokens), positions, positions >= 0, none, none))
    return made


@dataclass
class Run:
    """What one rank has after a step; losses and gradients are summed over ranks."""

    loss: float
    gradients: dict[str, Tensor]
    without_gradient: list[str] = field(default_factory=list)
    sent: int = 0  # bytes
    log: list[tuple[str, str, Any]] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)  # of c10d, in forward and backward


def batch_loss(model: TitansLM, batch: Batch) -> Tensor:
    logits, _ = model(batch.tokens, batch.positions, carry=False)
    losses = token_loss(logits, batch.labels)
    return torch.where(batch.loss_mask, losses, 0).sum()


def plain_run(case: str, **more: Any) -> Run:
    config = config_of(case, **more)
    model, batches = hot_model(config), micro_batches(config)
    labels = sum(int(b.loss_mask.sum()) for b in batches)
    total = 0.0
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
    weigh: Callable[[Tensor, Batch, int], Tensor] = lambda loss, batch, labels: loss / labels,
    change: Callable[[Batch, Link], Batch] = lambda batch, link: batch,
    **more: Any,
) -> Run:
    """One step on this rank. weigh: a share's loss from its sum; change: of this rank's share."""
    config = config_of(case, **more)
    model, whole = hot_model(config), micro_batches(config)
    model.recompute = recompute
    hand_on(model, link)
    labels = sum(int(b.loss_mask.sum()) for b in whole)
    batches = [change(shard(b, link.index, link.size), link) for b in whole]
    link.log, link.bytes = [], 0
    losses: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    with Collectives() as operators:
        for act, i in map(tuple, ORDERS[order].split()):
            if act == "F":
                losses[i] = weigh(batch_loss(model, batches[int(i)]), batches[int(i)], labels)
                total += losses[i].detach()
            else:
                losses.pop(i).backward()
    link.drain()
    log, link.log = link.log, None
    without = [n for n, p in model.named_parameters() if p.grad is None]
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(gradients[name])
    dist.all_reduce(total)
    return Run(
        total.item(),
        gradients if link.index == 0 else {},
        without,
        link.bytes,
        log,
        {name: counts["calls"] for name, counts in operators.counted.items()},
    )


def join_all() -> Link:
    """The chain of all ranks of a fresh world."""
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float32)
    return Link.join(range(dist.get_world_size()), torch.device("cpu"), timeout_s=60)


def in_world(steps: Sequence[dict[str, Any]]) -> list[Run]:
    """What each rank of a world runs: one step after another."""
    link = join_all()
    runs = [context_run(link, **step) for step in steps]
    dist.barrier()
    return runs


def worst(run: Run, plain: Run) -> tuple[float, str]:
    """The largest difference of any named gradient relative to its largest entry."""
    assert run.gradients.keys() == plain.gradients.keys()
    off = {
        n: ((g - plain.gradients[n]).abs().max() / plain.gradients[n].abs().max()).item()
        for n, g in run.gradients.items()
    }
    name = max(off, key=off.__getitem__)
    return off[name], name
