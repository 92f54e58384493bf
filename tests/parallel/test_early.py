"""What backward computes again of a memory is computed before a rank waits for the gradient of the
state it handed on, and the gradients are the same, bit by bit."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.parallel.context_runs import context_run, documents, join, model_config
from tests.parallel.tiny import tiny_config
from tests.worlds import run_world
from titans_pretrain.memory.again import Again
from titans_pretrain.model import mac, mixers
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.world import start_world
from titans_pretrain.step import TrainStep

CASES = ("lmm", "mag-window", "mac")


class Log:
    """c: a part is computed again (P: of persistent rows, which no rank waits for); w: waits for
    the gradient of a memory's state; o: of others."""

    def __init__(self, prefix: int | None) -> None:
        self.said, self.prefix = "", prefix

    def __enter__(self) -> Log:
        compute, receive = Again._compute, Link.receive

        def computed(again: Again, *more: Any) -> Any:
            self.said += "P" if again.problem.plan.shape == (1, self.prefix) else "c"
            return compute(again, *more)

        def received(link: Link, way: str, key: Any, *more: Any) -> Any:
            if way == "backward":
                self.said += "w" if key[2] in ("memory", "segment") else "o"
            return receive(link, way, key, *more)

        self._patches = [
            mock.patch.object(Again, "_compute", computed),
            mock.patch.object(Link, "receive", received),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()


def in_world() -> dict[tuple[str, bool, bool], tuple[str, dict[str, torch.Tensor]]]:
    link, out = join(), {}
    for case in CASES:
        config = model_config(case)
        rows = documents(config)[:1]
        prefix = config.persistent_tokens if case == "mag-window" else None
        for recompute in (False, True):
            for early in (True, False):
                late = mock.patch.object(mixers, "begin_backward", lambda *_: None)
                late_mac = mock.patch.object(mac, "begin_backward", lambda *_: None)
                if not early:
                    late.start(), late_mac.start()
                with Log(prefix) as log:
                    run = context_run(link, case, rows=rows, recompute=recompute)
                mock.patch.stopall()
                out[case, recompute, early] = (log.said, run.gradients)
    dist.barrier()
    return out


@pytest.fixture(scope="module")
def runs() -> list[Any]:
    return run_world(in_world, 2, timeout=200)


@pytest.mark.parametrize("case", CASES)
def test_the_memory_is_computed_again_before_the_wait(runs, case: str) -> None:
    for recompute, early, order in (
        (False, True, r"(c{2,}wo+P?)+"),  # all of it, then the wait
        (True, True, r"(cwc+o+P?)+"),  # what costs no memory
        (False, False, r"(wc{2,}o+P?)+"),
        (True, False, r"(wc{2,}o+P?)+"),
    ):
        said, _ = runs[0][case, recompute, early]
        assert re.fullmatch(order, said), (recompute, early, said)
    for recompute in (False, True):
        early, late = (runs[0][case, recompute, e][0] for e in (True, False))
        assert early.count("c") == late.count("c")  # nothing is computed twice more
        assert "w" not in runs[1][case, recompute, True][0]  # the last rank waits for nobody


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bitwise_the_same(runs, case: str) -> None:
    for recompute in (False, True):
        early, late = (runs[0][case, recompute, e][1] for e in (True, False))
        assert early.keys() == late.keys() and early
        assert all(torch.equal(early[name], late[name]) for name in late)


def seconds_of_messages() -> dict[str, float]:
    config = tiny_config(parallel__context=2, model__variant="lmm", parallel__segments=2)
    layout = plan_layout(config, 2)
    world = start_world(config.train, layout, timeout_s=77)
    step = TrainStep(config, layout, world)
    assert step.link is not None
    cpu = torch.device("cpu")
    found = {}
    for way, group in step.link.groups.items():
        found[way] = group._get_backend(cpu).options._timeout.total_seconds()
    world.shut_down()
    return found


def test_messages_of_context_ranks_wait_as_long_as_collectives() -> None:
    expected = {"forward": 77, "backward": 77, "round 0": 77}
    assert run_world(seconds_of_messages, 2, timeout=100) == [expected] * 2
