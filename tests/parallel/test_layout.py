"""Ranges and boxes against numpy's own flattening."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.tiny import tiny_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import flat_range_boxes, plan_layout


@given(st.lists(st.integers(1, 5), min_size=0, max_size=4), st.data())
def test_boxes_are_the_flat_range_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    start = data.draw(st.integers(0, whole.size))
    stop = data.draw(st.integers(start, whole.size))
    boxes = flat_range_boxes(tuple(shape), start, stop)
    got = [
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in boxes
    ]
    assert np.concatenate([*got, np.zeros(0, int)]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_micro_batches_follow_from_the_world_size() -> None:
    config = tiny_config(train__global_batch=8, train__micro_batch=2)
    assert [plan_layout(config, n).micro_batches for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ConfigError, match=r"3 data-parallel ranks.*\n.*\n.*global_batch=6"):
        plan_layout(config, 3)
