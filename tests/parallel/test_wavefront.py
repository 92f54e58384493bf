"""The simulated wavefront against its formulas and against what ranks that slept measured."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.parallel.wavefront import Chain, Order, Task, formula, program, simulate

# Sleeping ranks: 6 + 12 + 18 ms forward, twice that backward; seconds of the formula.
SLEPT = Chain(4, 1, 8, Task(0.006, 0.012, 0.018), Task(0.036, 0.024, 0.012))


@pytest.mark.parametrize(
    ("ranks", "order", "micro_batches", "seconds"),
    [
        (4, "F", 1, 0.324),
        (4, "F", 4, 1.188),
        (4, "FB", 1, 0.972),
        (4, "FB", 4, 3.888),
        (4, "FFBB", 2, 1.836),
        (4, "FFBB", 4, 3.564),
        (4, "skewed", 4, 3.564),
        (2, "F", 4, 1.164),
        (2, "FB", 1, 0.9),
        (2, "FB", 4, 3.6),
        (2, "FFBB", 4, 3.492),
        (2, "skewed", 4, 3.492),
    ],
)
def test_known_steps(ranks: int, order: Order, micro_batches: int, seconds: float) -> None:
    c = dataclasses.replace(SLEPT, ranks=ranks, order=order, micro_batches=micro_batches)
    assert formula(c) == pytest.approx(seconds)
    assert simulate(c).seconds == pytest.approx(seconds)


@given(
    st.sampled_from(["F", "FB", "FFBB"]),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 9),
    st.tuples(*[st.integers(0, 5)] * 3),
    st.integers(1, 3),
)
def test_the_simulation_is_the_formula(
    order: Order,
    ranks: int,
    micro_batches: int,
    layers: int,
    parts: tuple[int, ...],
    segments: int,
) -> None:
    """While a rank's own work lasts longer than the wave needs to come round to it."""
    before, memory, after = parts
    forward, backward = Task(before, memory, after), Task(2 * after, 2 * memory, 2 * before)
    c = Chain(ranks, micro_batches, layers, forward, backward, order, segments=segments)
    if layers * forward.whole >= (ranks - 1) * memory:
        assert simulate(c).seconds == pytest.approx(formula(c))


@pytest.mark.parametrize(
    ("order", "memory", "efficiency", "alive"),
    [
        ("FB", 1 / 6, 0.954, 1),
        ("FB", 2 / 3, 0.837, 1),
        ("FFBB", 1 / 6, 0.997, 16),
        ("FFBB", 2 / 3, 0.988, 16),
        ("skewed", 1 / 6, 0.997, 8),
        ("skewed", 2 / 3, 0.988, 8),
    ],
)
def test_eight_ranks_24_layers(order: Order, memory: float, efficiency: float, alive: int) -> None:
    """16 micro-batches; the memory is so much of a layer."""
    rest = (1 - memory) / 2
    c = Chain(8, 16, 24, Task(rest, memory, rest), Task(2 * rest, 2 * memory, 2 * rest), order)
    wave = simulate(c)
    assert 1 - wave.idle == pytest.approx(efficiency, abs=1e-3)
    assert wave.alive == alive


def test_2m_tokens_on_64_ranks() -> None:
    """One sequence, all of a step: most of the ranks wait most of the time; in segments less."""
    rest = 5 / 12
    one = Chain(64, 1, 24, Task(rest, 1 / 6, rest), Task(2 * rest, 1 / 3, 2 * rest))
    assert 1 - simulate(one).idle == pytest.approx(0.696, abs=1e-3)
    four = dataclasses.replace(one, micro_batches=4, order="skewed")
    assert 1 - simulate(four).idle == pytest.approx(0.901, abs=1e-3)


def test_segments_follow_one_another() -> None:
    """The first rank begins the next one when the last has left this one: FB waits for that anyway,
    FFBB would not (0.994)."""
    rest = 5 / 12
    c = Chain(8, 8, 24, Task(rest, 1 / 6, rest), Task(2 * rest, 1 / 3, 2 * rest), segments=8)
    assert 1 - simulate(c).idle == pytest.approx(0.954, abs=1e-3)
    ahead = dataclasses.replace(c, order="FFBB")
    assert 1 - simulate(ahead).idle == pytest.approx(0.980, abs=1e-3)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_send_may_wait_for_its_receive_but_in_the_skewed_order(
    ranks: int, segments: int
) -> None:
    c = dataclasses.replace(SLEPT, ranks=ranks, micro_batches=4, segments=segments, blocking=True)
    for order in get_args(Order):
        for stages in (1, 2):
            wave = simulate(dataclasses.replace(c, order=order, stages=stages))
            assert math.isfinite(wave.seconds) == (order != "skewed" or ranks == 1), order


@pytest.mark.parametrize("order", ["FB", "FFBB", "skewed"])
def test_every_micro_batch_goes_forward_then_back(order: Order) -> None:
    for stages, stage, rank in ((1, 0, 0), (1, 0, 3), (3, 1, 2)):
        c = dataclasses.replace(SLEPT, order=order, micro_batches=5, stages=stages)
        ops = program(c, rank, stage)
        for i in range(5):
            assert ops.count(("F", i)) == ops.count(("B", i)) == 1
            assert ops.index(("F", i)) < ops.index(("B", i))
