"""A run that changes its layout at each checkpoint is the run of one plain process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.parity import parity_config
from tests.parallel.test_checkpoint import KINDS, rng, state_of
from tests.parallel.through_zero import assemble, batches_of, pieces, start
from tests.parallel.tiny import PlainRun
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.run import checkpoint

# Ranks and degrees; each reads what the one before it wrote, the first again what the last did.
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {"tensor": 2}),
    (2, {"pipeline": 2}),
    (2, {"zero": {"stage": 3}}),
    (4, {"context": 2, "tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "interleave": 2}),
    (2, {"zero": {"stage": 2, "offload": True}}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    (1, {}),
]
STEPS = 2  # of each


def one_link(config: RunConfig, folder: Path, begin: int) -> Any:
    """Loads the newest checkpoint, if there is one, goes on for STEPS, saves."""
    world, step = start(config)
    found = checkpoint.find_latest(folder, world, lambda *_: None)
    model = config.model.model_dump()
    if found is not None:
        checkpoint.load(found, model, step.optimizer.fragments(), rng())
        step.optimizer.weights_loaded(found.step)
    loaded = [pieces(step.optimizer.fragments(), k) for k in KINDS]
    reports = [step(batches_of(config, s, world), s) for s in range(begin + 1, begin + STEPS + 1)]
    fragments = step.optimizer.fragments()
    state = state_of(config, begin + STEPS)
    checkpoint.save(folder, state, fragments, rng(), world, lambda: None)
    saved = [pieces(fragments, k) for k in KINDS]
    world.shut_down()
    return loaded, [(r.loss, r.grad_norm) for r in reports], saved


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_chain_of_layouts_is_one_run(tied: bool, tmp_path: Path) -> None:
    changes = {
        "model__blocks": 4,
        "model__width": 64,
        "model__heads": 4,
        "model__tied_embeddings": tied,
        "data__sequence_length": 64,
        "optim__lr": 3e-3,
        "train__global_batch": 4,
    }
    plain = PlainRun(parity_config("mac", {}, **changes))
    begin, before = plain.weights(), None
    for number, (ranks, parallel) in enumerate(CHAIN):
        config = parity_config("mac", parallel, **changes)
        done = number * STEPS
        results = run_world(one_link, ranks, config, tmp_path, done, timeout=240)
        like = plain.weights()
        loaded = [assemble([r[0][k] for r in results], like) for k in range(len(KINDS))]
        if before is not None:
            for kind, was in zip(loaded, before, strict=True):
                assert all(bool((kind[name] == was[name]).all()) for name in like), parallel
        for s in range(STEPS):
            loss, norm, _ = plain.step(done + s + 1)
            assert results[0][1][s][0] == pytest.approx(loss, rel=1e-5), parallel
            assert results[0][1][s][1] == pytest.approx(norm, rel=1e-5), parallel
        before = [assemble([r[2][k] for r in results], like) for k in range(len(KINDS))]
    assert before is not None
    for name, weight in plain.weights().items():
        moved = (weight - begin[name]).norm()
        assert (before[0][name] - weight).norm() <= 1e-3 * moved, name
