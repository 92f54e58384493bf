"""The mix against its schedule in exact fractions, and against going sample by sample."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from titans_pretrain.config import weight_at
from titans_pretrain.data import mix as module
from titans_pretrain.data.mix import FRAME, UNIT, Mix

weights = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.integers(0, 5).map(float))
numbers = st.lists(st.integers(0, 6 * FRAME), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def schedules(draw, most=5):
    """Points of 1 to `most` sources; at each sample number some weight is above 0."""
    sources = draw(st.integers(1, most))
    points = [[(n, draw(weights)) for n in draw(numbers)] for _ in range(sources)]
    for n in sorted({n for own in points for n, _ in own}):
        if not any(weight_at(own, n) for own in points):
            points[0] = [(0, 1.0)]
    return points


def asked(points, frames):
    """[frames + 1][source]: samples that the schedule asks for, in exact fractions."""

    def weight(own, at):
        for (a, low), (b, high) in itertools.pairwise(own):
            if a <= at < b:
                return Fraction(low) + (at - a) * (Fraction(high) - Fraction(low)) / (b - a)
        return Fraction(own[0][1] if at < own[0][0] else own[-1][1])

    sums = [[Fraction(0)] * len(points)]
    for frame in range(frames):
        now = [weight(own, Fraction(2 * frame + 1, 2) * FRAME) for own in points]
        sums.append([s + FRAME * w / sum(now) for s, w in zip(sums[-1], now)])
    return sums


@given(points=schedules(), frames=st.integers(1, 9))
def test_each_source_is_within_half_a_sample_of_its_schedule(points, frames):
    counts = Mix(points, "k").frame_counts(np.arange(frames + 1))
    rounding = Fraction(frames * FRAME * len(points) * 2, UNIT)
    for have, want in zip(counts.tolist(), asked(points, frames)):
        for a, b in zip(have, want):
            assert abs(a - b) <= Fraction(1, 2) + rounding
    assert (np.diff(counts, axis=0) >= 0).all()
    # Frames are as long as their quotas: K/2 samples at most from frame * FRAME.
    drift = counts.sum(axis=1) - FRAME * np.arange(frames + 1)
    assert np.abs(drift).max() <= len(points) / 2


@given(points=schedules())
def test_each_source_s_samples_once_and_frame_after_frame(points):
    mix = Mix(points, "k")
    ends = mix.frame_counts(np.arange(9))
    total = ends.sum(axis=1)
    source, index = mix.locate(np.arange(total[-1]))
    for i in range(len(points)):
        mine = index[source == i]
        assert sorted(mine.tolist()) == list(range(ends[-1, i]))
        for f in range(8):
            here = slice(total[f], total[f + 1])
            inside = index[here][source[here] == i]
            assert sorted(inside.tolist()) == list(range(ends[f, i], ends[f + 1, i]))


@given(points=schedules(), samples=st.lists(st.integers(0, 8 * FRAME), min_size=1, max_size=20))
def test_any_sample_alone_is_as_among_others(points, samples):
    source, index = Mix(points, "k").locate(np.arange(8 * FRAME + 1))
    for sample in samples:
        alone = Mix(points, "k").locate([sample])
        assert (alone[0][0], alone[1][0]) == (source[sample], index[sample])
        counts = Mix(points, "k").counts(sample)
        assert counts.tolist() == np.bincount(source[:sample], minlength=len(points)).tolist()


@given(points=schedules(), sample=st.integers(0, module.LAST))
@example(points=[[(0, 1.0)]] * 3, sample=module.LAST)  # thirds are no whole units
def test_neighbours_stay_apart_far_out(points, sample):
    """Frames far away: each sample in the frame whose quotas hold it."""
    mix = Mix(points, "k")
    source, index = mix.locate(np.arange(sample, sample + 300))
    assert len(set(zip(source.tolist(), index.tolist()))) == 300
    frame = sample // FRAME
    low, high = mix.frame_counts([max(0, frame - 1), frame + 3])
    assert (index >= low[source]).all() and (index < high[source]).all()
    counts = mix.frame_counts(frame)
    assert abs(int(counts.sum()) - frame * FRAME) <= len(points) / 2


def test_samples_are_mixed_inside_a_frame():
    source, _ = Mix([[(0, 0.7)], [(0, 0.3)]], "k").locate(np.arange(64 * FRAME))
    shares = source.reshape(-1, 128).mean(axis=1)
    # Drawn without order 128 of 1024 have a standard deviation of 0.038.
    assert 0.03 < shares.std() < 0.046
    assert source.mean() == pytest.approx(0.3, abs=1e-5)
    other, _ = Mix([[(0, 0.7)], [(0, 0.3)]], "l").locate(np.arange(64 * FRAME))
    assert 0.5 < (source == other).mean() < 0.66


def test_a_ramp_and_a_jump_by_hand():
    """Weight 0 to 4096, then a line to 1 at 12288, beside a constant 1: shares w / (1 + w)."""
    mix = Mix([[(4096, 0.0), (12288, 1.0)], [(0, 1.0)]], "k")
    counts = mix.frame_counts(np.arange(15))[:, 0]
    assert counts[:5].tolist() == [0] * 5
    grown = [(f + 0.5) / 8 for f in range(8)]
    expected = np.cumsum([1024 * w / (1 + w) for w in [*grown, 1, 1]])
    assert np.abs(counts[5:] - expected).max() <= 0.5
    assert mix.shares(0).tolist() == [0, 1] and mix.shares(10**9).tolist() == [0.5, 0.5]
    jump = Mix([[(0, 1.0), (2048, 1.0), (2049, 0.0)], [(0, 1.0)]], "k")
    assert jump.frame_counts([2, 4]).tolist() == [[1024, 1024], [1024, 3072]]


def test_a_long_ramp_is_climbed_in_bounded_steps():
    mix = Mix([[(0, 0.0), (10**11, 3.0)], [(0, 1.0)]], "k")
    assert len(mix._starts) <= module.STEPS + 2
    frame = 10**11 // FRAME
    # The integral of w / (1 + w) from 0 to 3, times 10^11 / 3.
    expected = (3 - np.log(4)) / 3 * 1e11
    assert int(mix.frame_counts(frame)[0]) == pytest.approx(expected, rel=1e-8)


def test_tiny_weights_are_read_and_zeros_never():
    mix = Mix([[(0, 1.0)], [(0, 1e-6)], [(0, 0.0)]], "k")
    counts = mix.frame_counts(10**7)
    assert counts[2] == 0 and counts[1] == pytest.approx(10240, abs=3)


def test_the_mix_is_pinned():
    """A change of the mix would break resuming: these values may never change."""
    mix = Mix([[(0, 0.7)], [(0, 0.3), (100_000, 0.5)], [(5000, 0.0), (6000, 0.01)]], "pinned")
    got = [list(zip(*(a.tolist() for a in mix.locate(np.arange(n, n + 4))))) for n in (0, 10**9)]
    assert got == PINNED
    assert mix.counts(123_456).tolist() == PINNED_COUNTS


PINNED = [
    [(0, 110), (0, 681), (1, 137), (0, 577)],
    [(1, 413217801), (0, 578518095), (0, 578517565), (0, 578517915)],
]
PINNED_COUNTS = [76845, 45568, 1043]
