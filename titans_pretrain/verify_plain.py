"""Training in one process, which `verify` holds a layout against: the plain model, torch's AdamW.

It knows nothing of parallel/: no engine, no plan, no shard. It is made to need little memory: rows
are computed one by one, and what is kept of a run lies in the host's memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig, RunConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.model.loss import token_loss, z_penalty
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM, draw, map_state
from titans_pretrain.run.optim import learning_rate, param_groups


@dataclass(frozen=True)
class Step:
    loss: float  # nats a label
    grad_norm: float  # before clipping


@dataclass(frozen=True)
class Trained:
    """What one run has come to; tensors by parameter, in float32 on the CPU."""

    steps: list[Step]
    gradient: dict[str, Tensor]  # of the first step, before clipping; 0 where there is none
    weights: dict[str, Tensor]  # after the last step
    # Of each entry the least gradient of all steps but 0, relative to the largest entry of that
    # step; inf where it is always 0.
    faintest: dict[str, Tensor]


def train_plain(
    config: RunConfig,
    device: torch.device,
    steps: Sequence[Sequence[Batch]],
    *,
    changed: float = 0.0,
    recompute: bool = False,
) -> Trained:
    """Trains on the rows of each of the steps.

    Args:
        changed: by so much of themselves the first weights are changed, at random.
        recompute: keep only each block's input for backward.
    """
    run = PlainRun(config, device, changed, recompute)
    taken: list[Step] = []
    gradient: dict[str, Tensor] = {}
    faintest: dict[str, Tensor] = {}
    for number, batches in enumerate(steps, 1):
        loss = run.backward(batches)
        if number == 1:
            gradient = {n: _kept(_gradient(p)) for n, p in run.model.named_parameters()}
        for name, p in run.model.named_parameters():
            share = _shares(_gradient(p))
            faintest[name] = share.minimum(faintest[name]) if name in faintest else share
        taken.append(Step(loss, run.update(number)))
    weights = {n: _kept(p.detach()) for n, p in run.model.named_parameters()}
    return Trained(taken, gradient, weights, faintest)


def first_weight(
    model: ModelConfig, name: str, shape: Sequence[int], seed: int, changed: float = 0.0
) -> Tensor:
    """A parameter before the first step, whole, in float32 on the CPU."""
    weight = draw(model, name, tuple(shape), seed)
    if changed:
        chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight *= 1 + changed * torch.randn(weight.shape, generator=chance)
    return weight


class PlainRun:
    """The plain model and its AdamW; a step is `backward` of its rows, then `update`."""

    def __init__(
        self, config: RunConfig, device: torch.device, changed: float, recompute: bool
    ) -> None:
        self.config, self.device = config, device
        with torch.device("meta"):
            model = TitansLM(config.model, dtype=torch.float32)
        self.model = model.to_empty(device=device)
        self.model.recompute = recompute
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(first_weight(config.model, name, p.shape, config.train.seed, changed))
        o = config.optim
        groups = param_groups(self.model.named_parameters(), kind, o)
        self.adamw = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def backward(self, batches: Sequence[Batch]) -> float:
        """Leaves the gradient of the loss of all rows in the parameters; nats a label."""
        counted = max(1, sum(int(batch.loss_mask.sum()) for batch in batches))
        self.adamw.zero_grad()
        nats = 0.0
        for row in _rows(batches):
            state, segments = None, self.config.parallel.segments
            for i, (tokens, labels, positions, mask) in enumerate(_segments(row, segments), 1):
                more = i < segments
                logits, state = self.model(tokens.to(self.device), positions, state, carry=more)
                # What one segment leaves the next starts from, without its history.
                state = map_state(state, Tensor.detach)
                mask = mask.to(self.device)
                loss = token_loss(logits, labels.to(self.device))[mask].sum() / counted
                nats += loss.item()
                if self.config.train.z_loss:
                    penalty = z_penalty(logits)[mask].sum() / counted
                    loss = loss + self.config.train.z_loss * penalty
                loss.backward()
        return nats

    def update(self, number: int) -> float:
        """Clips, and takes step `number` (from 1); the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        rate = learning_rate(number, self.config.optim, self.config.train.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.adamw.step()
        return float(norm)


Row = tuple[Tensor, ...]  # tokens, labels, positions, loss_mask: [1, T] each


def _rows(batches: Sequence[Batch]) -> Iterator[Row]:
    for b in batches:
        columns = (b.tokens, b.labels, b.positions, b.loss_mask)
        yield from zip(*(column.split(1) for column in columns), strict=True)


def _segments(row: Row, segments: int) -> Iterator[Row]:
    """Equal stretches of the row, one after the other."""
    return zip(*(column.chunk(segments, dim=1) for column in row), strict=True)


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _shares(gradient: Tensor) -> Tensor:
    """Each entry relative to the largest; inf for 0."""
    size = gradient.abs()
    share = (size / size.max()).masked_fill(size == 0, torch.inf)
    return _kept(share)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
