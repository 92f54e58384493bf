"""Every layout gives the loss and the gradients of one plain process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import assert_parity, compare, parity_config
from titans_pretrain.cut import cut_blocks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP4": (4, {"tensor": 4}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "DP2": (2, {}),
    "TP2 PP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP4": (4, {"context": 4}),
    "CP2 TP2+SP": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "CP2 DP2": (4, {"context": 2}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2}),
    "CP2 PP2 x 2": (4, {"context": 2, "pipeline": 2, "interleave": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mac_in_every_layout(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    assert_parity(compare(parity_config("mac", parallel), ranks))


VARIANTS = ["transformer", "lmm", "mag", "mal"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*VARIANTS, "mac"])
def test_every_variant_in_tp2_pp2_dp2(variant: str) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "sequence": True}
    assert_parity(compare(parity_config(variant, parallel), 8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_in_cp2_tp2(variant: str) -> None:
    parallel = {"context": 2, "tensor": 2}
    assert_parity(compare(parity_config(variant, parallel), 4))


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "TP2 PP2+SP", "PP2 DP2"])
def test_a_tied_head_wherever_it_is(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    assert_parity(compare(parity_config("lmm", parallel, model__tied_embeddings=True), ranks))


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("mal", {"model__kv_heads": 4}),
    "learned queries": (
        "mac",
        {"model__memory__retrieved": "learned", "model__memory__learned_queries": 3},
    ),
    "own features": ("mac", {"model__memory__projections": "block_diagonal"}),
    "own features, grouped": (
        "mac",
        {"model__memory__projections": "block_diagonal", "model__kv_heads": 4},
    ),
    "pooled queries": ("mac", {"model__memory__retrieved": "pool2"}),
    "no inner norm": ("lmm", {"model__memory__residual_norm": False}),
    "no persistent tokens": ("mag", {"model__persistent_tokens": 0}),
    "blocks computed again": ("mac", {"train__recompute": "blocks"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_may_have_is_divided_too(change: str) -> None:
    variant, changes = CHANGES[change]
    parallel = {"tensor": 2, "sequence": True}
    assert_parity(compare(parity_config(variant, parallel, **changes), 2))


SEGMENTED: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "CP2": (2, {"context": 2}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2}),
    "CP2 PP2 x 2": (4, {"context": 2, "pipeline": 2, "interleave": 2}),
    "TP2+SP DP2": (4, {"tensor": 2, "sequence": True}),
}


@pytest.mark.parametrize("layout", SEGMENTED)
def test_rows_in_three_segments_one_after_another(layout: str) -> None:
    """Against one process that carries the state on without its history."""
    ranks, parallel = SEGMENTED[layout]
    config = parity_config("mac", {**parallel, "segments": 3})
    assert_parity(compare(config, ranks))


@pytest.mark.parametrize("order", ["FFBB", "skewed"])
def test_context_ranks_in_other_orders(order: str) -> None:
    assert_parity(compare(parity_config("mac", {"context": 4, "order": order}), 4))


def test_segments_with_all_forwards_first() -> None:
    parallel = {"context": 2, "order": "FFBB", "segments": 2}
    assert_parity(compare(parity_config("lmm", parallel), 2))


@pytest.mark.parametrize(("interleave", "sizes"), [(1, [3, 2]), (2, [2, 1, 1, 1])])
def test_stages_of_unequal_size(interleave: int, sizes: list[int]) -> None:
    """Five blocks, which neither two stages nor four pieces share evenly."""
    parallel = {"pipeline": 2, "interleave": interleave}
    config = parity_config("lmm", parallel, model__blocks=5)
    pieces = cut_blocks(config.model, len(sizes), config.data.sequence_length)
    assert [len(piece) for piece in pieces] == sizes
    assert_parity(compare(config, 2))
