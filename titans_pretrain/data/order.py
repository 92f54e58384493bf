"""Sample number -> (epoch, shard, block): the order of training as pure functions.

An epoch visits every block of every shard once. A block is `sequence_length` padded tokens of one
shard; a shard's last block may be partly filled (the rest of the row is pads): nothing is dropped,
and a row never straddles two shards. Each epoch permutes the shards, groups them into windows of
`WINDOW` shards and permutes the blocks inside a window, so that few shards are open at a time.
Permutations are keyed Feistel networks with cycle walking: no table of blocks is ever built, and
any sample is found in constant time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 16  # shards shuffled together: bounds open files and the working set on disk
NEAR = 32  # draws from the window of a row that cannot be read, before any other
ROUNDS = 6  # even, so that halves of unequal width are back in their place

Ints = NDArray[np.int64]


def permute(index: ArrayLike, n: int, key: str) -> Ints:
    """A keyed bijection of 0..n-1, applied to `index` (any shape, values in 0..n-1)."""
    x = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    if n > 1:
        keys = _round_keys(key)
        bits = max(2, (n - 1).bit_length())
        x = _feistel(x, bits, keys)
        # Cycle walking: a value outside 0..n-1 is permuted again until it falls inside. The domain
        # is less than twice n (at n >= 3), so this ends after about one extra pass on average.
        outside = np.flatnonzero(x >= n)
        while outside.size:
            x[outside] = _feistel(x[outside], bits, keys)
            outside = outside[x[outside] >= n]
    return x.astype(np.int64).reshape(np.shape(index))


def _feistel(x: NDArray[np.uint64], bits: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of the integers of `bits` bits: halves of a and b bits that change places."""
    a, b = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(b), x & np.uint64((1 << b) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & np.uint64((1 << a) - 1))
        a, b = b, a
    return (left << np.uint64(b)) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit (modulo 2^64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: str) -> list[np.uint64]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return list(np.frombuffer(digest, "<u8"))


@dataclass(frozen=True)
class Address:
    """Where samples lie: arrays of one shape."""

    epoch: Ints
    shard: Ints  # index into the split's shards, in the manifest's order
    block: Ints  # block inside the shard


class Order:
    """The order of one split, a function of (key, blocks of each shard) alone.

    `key` holds the manifest's hash and the run's seed; `blocks` [shards] counts the blocks of
    each shard at the run's sequence length and alignment.
    """

    def __init__(self, blocks: ArrayLike, key: str, window: int = WINDOW) -> None:
        self.blocks = np.asarray(blocks, dtype=np.int64)
        self.total = int(self.blocks.sum())  # samples of one epoch
        self.key, self.window = key, window
        self._epoch: tuple[int, Ints, Ints] | None = None

    def locate(self, samples: ArrayLike) -> Address:
        """Epoch, shard and block of each sample number (>= 0)."""
        samples = np.asarray(samples, dtype=np.int64)
        epoch, index = np.divmod(samples, self.total)
        shard, block = np.empty_like(index), np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            shard[here], block[here] = self._locate_in_epoch(int(e), index[here])
        return Address(epoch, shard, block)

    def window_of(self, sample: int) -> int:
        """The number of the window that a sample lies in, counted through all epochs."""
        epoch, index = divmod(sample, self.total)
        _, ends = self._table(epoch)
        position = int(np.searchsorted(ends, index, side="right"))
        return epoch * -(-len(ends) // self.window) + position // self.window

    def shards_in(self, window: int) -> list[int]:
        """The shards of a window, by its number."""
        epoch, number = divmod(window, -(-len(self.blocks) // self.window))
        shards, _ = self._table(epoch)
        return shards[number * self.window : (number + 1) * self.window].tolist()

    def draw(self, sample: int, attempt: int) -> tuple[int, int]:
        """Shard and block of another row than `sample`'s, in case that cannot be read: from the
        sample's own window for the first attempts (its shards are at hand), then from anywhere."""
        epoch, index = divmod(sample, self.total)
        shards, ends = self._table(epoch)
        begin, end = 0, self.total
        if attempt < NEAR:
            number = int(np.searchsorted(ends, index, side="right")) // self.window
            last = min((number + 1) * self.window, len(ends)) - 1
            begin, end = int(ends[number * self.window - 1]) if number else 0, int(ends[last])
        key = f"{self.key}:{sample}:draw:{attempt}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        place = begin + drawn % (end - begin)
        which = int(np.searchsorted(ends, place, side="right"))
        return int(shards[which]), place - int(ends[which] - self.blocks[shards[which]])

    def _locate_in_epoch(self, epoch: int, index: Ints) -> tuple[Ints, Ints]:
        shards, ends = self._table(epoch)
        starts = ends - self.blocks[shards]
        last_of_window = np.minimum(
            np.arange(self.window - 1, len(shards) + self.window - 1, self.window), len(shards) - 1
        )
        window_ends = ends[last_of_window]
        window = np.searchsorted(window_ends, index, side="right")
        place = np.empty_like(index)
        for w in np.unique(window):
            begin = int(window_ends[w - 1]) if w else 0
            here = window == w
            size = int(window_ends[w]) - begin
            place[here] = begin + permute(index[here] - begin, size, f"{self.key}:{epoch}:{w}")
        which = np.searchsorted(ends, place, side="right")
        return shards[which], place - starts[which]

    def _table(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in their order, and the blocks up to and with each of them."""
        if self._epoch is None or self._epoch[0] != epoch:
            n = len(self.blocks)
            shards = permute(np.arange(n), n, f"{self.key}:{epoch}:shards")
            self._epoch = (epoch, shards, np.cumsum(self.blocks[shards]))
        return self._epoch[1], self._epoch[2]


def take(next_sample: int, count: int, skips: list[tuple[int, int]]) -> tuple[Ints, int]:
    """The next `count` sample numbers from `next_sample` on, leaving out the intervals
    [start, stop) of `skips`; and the sample number after the last of them."""
    taken: list[Ints] = []
    for start, stop in [*sorted(skips), (None, None)]:
        room = count if start is None else min(count, max(0, start - next_sample))
        taken.append(np.arange(next_sample, next_sample + room, dtype=np.int64))
        count, next_sample = count - room, next_sample + room
        if count == 0:
            break
        if stop is not None:
            next_sample = max(next_sample, stop)
    return np.concatenate(taken), next_sample


def validation_blocks(blocks: ArrayLike, rows: int, key: str) -> tuple[Ints, Ints]:
    """(shard, block) of the rows that a validation reads: all, or `rows` > 0 of them chosen by
    `key` alone, in the manifest's order."""
    blocks = np.asarray(blocks, dtype=np.int64)
    ends = np.cumsum(blocks)
    total = int(ends[-1])
    chosen = np.arange(total)
    if 0 < rows < total:
        chosen = np.sort(permute(np.arange(rows), total, f"{key}:validation"))
    shards = np.searchsorted(ends, chosen, side="right")
    return shards, chosen - (ends - blocks)[shards]
