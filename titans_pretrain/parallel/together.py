"""The divided model as one, for whoever calls it on rank 0 as if it were whole: to write samples.

Each call goes through the pieces in order, on all ranks that hold one; each rank keeps its part of
the streaming state. Context ranks hold equal pieces: the first compute whole rows alone. Under
ZeRO-3 every rank takes part, for a forward gathers weights from all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titans_pretrain.parallel import compat
from titans_pretrain.parallel.context import whole_rows
from titans_pretrain.parallel.group import Group
from titans_pretrain.parallel.layout import Place
from titans_pretrain.parallel.megatron import parallel_state
from titans_pretrain.parallel.megatron import tensor_parallel as megatron
from titans_pretrain.parallel.pipeline import Stage
from titans_pretrain.parallel.world import World

State = list[Any]  # of each piece that this rank holds


class Together(nn.Module):
    """(tokens [B, T], positions [B, T], state) -> (logits [B, T, V], state), as TitansLM.

    On rank 0 it is called inside `with leading():`; all other ranks of the group are in `follow()`
    meanwhile. Computes without gradients.

    Args:
        stages: the pieces that this rank holds, in order.
        vocabulary: V.
    """

    def __init__(
        self, stages: Sequence[Stage], world: World, group: Group, vocabulary: int
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.layout, self.device, self.group = world.layout, world.device, group
        self.place, self.vocabulary = world.place, vocabulary

    @staticmethod
    def join(stages: Sequence[Stage], world: World, vocabulary: int) -> Together | None:
        """Where this rank takes part. Collective over all ranks."""

        def takes_part(place: Place) -> bool:
            if world.layout.parallel.zero.stage == 3:
                return True
            return place.data == 0 and place.context == 0

        group = Group.join(world, takes_part)
        return None if group is None else Together(stages, world, group, vocabulary)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0. The others follow until the block ends."""
        with self._whole_rows():
            try:
                yield
            finally:
                self.group.tell()

    def follow(self) -> None:
        """On the other ranks: goes along with each call of rank 0, until it has led."""
        state: State | None = None
        with self._whole_rows():
            self.eval()
            try:
                while (call := self.group.tell()) is not None:
                    tokens, positions, goes_on = call
                    _, state = self._compute(tokens, positions, state if goes_on else None)
            finally:
                self.train()

    def forward(
        self, tokens: Tensor, positions: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """On rank 0; positions on the CPU."""
        self.group.tell((tokens.cpu(), positions, state is not None))
        return self._compute(tokens, positions, state)

    @torch.no_grad()
    @compat.cuda_literals()
    def _compute(
        self, tokens: Tensor, positions: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        layout, T = self.layout, tokens.shape[1]
        shares = layout.tensor if layout.parallel.sequence else 1
        more = -T % shares  # tensor ranks divide the tokens of the stream: pads fill them up
        tokens, positions = F.pad(tokens, (0, more)), F.pad(positions, (0, more), value=-1)
        x, after = tokens.to(self.device), []
        for number in range(layout.pieces):
            turn, owner = divmod(number, layout.pipeline)
            last = number == layout.pieces - 1
            if owner == self.place.pipeline:
                stage = self.stages[turn]
                assert isinstance(stage, Stage)
                x, kept = stage.run(x, positions, None if state is None else state[turn])
                after.append(kept)
                if last and layout.tensor > 1:
                    x = megatron.gather_from_tensor_model_parallel_region(x)
            if layout.pipeline > 1:
                columns = T + more if last else (T + more) // shares
                x = self._handed_on(x, owner, len(tokens), columns, last)
        return x[:, :T], after

    def _handed_on(self, x: Tensor, owner: int, rows: int, columns: int, last: bool) -> Tensor:
        """What stage `owner` has, on every stage: the logits, or hidden states."""
        if owner != self.place.pipeline:
            stage = self.stages[0]
            assert isinstance(stage, Stage)
            config = stage.config
            width = self.vocabulary if last else config.hidden_size
            x = torch.empty(rows, columns, width, dtype=config.params_dtype, device=self.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        x = x.contiguous()
        dist.broadcast(x, dist.get_process_group_ranks(group)[owner], group=group)
        return x

    @contextmanager
    def _whole_rows(self) -> Iterator[None]:
        with ExitStack() as inside:
            for stage in self.stages:
                assert isinstance(stage, Stage)
                inside.enter_context(whole_rows(stage.model))
            yield
