"""Bugs that leave the loss finite and every shape right: the parity assertion sees each and names a
parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.parallel.parity import assert_parity, compare, parity_config
from titans_pretrain import pieces
from titans_pretrain.parallel import pipeline, tensor
from titans_pretrain.parallel.context import MixerSeam
from titans_pretrain.parallel.layout import Shard


def gradients_of_shared_parameters_are_not_summed() -> None:
    tensor._summed = lambda gradient: gradient


def the_stream_s_gradient_is_not_summed() -> None:
    tensor.megatron.copy_to_tensor_model_parallel_region = lambda x, group=None: x


def heads_are_one_off() -> None:
    box = Shard.box.fget  # type: ignore[attr-defined]
    of = Shard.of

    def turned(self: Shard, whole: Any) -> Any:
        if self.name.endswith("memory.k.weight") and self.parts > 1:
            return of(dataclasses.replace(self, index=(self.index + 1) % self.parts), whole)
        return of(self, whole)

    assert box is not None
    Shard.of = turned  # type: ignore[method-assign]


def a_stage_begins_a_block_early() -> None:
    cut = pieces.cut_blocks

    def early(*args: Any) -> list[range]:
        first, *rest = cut(*args)
        return [first, *(range(r.start - 1, r.stop - 1) for r in rest)]

    pieces.cut_blocks = early


def a_tied_embedding_counts_twice() -> None:
    from tests.parallel import parity

    def twice(gradients: Any) -> None:
        gradients = list(gradients)
        pipeline.sum_tied(gradients)
        pipeline.sum_tied(gradients)

    parity.sum_tied = twice


def accumulation_is_off_by_a_factor() -> None:
    from megatron.core.pipeline_parallel import schedules

    calculate = schedules.forward_step_calc_loss

    def double(*args: Any, **kwargs: Any) -> Any:
        loss, tokens = calculate(*args, **kwargs)
        return loss * 2, tokens

    schedules.forward_step_calc_loss = double


def the_loss_is_not_scaled_under_data_parallelism() -> None:
    run = pipeline.Schedule.run

    def unscaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.layout = dataclasses.replace(self.layout, data_parallel=1)
        return run(self, *args, **kwargs)

    pipeline.Schedule.run = unscaled  # type: ignore[method-assign]


def weights_are_stale() -> None:
    """What a checkpoint brought did not reach one layer."""
    of = Shard.of

    def stale(self: Shard, whole: Any) -> Any:
        values = of(self, whole)
        return values * 0.99 if self.name == "blocks.1.mlp.up.weight" else values

    Shard.of = stale  # type: ignore[method-assign]


def a_state_does_not_arrive() -> None:
    take = MixerSeam.take

    def lost(self: Any, what: str, tie: Any, state: Any, blank: Any) -> Any:
        tie, taken = take(self, what, tie, state, blank)
        return tie, blank() if what == "memory" and self._model[0].link.index else taken

    MixerSeam.take = lost  # type: ignore[method-assign]


def a_document_s_reset_is_missed_at_a_rank_s_edge() -> None:
    from tests.parallel import parity

    shard = parity.shard

    def missed(batch: Any, index: int, size: int) -> Any:
        mine = shard(batch, index, size)
        positions = mine.positions.clone()
        for row in positions if index else ():
            if row[0] <= 0:
                n = int((row[1:] == 0).nonzero()[0]) + 1 if (row[1:] == 0).any() else len(row)
                row[:n] = row[:n].where(row[:n] < 0, row[:n] + 8)
        return dataclasses.replace(mine, positions=positions)

    parity.shard = missed


TP2 = {"tensor": 2}
# The bug, its layout and ranks, the variant, parameters of which one must be named.
BUGS: list[tuple[Callable[[], None], dict[str, Any], int, str, str]] = [
    (gradients_of_shared_parameters_are_not_summed, TP2, 2, "mag", "persistent"),
    (the_stream_s_gradient_is_not_summed, TP2, 2, "lmm", "embedding.weight"),
    (heads_are_one_off, TP2, 2, "lmm", "memory.k.weight"),
    (a_stage_begins_a_block_early, {"pipeline": 2}, 2, "lmm", "blocks.3"),
    (a_tied_embedding_counts_twice, {"pipeline": 2}, 2, "lmm", "embedding.weight"),
    (accumulation_is_off_by_a_factor, {}, 1, "lmm", "head.weight"),
    (the_loss_is_not_scaled_under_data_parallelism, {}, 2, "lmm", "head.weight"),
    (weights_are_stale, TP2, 2, "lmm", "blocks.1"),
    (a_state_does_not_arrive, {"context": 2}, 2, "lmm", "memory"),
    (a_document_s_reset_is_missed_at_a_rank_s_edge, {"context": 2}, 2, "mac", "memory"),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug[0].__name__)
def test_the_parity_assertion_sees(bug: Any) -> None:
    seed, parallel, ranks, variant, named = bug
    tied = seed is a_tied_embedding_counts_twice
    config = parity_config(variant, parallel, model__tied_embeddings=tied)
    off = compare(config, ranks, seed, whole=False)
    with pytest.raises(AssertionError, match="differ from one plain process") as caught:
        assert_parity(off)
    wrong = [name for name, d in off.items() if not d <= 1e-3]
    assert any(named in name for name in wrong), (wrong, str(caught.value))
