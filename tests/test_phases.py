"""Phases and parts: where a step is, told in order, and no number changed by looking."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.through_zero import start
from tests.parallel.tiny import micro_batches, tiny_config
from tests.worlds import run_world
from titans_pretrain import phases
from titans_pretrain.measure.parts import PARTS, watch_parts
from titans_pretrain.phases import listening, phase, where


class Heard:
    backward = True

    def __init__(self) -> None:
        self.told: list[str] = []
        self.parts: list[tuple[str, str]] = []

    def began(self, name: str) -> None:
        self.told.append(name)

    def ended(self, name: str) -> None:
        self.told.append(f"/{name}")

    def entered(self, part: str, where: str) -> None:
        self.parts.append(("forward", part))

    def left(self, part: str, where: str) -> None: ...

    def turned_back(self, part: str) -> None:
        self.parts.append(("backward", part))


def test_an_error_keeps_the_phases_it_was_raised_in() -> None:
    phases.at_step(7)
    with pytest.raises(ValueError) as raised, phase("outer"), phase("inner"):
        raise ValueError
    assert where(raised.value) == (7, ("outer", "inner"))
    phases.at_step(8)
    assert where(raised.value) == (7, ("outer", "inner"))
    assert where(ValueError()) == (8, ())

    @phase("decorated")
    def act() -> tuple[int, tuple[str, ...]]:
        return where(ValueError())

    heard = Heard()
    with listening(heard), phase("a") as a:
        assert act() == (8, ("a", "decorated"))
        a.become("b")
    with phase("unheard"):
        pass
    assert heard.told == ["a", "decorated", "/decorated", "/a", "b", "/b"]


def hear(config: Any, watched: bool) -> Any:
    world, step = start(config)
    heard, losses = Heard(), []
    for s in range(1, 4):
        batches = micro_batches(config, s, world.rank, world.size)
        if watched and s == 2:
            with listening(heard), watch_parts(step.stages, heard):
                losses.append(step(batches, s))
        else:
            losses.append(step(batches, s))
    weights = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    world.shut_down()
    return heard, [(r.loss, r.grad_norm) for r in losses], weights


def owners(config: Any) -> dict[str, set[str]]:
    """Autograd node of known parts -> the parts that backward was said to be in when it ran."""
    world, step = start(config)
    heard = Heard()
    found: dict[str, set[str]] = {}
    known = ("_ChunkedMemory", "ScaledDotProduct", "Silu", "NllLoss", "Embedding")

    def note(node: Any) -> None:
        if not node.name().startswith(known):
            return
        name = next(k for k in known if node.name().startswith(k))
        node.register_prehook(lambda _: found.setdefault(name, set()).add(heard.parts[-1][1]))

    def every(loss: Any) -> None:
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                note(node)
                todo += [n for n, _ in node.next_functions]

    (batch, *_) = micro_batches(config, 1, 0, 1)
    with watch_parts(step.stages, heard):
        loss = step.stages[0](batch, world.device).sum()
        every(loss)
        loss.backward()
    world.shut_down()
    return found


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mac", "mag", "mal"])
def test_backward_is_in_the_part_whose_forward_made_the_node(variant: str) -> None:
    (found,) = run_world(owners, 1, tiny_config(model__variant=variant))
    assert found["NllLoss"] == {"head and loss"} and found["Embedding"] == {"embedding"}
    if variant != "lmm":
        assert found["ScaledDotProduct"] == {"attention"}
    if variant != "transformer":
        assert found["_ChunkedMemory"] == {"memory"}
    if variant == "transformer":  # elsewhere convolutions have one, too
        assert found["Silu"] == {"mlp"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["transformer", "lmm", "mac", "mag", "mal"])
def test_a_step_that_is_watched_goes_through_its_phases_and_parts_and_changes_no_bit(
    variant: str, precision: str
) -> None:
    config = tiny_config(model__variant=variant, train__precision=precision, train__global_batch=4)
    ((heard, losses, weights),) = run_world(hear, 1, config, True)
    ((unheard, expected, expected_weights),) = run_world(hear, 1, config, False)
    assert unheard.told == [] and losses == expected
    for name, weight in expected_weights.items():
        assert weight.equal(weights[name]), name
    began = [name for name in heard.told if not name.startswith("/")]
    assert began[:2] == ["count", "backward"]
    assert began.count("forward") == 4  # of two micro-batches, and their losses
    after = began[began.index("gradient scan") :]
    assert after[:3] == ["gradient scan", "reduce", "clip"] and after[-1] == "gather"
    assert set(after[3:-1]) <= {"clip", "optimizer"} and "optimizer" in after
    # Every phase ends, the inner ones first.
    stack: list[str] = []
    for name in heard.told:
        if name.startswith("/"):
            assert stack.pop() == name[1:]
        else:
            stack.append(name)
    assert stack == []
    has = {"transformer": {"attention"}, "lmm": {"memory"}}.get(variant, {"attention", "memory"})
    everywhere = {"mlp", "head and loss"} | has
    for way in ("forward", "backward"):
        told = [part for passing, part in heard.parts if passing == way]
        assert everywhere <= set(told) <= set(PARTS)
        first = told[0] if way == "backward" else told[-1]
        assert first == "head and loss"
