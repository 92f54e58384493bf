import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.data.order import Order, permute, take

blocks = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(sum)


@given(n=st.integers(1, 5000), key=st.text(max_size=8))
def test_permutation_is_a_bijection_of_any_size(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=st.integers(2, 2**40), seed=st.integers(0, 2**32))
def test_permutation_of_huge_sets_stays_inside_and_apart(n, seed):
    index = np.unique(np.random.default_rng(seed).integers(0, n, 200))
    image = permute(index, n, str(seed))
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)
    assert permute(index[:1], n, str(seed))[0] == image[0]


def test_permutation_shuffles():
    """Mean displacement of a random permutation is n / 3, its fixed points about one."""
    n = 10_000
    for key in "abc":
        moved = np.abs(permute(np.arange(n), n, key) - np.arange(n))
        assert 0.31 * n < moved.mean() < 0.36 * n
        assert (moved == 0).sum() < 8
    assert (permute(np.arange(n), n, "a") == permute(np.arange(n), n, "b")).sum() < 8


@given(blocks=blocks, window=st.integers(1, 8), epochs=st.integers(1, 3))
def test_every_block_once_an_epoch(blocks, window, epochs):
    order = Order(blocks, "key", window)
    everything = [(s, b) for s, n in enumerate(blocks) for b in range(n)]
    address = order.locate(np.arange(epochs * order.total))
    for epoch in range(epochs):
        here = address.epoch == epoch
        seen = sorted(zip(address.shard[here].tolist(), address.block[here].tolist()))
        assert seen == everything


@given(blocks=blocks, window=st.integers(1, 8))
def test_windows_hold_their_shards(blocks, window):
    """Samples of one window come from `window` shards, and no shard comes back later."""
    order = Order(blocks, "key", window)
    shards = order.locate(np.arange(order.total)).shard.tolist()
    full = list(dict.fromkeys(shards))
    last = {s: max(i for i, x in enumerate(shards) if x == s) for s in full}
    first = {s: shards.index(s) for s in full}
    for i in range(len(shards)):
        assert sum(first[s] <= i <= last[s] for s in full) <= window


@given(blocks=blocks, samples=st.lists(st.integers(0, 10_000), max_size=30))
def test_any_sample_alone_is_as_among_others(blocks, samples):
    order = Order(blocks, "key", 3)
    together = order.locate(samples)
    for i, sample in enumerate(samples):
        alone = Order(blocks, "key", 3).locate([sample])
        assert alone.shard[0] == together.shard[i] and alone.block[0] == together.block[i]


def test_epochs_and_keys_differ():
    order = Order([50, 60, 70], "key")
    first, second = order.locate(np.arange(180)), order.locate(np.arange(180, 360))
    other = Order([50, 60, 70], "another").locate(np.arange(180))
    for a in (second, other):
        same = (first.shard == a.shard) & (first.block == a.block)
        assert same.mean() < 0.05


def test_order_is_pinned():
    """A change of the order would break resuming: these values may never change."""
    address = Order([5, 3, 7, 2], "pinned", 2).locate(np.arange(17))
    assert list(zip(address.shard.tolist(), address.block.tolist())) == PINNED


PINNED = [
    (3, 0),
    (1, 0),
    (3, 1),
    (1, 1),
    (1, 2),
    (0, 4),
    (2, 4),
    (0, 2),
    (2, 0),
    (2, 2),
    (2, 5),
    (2, 3),
    (2, 6),
    (2, 1),
    (0, 1),
    (0, 3),
    (0, 0),
]


@given(
    skips=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=4),
    counts=st.lists(st.integers(1, 15), min_size=1, max_size=6),
)
def test_take_leaves_out_the_skipped(skips, counts):
    intervals = [(a, a + n) for a, n in skips]
    allowed = [n for n in range(400) if not any(a <= n < b for a, b in intervals)]
    found, following = [], 0
    for count in counts:
        samples, following = take(following, count, intervals)
        assert len(samples) == count
        found += samples.tolist()
    assert found == allowed[: len(found)]


@pytest.mark.parametrize("shards", [1, 4000])
def test_locating_takes_no_table_of_blocks(shards):
    order = Order([10**9] * shards, "key")
    address = order.locate(np.arange(10**12 % order.total, 10**12 % order.total + 10))
    assert address.block.max() < 10**9
