"""The same samples reach the models' forwards in any split over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.batch import Batch, batch_hash, concatenate
from titans_pretrain.feed import fetch, open_stream, with_vocabulary
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.world import start_world
from titans_pretrain.step import TrainStep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def forwarded(tree: dict[str, Any]) -> list[Batch]:
    """What the forwards of two steps on this rank were given, one Batch a step."""
    config = parse_config(tree, "test")
    world = start_world(config.train)
    stream = open_stream(config, world)
    config = with_vocabulary(config, stream)
    step = TrainStep(config, plan_layout(config, world.size), world)
    given: list[Batch] = []
    step.stages[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    tokens = []
    step.model.register_forward_pre_hook(lambda module, args: tokens.append(args))
    steps = []
    state = stream.start()
    batches = stream.batches(state)
    for number in (1, 2):
        given.clear()
        micro_batches, state = fetch(world, batches, stream, state)
        step(micro_batches, number)
        steps.append(concatenate(given))
    batches.close()
    assert len(tokens) == 2 * len(given)
    last = len(given)
    for batch, (seen, positions) in zip(given, tokens[-last:], strict=True):
        assert seen.equal(batch.tokens) and positions.equal(batch.positions)
    world.shut_down()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "workers"), [(1, 1), (1, 3), (2, 0), (2, 3), (3, 0), (4, 1), (8, 0)]
)
def test_any_split_gives_the_same_batches(ranks: int, workers: int, data: Path) -> None:
    tree = small_run(
        Path("unused"),
        data,
        model__variant="transformer",
        model__blocks=1,
        train__global_batch=24,
        train__micro_batch=1,
        data__workers=workers,
    )
    reference = hashes([forwarded_alone(data)])
    got = hashes(run_world(forwarded, ranks, tree, timeout=240))
    assert got == reference
    assert len(set(got)) == 2


def forwarded_alone(data: Path) -> list[Batch]:
    """The same steps read by one plain stream."""
    config = parse_config(small_run(Path("unused"), data, model__variant="transformer"), "test")
    from titans_pretrain.data.stream import TrainStream

    stream = TrainStream(config.data, global_batch=24, micro_batch=24, align=1)
    batches = stream.batches(stream.start())
    steps = [next(batches)[0][0] for _ in range(2)]
    batches.close()
    return steps


def hashes(ranks: list[list[Batch]]) -> list[str]:
    return [batch_hash([rank[i] for rank in ranks]) for i in range(2)]
