"""What memories did, put together from any layout, is what one plain process reports."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.parallel.parity import TOLERANCE, build, parity_config, values_of
from tests.parallel.tiny import micro_batches
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.joined import joined
from titans_pretrain.memory import tally
from titans_pretrain.memory.observe import observe_memory
from titans_pretrain.model.titans import TitansLM, map_state
from titans_pretrain.parallel.context import shard
from titans_pretrain.parallel.group import Group
from titans_pretrain.parallel.layout import plan_layout

Seen = tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]


def panel_config(variant: str, parallel: dict[str, Any], **changes: Any) -> RunConfig:
    """Two rows a micro-batch, four blocks of four heads."""
    settings = {"model__heads": 4, "model__blocks": 4, "train__micro_batch": 2, **changes}
    return parity_config(variant, parallel, **settings)


def plain(config: RunConfig, most: int, data_ranks: int) -> Seen:
    """Of one process that is fed what data-parallel rank 0 is."""
    model = TitansLM(config.model, dtype=torch.float64)
    model.load_state_dict(values_of(config))
    with mock.patch.object(tally, "MOST", most):
        with torch.no_grad(), observe_memory() as seen:
            for batch in micro_batches(config, 1, 0, data_ranks):
                state = None
                for i in range(config.parallel.segments):
                    part = shard(batch, i, config.parallel.segments)
                    _, state = model(part.tokens, part.positions, state)
                    state = map_state(state, torch.Tensor.detach)
        return seen.figures, seen.heads


def divided(
    config: RunConfig, values: dict[str, torch.Tensor], most: int
) -> tuple[Seen | None, int]:
    """On a rank: what it writes (rank 0 alone does), and how many bytes it sent for that."""
    tally.MOST = most
    built = build(config, values)
    world = built.world
    group = Group.join(world, lambda place: place.data == 0)
    with observe_memory(cut=built.layout.context > 1) as seen:
        built.schedule.run(built.batches, tokens_in_step=1)
    whole = None if group is None else joined(group, seen)
    world.shut_down()
    sent = 0 if group is None else group.bytes
    return (None if whole is None else (whole.figures, whole.heads)), sent


def compare(config: RunConfig, ranks: int, most: int = tally.MOST) -> None:
    """Asserts that rank 0 writes what one process would, and how little is sent for that."""
    layout = plan_layout(config, ranks)
    results = run_world(divided, ranks, config, values_of(config), most, timeout=60)
    figures, heads = results[0][0]
    assert [seen for seen, _ in results[1:]] == [None] * (ranks - 1)
    expected, by_head = plain(config, most, layout.data_parallel)
    assert list(figures) == list(expected) == list(heads)
    assert len(figures) == config.model.blocks
    close = {"rel": TOLERANCE, "abs": 1e-12}
    for layer in expected:
        assert figures[layer] == pytest.approx(expected[layer], **close), layer
        assert heads[layer].keys() == by_head[layer].keys()
        for figure, values in by_head[layer].items():
            assert len(values) == config.model.heads
            assert heads[layer][figure] == pytest.approx(values, **close), (layer, figure)
            assert len({f"{x:.9g}" for x in values}) == len(values), "heads that differ"
    sent = [bytes_ for _, bytes_ in results]
    tokens = config.train.global_batch * config.data.sequence_length
    gates = 3 * tokens * config.model.memory.depth * config.model.heads * 8  # in float64
    most_sent = config.model.blocks * (gates + 16_000 * ranks)
    assert sent[0] == 0 and 0 < sum(sent) < most_sent


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "CP2": (2, {"context": 2}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}),
    "CP4": (4, {"context": 4}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "CP2, 2 segments": (2, {"context": 2, "segments": 2}),
}


SLOW = ("CP4", "PP2 DP2", "TP2 PP2")


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS]
)
def test_mac_in_every_layout(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    compare(panel_config("mac", parallel), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lmm", "mag", "mal"])
def test_every_variant_where_heads_and_rows_are_divided(variant: str) -> None:
    compare(panel_config(variant, {"context": 2, "tensor": 2}), 4)


def test_blocks_computed_again_are_seen_once() -> None:
    """Context ranks compute them again at different times."""
    config = panel_config("mac", {"context": 2, "order": "skewed"}, train__recompute="blocks")
    compare(config, 2)


def test_heads_of_a_sample_are_of_the_same_sample() -> None:
    compare(panel_config("lmm", {"tensor": 2}), 2, most=300)
