"""Every layout gives the loss and the gradients of one plain process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.model.helpers import inert
from tests.parallel import parity, tiny
from tests.parallel.parity import (
    CALMER,
    assert_parity,
    compare,
    differences,
    lacks,
    parity_config,
    plain,
    values_of,
)
from titans_pretrain.config import RunConfig
from titans_pretrain.data.batch import Batch, concatenate
from titans_pretrain.model.titans import TitansLM

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
    sequence = variant in ("transformer", "lmm", "mal")  # MAG and MAC: each rank has all tokens
    parallel = {"tensor": 2, "pipeline": 2, "sequence": sequence}
    assert_parity(compare(parity_config(variant, parallel), 8))


@pytest.mark.parametrize("variant", [*VARIANTS, "mac"])
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


def a_layout(**changes: Any) -> RunConfig:
    return parity_config("mac", {"context": 2, "tensor": 2, "pipeline": 2}, **changes)


def shorter(batch: Batch) -> Batch:
    """Each document ends after a chunk."""
    return replace(batch, positions=batch.positions.where(batch.positions < 8, -1))


def without_tail(batch: Batch) -> Batch:
    """One document fills each row."""
    row = torch.arange(batch.positions.shape[1])
    return replace(batch, positions=row.expand_as(batch.positions))


@pytest.mark.parametrize(
    ("lack", "config", "change"),
    [
        ("2 blocks a stage", a_layout(model__blocks=3), None),
        ("2 heads a rank", a_layout(model__heads=2), None),
        ("4 chunks a context rank", a_layout(data__sequence_length=48), None),
        ("2 micro-batches", a_layout(train__global_batch=1), None),
        ("3 documents over MAC's segments", a_layout(), shorter),
        ("3 documents over ranks' edges", a_layout(), shorter),
        ("a ragged tail", a_layout(), without_tail),
    ],
)
def test_a_case_that_would_hide_mistakes_is_refused(
    lack: str, config: RunConfig, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compare` asks of every case."""
    assert lacks(a_layout(), 8) == []
    if change is not None:
        batches = [change(b) for b in tiny.micro_batches(config, 1, 0, 1)]
        monkeypatch.setattr(parity, "micro_batches", lambda *_: batches)
    assert lack in lacks(config, 8)
    with pytest.raises(AssertionError, match="would hide mistakes"):
        compare(config, 8)


def reset_missed(*of: Any) -> Batch:
    """The rows; in one a document right behind another's last token passes for the other's rest."""
    batch = concatenate(tiny.micro_batches(*of))
    positions = batch.positions.clone()
    behind = (positions[:, 1:] == 0) & (positions[:, :-1] >= 0)
    row, before = behind.nonzero()[0].tolist()
    rest = positions[row, before + 1 :]
    rest[((rest == 0).cumsum(0) == 1) & (rest >= 0)] += positions[row, before] + 1
    return replace(batch, positions=positions)


@pytest.mark.parametrize(
    ("variant", "heat"),
    [
        *((v, 1.0) for v in ("lmm", "mac", "mag", "mal")),
        *((v, CALMER) for v in ("lmm", "mag", "mal")),
    ],
)
def test_the_memory_matters_in_these_models(
    variant: str, heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what it learns the loss is another by more than 1 %; one reset that is missed moves
    gradients of the memory by more than 1e-3."""
    config = parity_config(variant, {})
    values = values_of(config, heat)
    right = nats, _ = plain(config, values)
    model = TitansLM(config.model, dtype=torch.float64)
    model.load_state_dict(values)
    learns_nothing = {n: p.detach() for n, p in inert(model).named_parameters()}
    assert abs(plain(config, learns_nothing)[0] - nats) > 0.01 * nats

    monkeypatch.setattr(parity, "micro_batches", lambda *of: [reset_missed(*of)])
    off = differences(right, plain(config, values))
    assert max(d for name, d in off.items() if ".memory." in name) > 1e-3
