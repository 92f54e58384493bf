"""Ranges and boxes against numpy's own flattening."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.tiny import tiny_config
from tests.prepared import ROOT
from titans_pretrain.config import load_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import flat_range_boxes, plan_layout, require_built

SIZES = sorted((ROOT / "configs").glob("titans-*.yaml"))


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


# Data-parallel degree and micro-batches of a rank, by file and number of GPUs: 1, 8 and 64 nodes.
SHIPPED = {
    "titans-170m": {8: (8, 8), 64: (64, 1)},
    "titans-340m": {8: (8, 8), 64: (64, 1)},
    "titans-400m": {8: (8, 8), 64: (64, 1)},
    "titans-760m": {8: (8, 8), 64: (64, 1)},
    "titans-1.3b": {8: (2, 64), 64: (16, 8), 512: (128, 1)},
}


def test_the_shipped_sizes_fill_one_and_eight_nodes_and_the_largest_64() -> None:
    assert {path.stem for path in SIZES} == set(SHIPPED)
    for path in SIZES:
        config = load_config(path)
        for gpus, (data_parallel, micro_batches) in SHIPPED[path.stem].items():
            layout = plan_layout(config, gpus)
            assert layout.world_size == gpus
            assert (layout.data_parallel, layout.micro_batches) == (data_parallel, micro_batches)
            assert layout.data_parallel * layout.tensor == gpus
            rows = config.train.micro_batch * layout.micro_batches * layout.data_parallel
            assert rows * config.data.sequence_length == 524_288


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_node_s_degrees_divide_every_size(tensor: int) -> None:
    for path in SIZES:
        config = load_config(path, [f"parallel.tensor={tensor}"])
        assert plan_layout(config, 64).data_parallel == 64 // tensor


# Overrides of the 1.3B, ranks -> the value told and the remedy.
BAD = {
    ("parallel.tensor=4", 6): ("parallel.tensor=4, 6 ranks", "parallel.tensor=2"),
    ("parallel.tensor=16", 64): ("model.heads=8, parallel.tensor=16", "parallel.tensor=8"),
    ("model.kv_heads=2", 64): ("model.kv_heads=2, parallel.tensor=4", "parallel.tensor=2"),
    ("model.mlp_width=5506", 64): ("model.mlp_width=5506", "model.mlp_width=5508"),
    ("model.vocab_size=32001", 64): ("model.vocab_size=32001", "model.vocab_size=32004"),
    ("parallel.tensor=2", 512): ("256 data-parallel ranks", "train.global_batch=256"),
    ("train.micro_batch=2", 512): ("128 data-parallel ranks", "train.global_batch=256"),
    ("train.ramp={start: 8, steps: 100}", 64): ("train.ramp.start=8", "multiple of 16"),
}


@pytest.mark.parametrize(("override", "ranks"), BAD)
def test_a_layout_that_does_not_fit_is_told_with_its_remedy(override: str, ranks: int) -> None:
    config = load_config(ROOT / "configs" / "titans-1.3b.yaml", [override])
    with pytest.raises(ConfigError) as caught:
        plan_layout(config, ranks)
    value, remedy = BAD[override, ranks]
    assert value in caught.value.value
    assert remedy in caught.value.remedy
    assert caught.value.rule


def test_tensor_parallel_training_is_refused_until_its_layers_are_there() -> None:
    from titans_pretrain.train import run_training

    config = load_config(ROOT / "configs" / "titans-1.3b.yaml")
    for refuse in (require_built, run_training):  # before a process group, data or a folder
        with pytest.raises(ConfigError) as caught:
            refuse(config)
        assert caught.value.value == "parallel.tensor=4"
        assert caught.value.rule == "tensor parallel layers are not built yet"
        assert caught.value.remedy == "set parallel.tensor=1"
    one = load_config(ROOT / "configs" / "titans-1.3b.yaml", ["parallel.tensor=1"])
    require_built(one)
