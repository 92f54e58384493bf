"""A window that reaches over several context ranks and ends inside the row."""

from __future__ import annotations

from unittest import mock

import torch.distributed as dist

from tests.model.helpers import config_of
from tests.parallel import context_runs
from tests.parallel.context_runs import Run, context_run, join, plain_run, unit, worst
from tests.worlds import run_world
from titans_pretrain.config import ModelConfig

CASE, RANKS, WINDOW = "mag-window", 4, 40


def with_its_window(case: str) -> ModelConfig:
    return config_of(case, width=32, heads=4, mlp_width=24, window=WINDOW)


WIDE = mock.patch.object(context_runs, "model_config", with_its_window)


def in_world() -> Run:
    with WIDE:
        run = context_run(join(), CASE)
    dist.barrier()
    return run


def test_keys_come_from_more_ranks_than_the_one_before() -> None:
    row = 16 * unit(with_its_window(CASE))
    assert 2 * row // RANKS < WINDOW - 1 < row - row // RANKS
    with WIDE:
        right = plain_run(CASE)
    ours = run_world(in_world, RANKS)[0]
    assert abs(ours.loss - right.loss) < 1e-12 * right.loss
    assert worst(ours, right)[0] < 1e-9, worst(ours, right)
