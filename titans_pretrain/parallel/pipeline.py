"""Drives a model's micro-batches through Megatron-core's forward-backward schedule.

One schedule for every size: at one pipeline stage it is `forward_backward_no_pipelining`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from titans_pretrain.data.batch import Batch
from titans_pretrain.parallel import compat
from titans_pretrain.phases import phase


@dataclass(frozen=True)
class StepLoss:
    """Sums over this rank's micro-batches, in float64."""

    loss: float  # nats, summed over counted labels
    tokens: int  # counted labels
    by_source: dict[int, tuple[float, int]]  # source index -> (nats, labels)
    penalty: float = 0.0  # summed over counted labels, without its coefficient


Penalty = Callable[[torch.Tensor], torch.Tensor]  # logits [B, T, V] -> [B, T]


class Stage(nn.Module):
    """One pipeline stage as Megatron's schedules see it: a config, an input, a forward.

    penalty: a coefficient and what it multiplies, added to the loss of each label in training.
    """

    def __init__(
        self,
        model: nn.Module,
        token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        penalty: tuple[float, Penalty] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.token_loss, self.penalty = model, token_loss, penalty
        # Megatron reads its schedule switches from a TransformerConfig; its sizes mean nothing.
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=1,
            num_attention_heads=1,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        )
        self.model_type = ModelType.encoder_or_decoder
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Cross entropy of each label [1, B, T], fp32; in training, with a penalty, that too."""
        # The model plans from positions on the host: there they stay.
        logits, _ = self.model(batch.tokens.to(device), batch.positions, carry=False)
        terms = [self.token_loss(logits, batch.labels.to(device))]
        if self.penalty is not None and torch.is_grad_enabled():
            terms.append(self.penalty[1](logits))
        return torch.stack(terms)


class Schedule:
    """Runs the micro-batches of a step on this rank, forward and backward or forward only."""

    def __init__(self, stage: Stage, data_parallel: int, device: torch.device) -> None:
        self.stage, self.data_parallel, self.device = stage, data_parallel, device
        self.calls = 0  # how often Megatron's schedule ran

    def run(
        self, micro_batches: Sequence[Batch], *, tokens_in_step: int, train: bool = True
    ) -> StepLoss:
        """Args:
        micro_batches: this rank's share of the step.
        tokens_in_step: counted labels of the whole step, over all ranks and micro-batches; the
            gradient is that of the mean over them.
        """
        # Megatron divides the returned loss by the number of micro-batches, ZeRO averages over
        # data-parallel ranks: undone here, so that the loss is the mean over tokens_in_step.
        scale = len(micro_batches) * self.data_parallel / max(1, tokens_in_step)
        losses: list[tuple[torch.Tensor, Batch]] = []
        coefficient = 0.0 if self.stage.penalty is None else self.stage.penalty[0]

        def forward_step(batches: Iterator[Batch], stage: nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            with phase("forward"):
                terms = stage(batch, self.device)
                mask = batch.loss_mask.to(self.device)

            def loss(terms: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
                with phase("forward"):
                    # Select, never multiply: a pad's loss may be anything, even not finite.
                    counted = torch.where(mask, terms, torch.zeros_like(terms))
                    losses.append((counted.detach(), batch))
                    nats, *penalty = counted.unbind()
                    total = nats.sum()
                    for term in penalty:
                        total = total + coefficient * term.sum()
                    return total * scale, {}

            return terms, loss

        # Forwards are phases of their own; what is left of a training schedule is backward.
        whole = phase("backward" if train else "forward")
        with whole, compat.cuda_literals(), torch.set_grad_enabled(train):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(micro_batches),
                model=self.stage,
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0].tokens.shape[1],
                micro_batch_size=micro_batches[0].tokens.shape[0],
                forward_only=not train,
            )
        self.calls += 1
        return _totals(losses)


def _totals(losses: list[tuple[torch.Tensor, Batch]]) -> StepLoss:
    by_source: dict[int, tuple[float, int]] = {}
    penalty = 0.0
    for terms, batch in losses:
        rows, *more = terms.double().sum(2).tolist()
        penalty += sum(sum(term) for term in more)
        counts = batch.loss_mask.sum(1).tolist()
        for source, loss, count in zip(batch.source.tolist(), rows, counts, strict=True):
            have = by_source.get(source, (0.0, 0))
            by_source[source] = (have[0] + loss, have[1] + count)
    return StepLoss(
        sum(loss for loss, _ in by_source.values()),
        sum(count for _, count in by_source.values()),
        by_source,
        penalty,
    )
