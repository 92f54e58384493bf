"""Bugs that leave the loss finite and every shape right: the parity assertion sees each and names a
parameter."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.parity import assert_parity, compare, parity_config
from tests.parallel.test_checkpoint import rng, state_of
from titans_pretrain import pieces
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.memory.packing import plan_documents
from titans_pretrain.model import mixers
from titans_pretrain.parallel import pipeline, tensor
from titans_pretrain.parallel.context import MixerSeam
from titans_pretrain.parallel.layout import Shard
from titans_pretrain.parallel.zero import ZeroOptimizer
from titans_pretrain.run import checkpoint
from titans_pretrain.step import TrainStep


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


def weights_come_through_a_checkpoint() -> None:
    """No bug: one engine saves the weights, another loads them, and its model's are taken."""
    from tests.parallel import parity

    build = parity.build
    # Of this world alone, and the same on its ranks.
    folder = Path(tempfile.gettempdir(), f"parity-{os.getppid()}-{os.environ['MASTER_PORT']}")

    def loaded(config: Any, values: dict[str, torch.Tensor]) -> parity.Built:
        built = build(config, values)
        saving, loading = (TrainStep(config, built.layout, built.world) for _ in range(2))
        fragments = saving.optimizer.fragments()
        for f in fragments:
            mine = f.shard.of(values[f.name]).reshape(-1)[f.start : f.start + f.numel]
            f.tensors["weight"].copy_(mine)
        checkpoint.save(folder, state_of(config, 1), fragments, rng(), built.world, lambda: None)
        found = checkpoint.find_latest(folder, built.world, lambda *_: None)
        assert found is not None
        checkpoint.load(found, config.model.model_dump(), loading.optimizer.fragments(), rng())
        loading.optimizer.weights_loaded(found.step)
        for mine, theirs in zip(
            built.pieces.root.parameters(), loading.model.parameters(), strict=True
        ):
            mine.data.copy_(theirs)
        built.world.barrier()
        built.world.only_first(lambda: shutil.rmtree(folder))
        return built

    parity.build = loaded


def weights_are_stale_after_a_load() -> None:
    weights_come_through_a_checkpoint()
    ZeroOptimizer.weights_loaded = lambda self, step: None  # type: ignore[method-assign]


def a_state_does_not_arrive() -> None:
    take = MixerSeam.take

    def lost(self: Any, what: str, tie: Any, state: Any, blank: Any) -> Any:
        tie, taken = take(self, what, tie, state, blank)
        return tie, blank() if what == "memory" and self._model[0].link.index else taken

    MixerSeam.take = lost  # type: ignore[method-assign]


def a_halo_is_one_token_short() -> None:
    """The oldest keys and values of a window's halo are missing."""
    take = MixerSeam.take

    def short(self: Any, what: str, tie: Any, state: Any, blank: Any) -> Any:
        tie, taken = take(self, what, tie, state, blank)
        if what == "keys" and self._model[0].link.index:
            taken = tuple(torch.cat((t[:, :, :1] * 0, t[:, :, 1:]), dim=2) for t in taken)
        return tie, taken

    MixerSeam.take = short  # type: ignore[method-assign]


def a_state_is_handed_on_before_the_last_chunk() -> None:
    plan_memory, write = mixers.plan_memory, MemoryLayer.write
    shorter: dict[int, tuple[Any, Any]] = {}  # plans, which stay alive, without the last chunk

    def planned(config: Any, positions: Any, like: Any) -> Any:
        plan, C = plan_memory(config, positions, like), config.memory.chunk
        shorter[id(plan.memory)] = (plan, plan_documents(positions[:, :-C], C))
        return plan

    def early(self: Any, q: Any, k: Any, v: Any, rates: Any, plan: Any, *more: Any) -> Any:
        y, _ = write(self, q, k, v, rates, plan, *more)
        q, k, v = (x[:, :, : -self.spec.chunk] for x in (q, k, v))
        gates = {n: getattr(rates, n)[:, :, : -self.spec.chunk] for n in ("theta", "alpha", "eta")}
        _, short = shorter[id(plan)]
        return y, write(self, q, k, v, dataclasses.replace(rates, **gates), short, *more)[1]

    mixers.plan_memory = planned
    MemoryLayer.write = early  # type: ignore[method-assign]


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


TP2, CP2 = {"tensor": 2}, {"context": 2}
# The bug, its layout and ranks, the variant, parameters of which one must be named.
BUGS: list[tuple[Callable[[], None], dict[str, Any], int, str, str]] = [
    (gradients_of_shared_parameters_are_not_summed, TP2, 2, "mag", "persistent"),
    (the_stream_s_gradient_is_not_summed, TP2, 2, "lmm", "embedding.weight"),
    (heads_are_one_off, TP2, 2, "lmm", "memory.k.weight"),
    (a_stage_begins_a_block_early, {"pipeline": 2}, 2, "lmm", "blocks.3"),
    (a_tied_embedding_counts_twice, {"pipeline": 2}, 2, "lmm", "embedding.weight"),
    (accumulation_is_off_by_a_factor, {}, 1, "lmm", "head.weight"),
    (the_loss_is_not_scaled_under_data_parallelism, {}, 2, "lmm", "head.weight"),
    (weights_are_stale_after_a_load, {}, 2, "lmm", "memory"),
    (a_state_does_not_arrive, CP2, 2, "lmm", "memory"),
    (a_state_is_handed_on_before_the_last_chunk, CP2, 2, "lmm", "memory"),
    (a_halo_is_one_token_short, CP2, 2, "mag", "attention"),
    (a_document_s_reset_is_missed_at_a_rank_s_edge, CP2, 2, "mac", "memory"),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug[0].__name__)
def test_the_parity_assertion_sees(bug: Any) -> None:
    seed, parallel, ranks, variant, named = bug
    tied = seed is a_tied_embedding_counts_twice
    config = parity_config(variant, parallel, model__tied_embeddings=tied)
    off = compare(config, ranks, seed, whole=False)
    assert math.isfinite(off["loss"])
    with pytest.raises(AssertionError, match="differ from one plain process") as caught:
        assert_parity(off)
    told = str(caught.value).partition(": ")[2].split(", ")  # "name difference", the worst first
    wrong = [name for name, d in (entry.split() for entry in told) if not float(d) <= 1e-3]
    assert any(named in name for name in wrong), caught.value


def test_weights_that_come_through_a_checkpoint_are_as_good_as_any() -> None:
    """Or the bug among the loads would show nothing."""
    assert_parity(compare(parity_config("lmm", {}), 2, weights_come_through_a_checkpoint))
