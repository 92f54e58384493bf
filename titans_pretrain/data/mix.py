"""Sample number -> (source, index in the source): several sources in scheduled shares.

Time runs in frames of FRAME samples. In frame f source i has the weight w_i(f), its share of all
weights there. After f frames it has been read

    C_i(f) = round(FRAME * (w_i(0) + ... + w_i(f - 1)))

times: within half a sample of the schedule, never fewer than after f - 1 frames, and found without
going through them. Frame f so holds C_i(f + 1) - C_i(f) samples of source i, in an order permuted
by a key. Rounding each source by itself makes the frames of K sources a few samples longer or
shorter than FRAME: after f of them, at most K/2 samples lie between their number and f * FRAME.

Shares are integers in units of 2^-32 that add up to one, and all sums are exact.

Letters: K sources, R rows of the table of weights, N points of the schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from titans_pretrain.config import SourceConfig, weight_at
from titans_pretrain.data.order import permute

FRAME = 1 << 10
UNIT = 1 << 32
SHIFT = 22  # FRAME * units >> 32 is units >> 22
STEPS = 1 << 16  # a ramp between two points is climbed in so many steps at most
LAST = 1 << 40  # samples; beyond twice as many the sums would overflow

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Mix:
    """The mix of K sources, a function of (points, key) alone.

    `points`: of each source its [sample number, weight], piecewise linear between, constant beyond
    the ends. At each sample number some weight is above 0.
    """

    def __init__(self, points: Sequence[Sequence[tuple[int, float]]], key: str) -> None:
        self.key, self.sources = key, len(points)
        self._starts, weights = _table(points)  # [R] first frame of each row
        self._units = _shares(weights)  # [R, K], a share in each frame of the row
        lengths = np.diff(self._starts)[:, None]
        before = np.cumsum(self._units[:-1] * lengths, axis=0)
        self._before = np.concatenate([np.zeros_like(self._units[:1]), before])  # [R, K]

    def frame_counts(self, frames: ArrayLike) -> Ints:
        """[..., K]: samples of each source in the frames before each of `frames` [...]: C(f)."""
        frames = np.asarray(frames, np.int64)
        row = np.searchsorted(self._starts, frames, side="right") - 1
        sums = self._before[row] + self._units[row] * (frames - self._starts[row])[..., None]
        return (sums + (1 << (SHIFT - 1))) >> SHIFT

    def locate(self, samples: ArrayLike) -> tuple[Ints, Ints]:
        """Source and index in the source of each sample number (>= 0)."""
        samples = np.asarray(samples, np.int64)
        source, index = np.empty_like(samples), np.empty_like(samples)
        frames = self._frames(samples)
        for frame in np.unique(frames):
            here = frames == frame
            first, end = self.frame_counts([frame, frame + 1])
            size, begin = int((end - first).sum()), int(first.sum())
            rank = permute(samples[here] - begin, size, f"{self.key}:{frame}")
            ends = np.cumsum(end - first)
            which = np.searchsorted(ends, rank, side="right")
            source[here] = which
            index[here] = first[which] + rank - (ends - (end - first))[which]
        return source, index

    def counts(self, sample: int) -> Ints:
        """[K]: samples of each source before sample number `sample`."""
        [frame] = self._frames(np.array([sample], np.int64))
        full = self.frame_counts(frame)
        source, _ = self.locate(np.arange(full.sum(), sample))
        return full + np.bincount(source, minlength=self.sources)

    def shares(self, sample: int) -> Floats:
        """[K]: the share of each source that the schedule asks for at sample number `sample`."""
        row = np.searchsorted(self._starts, sample // FRAME, side="right") - 1
        return self._units[row] / UNIT

    def _frames(self, samples: Ints) -> Ints:
        """The frame of each sample: the one of its number, or a neighbour."""
        guess = samples // FRAME
        begin, end = (self.frame_counts(guess + k).sum(axis=-1) for k in (0, 1))
        return guess + (samples >= end) - (samples < begin)


def mix_of(sources: Mapping[str, SourceConfig], seed: int) -> Mix:
    """The mix of the sources, in the order of the mapping."""
    return Mix([source.points for source in sources.values()], f"mix:{seed}")


def _table(points: Sequence[Sequence[tuple[int, float]]]) -> tuple[Ints, Floats]:
    """(first frame [R], weights [R, K]) of the rows; frames of a row share their weights: those of
    the schedule in the middle of the row."""
    edges = sorted({n for own in points for n, _ in own})
    at = np.array([[weight_at(own, n) for own in points] for n in edges])  # [N, K]
    # A frame belongs to the piece of the schedule that its middle lies in.
    first = [max(0, -(-(2 * n - FRAME) // (2 * FRAME))) for n in edges]
    starts, weights = [np.zeros(1, np.int64)], [at[:1]]
    for p, (begin, end) in enumerate(itertools.pairwise(first)):
        if begin == end:
            continue
        flat = bool((at[p] == at[p + 1]).all())
        stride = end - begin if flat else -(-(end - begin) // STEPS)
        row = np.arange(begin, end, stride, dtype=np.int64)
        middle = (row + np.minimum(row + stride, end)) * (FRAME / 2)
        up = ((middle - edges[p]) / (edges[p + 1] - edges[p]))[:, None]
        starts.append(row)
        weights.append(at[p] + np.clip(up, 0, 1) * (at[p + 1] - at[p]))
    starts.append(np.array(first[-1:], np.int64))
    weights.append(at[-1:])
    rows, table = np.concatenate(starts), np.concatenate(weights)
    last = np.append(np.diff(rows) > 0, True)  # of rows that begin together the last one counts
    return rows[last], np.maximum(table[last], 0)


def _shares(weights: Floats) -> Ints:
    """[R, K] integers, each row adding up to UNIT. Single operations of IEEE arithmetic in a fixed
    order, so that every machine finds the same."""
    total = np.zeros(len(weights))
    for column in weights.T:
        total = total + column
    units = np.floor(weights / total[:, None] * UNIT).astype(np.int64)
    most = (np.arange(len(units)), units.argmax(axis=1))
    units[most] += UNIT - units.sum(axis=1)
    return units
