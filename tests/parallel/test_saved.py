"""What a forward keeps for its backward on each rank, beside the formula."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.saved import Saved
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.model.saved import saved_bytes

WIDE = {
    "model__width": 128,
    "model__mlp_width": 256,
    "model__memory__expansion": 2,
    "data__sequence_length": 128,
}


def kept(config: RunConfig) -> tuple[int, float]:
    """Bytes that the forward of one micro-batch keeps on this rank, and what the formula says."""
    world, step = start(config)
    (batch,) = batches_of(config, 1, world)
    # One document that fills the row.
    batch.positions.copy_(batch.positions.new_tensor(range(batch.positions.shape[1])))
    with Saved(step.model.parameters()) as saved:
        step.schedule.run(step._shares([batch]), tokens_in_step=100)
    if step.link is not None:
        step.link.drain()
    p, pieces = config.parallel, list(step.pieces)
    formula = saved_bytes(
        config.model,
        1,
        config.data.sequence_length // p.context,
        4,
        blocks=sum(len(piece.model.blocks) for piece in pieces),
        head=pieces[-1].last,
        tensor=p.tensor,
        sequence=p.sequence,
        handed=world.place.context > 0,
    )
    world.shut_down()
    return saved.bytes(), sum(formula.values())


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
}


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_kept_on_each_rank_are_those_of_the_formula(layout: str, variant: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_config(variant, parallel, train__global_batch=1, **WIDE)
    for found, formula in run_world(kept, ranks, config):
        assert formula == pytest.approx(found, rel=0.05), formula / found
