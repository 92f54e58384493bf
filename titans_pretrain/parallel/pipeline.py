"""Drives a model's micro-batches through Megatron-core's forward-backward schedule.

One schedule for every size: without pipeline stages it is `forward_backward_no_pipelining`, with
them 1F1B (arXiv 2006.09503), or its interleaved form (arXiv 2104.04473).
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titans_pretrain.data.batch import Batch
from titans_pretrain.memory.onto import onto
from titans_pretrain.parallel import compat
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.megatron import (
    ModelType,
    TransformerConfig,
    get_forward_backward_func,
    parallel_state,
)
from titans_pretrain.phases import phase

logger = logging.getLogger("titans_pretrain.parallel.pipeline")


@dataclass(frozen=True)
class StepLoss:
    """Sums over this rank's micro-batches, in float64."""

    loss: float  # nats, summed over counted labels
    tokens: int  # counted labels
    by_source: dict[int, tuple[float, int]]  # source index -> (nats, labels)
    penalty: float = 0.0  # summed over counted labels, without its coefficient


TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits, labels -> [B, T]
Penalty = Callable[[torch.Tensor], torch.Tensor]  # logits [B, T, V] -> [B, T]


class Stage(nn.Module):
    """A piece of the model as Megatron's schedules see it: a config, an input, a forward.

    Args:
        model: (tokens or hidden states [B, T, D], positions [B, T], carry=False) -> (logits or
            hidden states, None).
        layout: degrees; width: D.
        penalty: a coefficient and what it multiplies, added to each label's loss in training.
    """

    def __init__(
        self,
        model: nn.Module,
        token_loss: TokenLoss,
        dtype: torch.dtype,
        layout: Layout,
        width: int,
        penalty: tuple[float, Penalty] | None = None,
        *,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.token_loss, self.penalty = model, token_loss, penalty
        self.first, self.last = first, last
        self.run: Callable[..., Any] = model  # ZeRO 2 and 3 put their engine in its place
        parallel = layout.parallel
        interleaved = parallel.interleave > 1
        # Megatron reads its schedule's switches, and the width, from a TransformerConfig; its other
        # sizes mean nothing.
        self.config = TransformerConfig(
            num_layers=layout.pieces,
            hidden_size=width,
            num_attention_heads=parallel.tensor,
            tensor_model_parallel_size=parallel.tensor,
            sequence_parallel=parallel.sequence,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.interleave if interleaved else None,
            # Batched exchanges between two interleaved stages are silently wrong (Megatron-LM
            # issues 750 and 1450).
            batch_p2p_comm=not interleaved,
            overlap_p2p_comm=interleaved,
            # Megatron: "to work around a bug in older version of PyTorch". The received tensor is
            # waited for on the stream in any case.
            batch_p2p_sync=False,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        )
        self.model_type = ModelType.encoder_or_decoder
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Of the last piece the cross entropy of each label [1, B, T], fp32; in training, with a
        penalty, that too. Of the others hidden states [T, B, D], as Megatron sends them."""
        if self.first:
            x = onto(batch.tokens, device)
        else:
            assert self.input is not None
            x = self.input.transpose(0, 1)
        # The model plans from positions on the host: there they stay.
        x, _ = self.run(x, batch.positions, carry=False)
        if not self.last:
            return x.transpose(0, 1).contiguous()
        terms = [self.token_loss(x, onto(batch.labels, device))]
        if self.penalty is not None and torch.is_grad_enabled():
            terms.append(self.penalty[1](x))
        return torch.stack(terms)


class Schedule:
    """Runs the micro-batches of a step on this rank, forward and backward or forward only.

    Args:
        stages: the pieces of the model that this rank holds, in order.
        context_index: this rank's place among those that share its rows.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        layout: Layout,
        device: torch.device,
        context_index: int = 0,
    ) -> None:
        self.stages, self.layout, self.device = list(stages), layout, device
        # Forwards before the first backward; None: in Megatron's order, which is 0 for one stage.
        self.ahead = forwards_before_backward(layout, context_index)
        if layout.parallel.order == "skewed" and device.type == "cuda" and dist.get_rank() == 0:
            logger.warning(
                "parallel.order=skewed on CUDA: NCCL's sends may hold up the device until they are "
                "received, the more so with CUDA_DEVICE_MAX_CONNECTIONS=1 (now %s); then this "
                "order hangs; parallel.order=FB and FFBB do not",
                os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "unset"),
            )
        self.calls = 0  # how often Megatron's schedule ran

    def run(
        self, micro_batches: Sequence[Batch], *, tokens_in_step: int, train: bool = True
    ) -> StepLoss:
        """Args:
            micro_batches: this rank's share of the step.
            tokens_in_step: counted labels of the whole step, over all ranks and micro-batches; the
                gradient is that of the mean over them.
        Returns:
            What the last piece saw; nothing on ranks without it.
        """
        # Megatron divides the returned loss by the number of micro-batches and multiplies it by the
        # context ranks, ZeRO averages over data-parallel and context ranks: undone here, so that
        # the loss is the mean over tokens_in_step.
        scale = len(micro_batches) * self.layout.data_parallel / max(1, tokens_in_step)
        losses: list[tuple[torch.Tensor, Batch]] = []
        penalty = self.stages[-1].penalty
        coefficient = 0.0 if penalty is None else penalty[0]

        def forward_step(batches: Iterator[Batch], stage: nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            with phase("forward"):
                terms = stage(batch, self.device)

            def loss(terms: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
                with phase("forward"):
                    mask = onto(batch.loss_mask, self.device)
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
        interleaved = len(self.stages) > 1
        batches = [iter(micro_batches) for _ in self.stages]
        with whole, compat.cuda_literals(), torch.set_grad_enabled(train):
            drive = get_forward_backward_func()
            if train and self.ahead is not None:
                drive = partial(forwards_ahead, self.ahead)
            drive(
                forward_step_func=forward_step,
                data_iterator=batches if interleaved else batches[0],
                model=self.stages if interleaved else self.stages[0],
                num_microbatches=len(micro_batches),
                # Megatron divides it by the context ranks; these rows are divided already.
                seq_length=micro_batches[0].tokens.shape[1] * self.layout.context,
                micro_batch_size=micro_batches[0].tokens.shape[0],
                forward_only=not train,
            )
        self.calls += 1
        return _totals(losses)


def forwards_before_backward(layout: Layout, context_index: int) -> int | None:
    """How many forwards a context rank is ahead of its backwards; None where Megatron decides.

    skewed: 1F1B with the context rank as if it were a stage; the last rank's first backward is the
    first that anyone waits for (the wavefront's skew is paid once a step).
    """
    order = layout.parallel.order
    if order == "FFBB":
        return layout.micro_batches * layout.parallel.segments
    return layout.context - 1 - context_index if order == "skewed" else None


def forwards_ahead(
    ahead: int,
    *,
    forward_step_func: Callable[..., tuple[torch.Tensor, Any]],
    data_iterator: Iterator[Batch],
    model: Stage,
    num_microbatches: int,
    **others: Any,
) -> None:
    """Megatron's schedule of one stage, with each backward `ahead` forwards behind its own."""
    waiting: deque[torch.Tensor] = deque()
    context = parallel_state.get_context_parallel_world_size()
    for _ in range(num_microbatches):
        terms, loss = forward_step_func(data_iterator, model)
        waiting.append(loss(terms)[0] * context / num_microbatches)
        if len(waiting) > ahead:
            torch.autograd.backward(waiting.popleft())
    while waiting:
        torch.autograd.backward(waiting.popleft())


def sum_tied(gradients: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Collective over the first and the last stage. Sums the gradients of a tied embedding and of
    the head that is its copy, in place."""
    if not parallel_state.is_rank_in_embedding_group():
        return
    for path, gradient in gradients:
        if path.endswith(("embedding.weight", "head.weight")):
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())


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
