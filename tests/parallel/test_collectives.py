"""Calls of collectives in a step, beside the arithmetic; and none inside the memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import batches_of, start
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.measure.step_benchmark import Collectives
from titans_pretrain.memory.layer import MemoryLayer

BLOCKS, MICRO = 2, 4
# All-reduces of one mixer, forward and backward; an MLP has one each. Out of a mixer the stream is
# summed once (forward), into it once (backward). Persistent tokens: their gradient, once. MAL's
# attention needs all of what the memory says, of tokens and of persistent tokens: twice more each.
MIXER = {"transformer": (1, 1), "lmm": (1, 1), "mag": (1, 2), "mal": (3, 4)}


def counted(config: RunConfig) -> tuple[dict[str, int], int, int]:
    """Calls by name in the forwards and backwards of a step; of those, inside the memory's update
    and read; how often that ran."""
    world, step = start(config)
    batches = batches_of(config, 1, world)
    inside, write = Collectives(), MemoryLayer.write
    ran = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal ran
        ran += 1
        with inside:
            return write(*args, **kwargs)

    MemoryLayer.write = watched  # type: ignore[method-assign]
    with Collectives() as seen:
        step.schedule.run(batches, tokens_in_step=100)
    calls = {name: n["calls"] for name, n in seen.counted.items()}
    world.shut_down()
    return calls, sum(n["calls"] for n in inside.counted.values()), ran


@pytest.mark.parametrize("variant", MIXER)
def test_tensor_parallel_collectives_are_those_of_the_arithmetic(variant: str) -> None:
    config = parity_config(variant, {"tensor": 2}, train__global_batch=MICRO)
    forward, backward = MIXER[variant]
    once = Counter(embedding=1, loss=3, penalty=2, head=1)  # a micro-batch
    expected = MICRO * (sum(once.values()) + BLOCKS * (forward + 1 + backward + 1))
    for calls, inside, ran in run_world(counted, 2, config):
        assert calls == {"allreduce": expected}
        assert inside == 0
        assert ran == (0 if variant == "transformer" else BLOCKS * MICRO)
