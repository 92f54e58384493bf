"""A tiny run for tests of the step: config, random packed documents, and one plain process."""

from __future__ import annotations

from typing import Any

import torch

from titans_pretrain.config import RunConfig, parse_config
from titans_pretrain.data.batch import Batch, concatenate
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.run.optim import learning_rate, param_groups
from titans_pretrain.step import build_model

VOCAB, T = 61, 32


def tiny_config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "folder": "unused",
        "model": {
            "variant": "transformer",
            "blocks": 2,
            "width": 32,
            "heads": 2,
            "mlp_width": 48,
            "vocab_size": VOCAB,
            "segment": 16,
            "persistent_tokens": 2,
            "memory": {"chunk": 8, "expansion": 2},
        },
        "data": {"sources": {"made": {"path": "unused"}}, "sequence_length": T},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "clip": 0.5},
        "train": {"steps": 20, "global_batch": 8, "micro_batch": 2, "device": "cpu", "threads": 1},
    }
    for path, value in changes.items():
        *sections, leaf = path.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return parse_config(tree, "tiny")


def random_row(sample: int, align: int = 8, length: int = T) -> tuple[torch.Tensor, ...]:
    """One row: documents of random lengths from the grid, with pads between them. Every fourth row
    has a ragged tail: pads end it that begin off the grid."""
    g = torch.Generator().manual_seed(1000 + sample)
    tokens = torch.randint(4, VOCAB, (length,), generator=g)
    labels = torch.randint(4, VOCAB, (length,), generator=g)
    positions = torch.full((length,), -1)
    longest = max(T, 5 * length // 8)  # memories get chaotic on long ones
    start, end = 0, length - 3 * (sample % 4 == 3)
    while start < end:
        n = int(torch.randint(1, longest + 1, (1,), generator=g))
        n = min(n, end - start)
        positions[start : start + n] = torch.arange(n)
        labels[start : start + n - 1] = tokens[start + 1 : start + n]
        start += -(-n // align) * align
    mask = positions >= 0
    mask[:-1] &= positions[1:] != 0
    tokens[positions < 0] = 3
    return tokens, labels, positions, mask


def batch_of(samples: list[int], align: int = 8, length: int = T) -> Batch:
    rows = [random_row(s, align, length) for s in samples]
    tokens, labels, positions, mask = (torch.stack(column) for column in zip(*rows, strict=True))
    zeros = torch.zeros(len(samples), dtype=torch.int64)
    return Batch(tokens, labels, positions, mask, torch.tensor(samples), zeros)


def micro_batches(config: RunConfig, step: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's slice of step's samples, cut into micro-batches."""
    total, micro = config.train.global_batch, config.train.micro_batch
    per_rank = total // ranks
    first = step * total + rank * per_rank
    shape = (config.model.memory.chunk, config.data.sequence_length)
    samples = [list(range(i, i + micro)) for i in range(first, first + per_rank, micro)]
    return [batch_of(some, *shape) for some in samples]


class PlainRun:
    """The same training in one process: plain model, torch AdamW, one batch, no engine."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model: TitansLM = build_model(
            config.model,
            seed=config.train.seed,
            dtype=torch.float32,
            device=torch.device("cpu"),
            recompute=False,
        )
        o = config.optim
        self.adamw = torch.optim.AdamW(
            param_groups(self.model.named_parameters(), kind, o),
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
        )

    def step(self, step: int) -> tuple[float, float, dict[str, torch.Tensor]]:
        """Update `step` (from 1): (loss, gradient norm, every gradient before clipping)."""
        batch = concatenate(micro_batches(self.config, step, 0, 1))
        logits, _ = self.model(batch.tokens, batch.positions)
        loss = token_loss(logits, batch.labels)[batch.loss_mask].mean()
        z = logits[batch.loss_mask].exp().sum(-1).log().square().mean()
        self.adamw.zero_grad()
        (loss + self.config.train.z_loss * z).backward()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        for group in self.adamw.param_groups:
            rate = learning_rate(step, self.config.optim, self.config.train.steps)
            group["lr"] = rate * group["lr_scale"]
        self.adamw.step()
        return loss.item(), float(norm), gradients

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def moments(self) -> dict[str, dict[str, torch.Tensor]]:
        state = self.adamw.state
        return {
            n: {k: state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")}
            for n, p in self.model.named_parameters()
        }
