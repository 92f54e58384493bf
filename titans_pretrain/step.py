"""One optimizer step: count labels, forward and backward, check finite, reduce, clip, update."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from titans_pretrain.config import ModelConfig, RunConfig
from titans_pretrain.data.batch import Batch, uncounted
from titans_pretrain.errors import DivergedError, TitansError
from titans_pretrain.model.loss import token_loss, z_penalty
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM, initialise
from titans_pretrain.parallel.context import hand_on, shard
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.pipeline import Schedule, Stage, StepLoss, sum_tied
from titans_pretrain.parallel.tensor import vocabulary_loss, vocabulary_penalty
from titans_pretrain.parallel.together import Together
from titans_pretrain.parallel.world import World, context_ranks
from titans_pretrain.parallel.zero import ZeroOptimizer
from titans_pretrain.phases import phase
from titans_pretrain.pieces import build_pieces
from titans_pretrain.run.optim import learning_rate, param_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepReport:
    """What one step did, over all ranks."""

    loss: float  # nats a label
    tokens: int  # labels counted
    grad_norm: float  # before clipping
    lr: float
    by_source: dict[int, float]  # source index -> nats a label
    seconds: dict[str, float]  # this rank's wall time by phase
    z_loss: float = 0.0  # train.z_loss times the mean (log sum exp logits)^2; not part of `loss`


@dataclass(frozen=True)
class Progressed:
    """How far a run has come; what a checkpoint holds beside tensors."""

    step: int  # optimizer steps done
    tokens: int  # labels trained on
    data: dict[str, Any]  # the stream's state: what the next step reads
    validation_loss: float | None = None  # measured at this very step, over all sets
    validation_by_set: dict[str, float] = field(default_factory=dict)  # likewise; name -> loss


def build_model(
    model: ModelConfig, *, seed: int, dtype: torch.dtype, device: torch.device, recompute: bool
) -> TitansLM:
    """Built without memory, placed, then each parameter drawn whole by its name."""
    with torch.device("meta"):
        built = TitansLM(model, dtype=dtype)
    built = built.to_empty(device=device)
    initialise(built, seed)
    built.recompute = recompute
    return built


def _take_any(loss: float) -> str:
    return ""


class TrainStep:
    """The step of a run on this rank: the model, the schedule and the optimizer it goes through."""

    @phase("building")
    def __init__(self, config: RunConfig, layout: Layout, world: World) -> None:
        self.config, self.layout, self.world = config, layout, world
        dtype = DTYPES[config.train.precision]
        self.pieces = build_pieces(
            config.model,
            layout,
            world.rank,
            seed=config.train.seed,
            dtype=dtype,
            device=world.device,
            recompute=config.train.recompute == "blocks",
            sequence_length=config.data.sequence_length,
        )
        self.model = self.pieces.root
        divided = layout.tensor > 1
        loss, penalty = (
            (vocabulary_loss, vocabulary_penalty) if divided else (token_loss, z_penalty)
        )
        z = (config.train.z_loss, penalty) if config.train.z_loss else None
        where = (dtype, layout, config.model.width)
        self.stages = [
            Stage(p.model, loss, *where, z, first=p.first, last=p.last) for p in self.pieces
        ]
        self.schedule = Schedule(self.stages, layout, world.device, world.place.context)
        self.link: Link | None = None
        segments = config.parallel.segments
        if layout.context * segments > 1:
            interleave = config.parallel.interleave
            self.link = Link.join(
                context_ranks(), world.device, world.timeout_s, segments, interleave
            )
            for number, piece in enumerate(self.pieces):
                hand_on(piece.model, self.link, number)
        o = config.optim
        self.groups = param_groups(self.model.named_parameters(), kind, o)
        self.scales = [g["lr_scale"] for g in self.groups]
        place = world.place
        self.optimizer = ZeroOptimizer(
            self.model,
            self.pieces.shards,
            self.groups,
            zero=config.parallel.zero,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            clip=o.clip,
            micro_batch=config.train.micro_batch,
            first=place.tensor == 0,
            repeated=self.pieces.repeated,
            units=[block for p in self.pieces for block in p.model.blocks.values()],
        )
        if config.parallel.zero.stage > 1:
            self.stages[0].run = self.optimizer.engine
        self._together: Together | None = None
        if not layout.whole and config.validation.every and config.log.sample.tokens:
            assert config.model.vocab_size is not None
            self._together = Together.join(self.stages, world, config.model.vocab_size)
        self.tied = config.model.tied_embeddings and layout.pipeline > 1
        # Ranks that hold a layer together see the same rows: one of them counts.
        self.counts_labels = place.tensor == 0 and place.pipeline == 0
        self.counts_loss = place.tensor == 0  # of the last stage: the others have none

    @property
    def whole_model(self) -> TitansLM | Together | None:
        """The model where this rank holds all of it; else, where it takes part, the pieces of all
        ranks as one."""
        return self.pieces.pieces[0].model if self.layout.whole else self._together

    def __call__(
        self,
        micro_batches: Sequence[Batch],
        step: int,
        judge: Callable[[float], str] = _take_any,
    ) -> StepReport:
        """Update number `step` (from 1). Collective.

        Raises DivergedError on every rank if a loss or a gradient is not finite, or if `judge`,
        told the step's loss (nats a label, the same number on every rank), says why it must not be
        learnt from. Then no weight, moment or count has changed, and no gradient is left.
        """
        began = time.perf_counter()
        micro_batches = self._shares(micro_batches)
        sources = len(self.config.data.sources)
        counts = [0.0] * sources
        for batch in micro_batches:
            labels = batch.loss_mask.sum(1).tolist()
            for source, n in zip(batch.source.tolist(), labels, strict=True):
                counts[source] += n * self.counts_labels
        with phase("count"):
            counts = self.world.sum(counts)
        tokens = int(sum(counts))
        sums = self._run(micro_batches, tokens)
        if self.tied:
            sum_tied(self.optimizer.local_gradients())
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        forward_backward = time.perf_counter() - began

        # One small reduction tells every rank the loss and whether all is finite.
        with phase("gradient scan"):
            finite = self._gradients_finite()
            nats = [sums.by_source.get(i, (0.0, 0))[0] for i in range(sources)]
            seen = [n * self.counts_loss for n in (*nats, sums.penalty)]
            *nats, penalty, bad = self.world.sum([*seen, float(not finite)])
        loss = sum(nats) / max(1, tokens)
        if bad or not _finite(loss):
            error = self._diverged(step, loss, micro_batches)
            self.optimizer.drop()
            raise error
        if why := judge(loss):
            self.optimizer.drop()
            raise self._refused(step, loss, why, micro_batches)
        began = time.perf_counter()
        o = self.config.optim
        lr = learning_rate(step, o, self.config.train.steps)
        norm = self.optimizer.step([lr * s for s in self.scales])
        if not _finite(norm):  # each part was finite, their sum was not: DeepSpeed changed nothing
            raise self._diverged(step, loss, micro_batches)
        by_source = {i: n / c for i, (n, c) in enumerate(zip(nats, counts)) if c}
        seconds = {
            "forward_backward": forward_backward,
            "optimizer": time.perf_counter() - began,
        }
        z_loss = self.config.train.z_loss * penalty / max(1, tokens)
        return StepReport(loss, tokens, norm, lr, by_source, seconds, z_loss)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """(nats a label, labels) over all ranks' batches; every rank passes equally many.

        Raises on every rank what reading the batches raises on one.
        """
        nats = labels = 0.0
        rest = iter(batches)
        self.model.eval()
        while group := self._read(rest):
            # A whole round of the stages, filled up with rows that count nothing.
            group += [uncounted(group[-1])] * (self.layout.pipeline - len(group))
            sums = self._run(self._shares(group), 1, train=False)
            nats, labels = nats + sums.loss, labels + sums.tokens
        self.model.train()
        nats, labels = self.world.sum([nats * self.counts_loss, labels * self.counts_loss])
        return nats / max(1.0, labels), int(labels)

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """The next batches, at most one a stage, once every rank has read its own: ranks wait for
        one another inside a forward, where none may be missing."""
        failure: TitansError | None = None
        group: list[Batch] = []
        try:
            group = list(itertools.islice(batches, self.layout.pipeline))
        except TitansError as e:
            failure = e
        self.world.raise_any(failure)
        return group

    def _shares(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This context rank's columns of the rows' segments, segment after segment."""
        link = self.link
        if link is None:
            return batches
        stretches = [shard(b, i, link.segments) for b in batches for i in range(link.segments)]
        return [shard(stretch, link.index, link.size) for stretch in stretches]

    def _run(self, batches: Sequence[Batch], tokens: int, *, train: bool = True) -> StepLoss:
        sums = self.schedule.run(batches, tokens_in_step=tokens, train=train)
        if self.link is not None:
            self.link.drain()
        return sums

    def _gradients_finite(self) -> bool:
        """One pass over this rank's gradients, before they are mixed with other ranks'."""
        gradients = [g for _, g in self.optimizer.local_gradients()]
        if not gradients:  # ZeRO 2 and 3 look at them when they are reduced
            return True
        norms = torch.stack([n.float() for n in torch._foreach_norm(gradients)])
        return bool(torch.isfinite(norms).all())

    def _diverged(self, step: int, loss: float, batches: Sequence[Batch]) -> DivergedError:
        bad = [name for name, g in self.optimizer.local_gradients() if not torch.isfinite(g).all()]
        mine = {
            "rank": self.world.rank,
            "tensors": bad,
            "samples": [s for b in batches for s in b.samples.tolist()],
        }
        guilty = [r for r in self.world.gather_objects(mine) if r["tensors"]] or [mine]
        parts = [
            f"rank {r['rank']}: gradients of {_some(r['tensors']) or 'no single tensor'}; "
            f"samples {_some([str(s) for s in r['samples']])}"
            for r in guilty
        ]
        return DivergedError(
            f"step {step}: loss {loss}; " + " | ".join(parts),
            "loss and gradients are finite; nothing was updated with these",
            "look at these samples (titans-pretrain inspect), lower optim.lr, or resume from the "
            "last checkpoint",
        )

    def _refused(self, step: int, loss: float, why: str, batches: Sequence[Batch]) -> DivergedError:
        mine = [s for b in batches for s in b.samples.tolist()]
        samples = [str(s) for told in self.world.gather_by_data(mine) for s in told]
        return DivergedError(
            f"step {step}: loss {loss}, {why}; samples {_some(samples)}",
            "the loss does not jump; nothing was updated with these",
            "look at these samples (titans-pretrain inspect), lower optim.lr, or let the run pass "
            "them by: divergence.on=skip or rewind",
        )


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


def _some(items: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
