"""What a divided model says of rows it does not learn from is what one process says of them."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

from tests.parallel.parity import parity_config, values_of
from tests.parallel.through_zero import start
from tests.parallel.tiny import batch_of
from tests.worlds import run_world
from titans_pretrain import pieces
from titans_pretrain.config import RunConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.launch.local import free_port
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, map_state
from titans_pretrain.parallel.context import shard

ROWS = 3  # of a data-parallel rank, one at a time: two stages do not divide them

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2 x 2": {"pipeline": 2, "interleave": 2},
    "CP2": {"context": 2},
    "CP2, 2 segments": {"context": 2, "segments": 2},
    "DP2 Z3": {"zero": {"stage": 3}},
}


def config_of(layout: str) -> RunConfig:
    return parity_config("mac", LAYOUTS[layout], model__heads=4, train__precision="fp32")


def rows(config: RunConfig, first: int, count: int) -> list[Batch]:
    shape = (config.model.memory.chunk, config.data.sequence_length)
    return [batch_of([i], *shape) for i in range(first, first + count)]


def alone(config: RunConfig, count: int) -> tuple[float, int]:
    """(nats a label, labels) in one plain process, in float64."""
    model, nats, labels = TitansLM(config.model, dtype=torch.float64), 0.0, 0
    model.load_state_dict(values_of(config))
    segments = config.parallel.segments
    for batch in rows(config, 0, count):
        state = None
        for part in (shard(batch, i, segments) for i in range(segments)):
            with torch.no_grad():
                logits, state = model(part.tokens, part.positions, state)
            state = map_state(state, torch.Tensor.detach)
            nats += token_loss(logits, part.labels)[part.loss_mask].sum().item()
            labels += int(part.loss_mask.sum())
    return nats / labels, labels


def evaluated(ports: list[int]) -> dict[str, tuple[float, int]]:
    """On a rank: in each layout, one world after another."""
    found = {}
    for port, layout in zip(ports, LAYOUTS, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = config_of(layout)
        values = values_of(config)
        with mock.patch.object(pieces, "draw", lambda _, name, *more: values[name]):  # noqa: B023
            world, step = start(config)
        first = ROWS * world.place.data
        found[layout] = step.evaluate(rows(config, first, ROWS))
        assert step.model.training
        world.shut_down()
    return found


def test_validation_in_every_kind_of_layout() -> None:
    for told in run_world(evaluated, 2, [free_port() for _ in LAYOUTS], timeout=200):
        for layout, (loss, labels) in told.items():
            expected = alone(config_of(layout), ROWS * (1 + (layout == "DP2 Z3")))
            assert labels == expected[1], layout
            assert loss == pytest.approx(expected[0], rel=1e-5), layout
