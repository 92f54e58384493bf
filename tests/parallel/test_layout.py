"""Ranges and boxes against numpy's own flattening."""

import hashlib
import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parallel.tiny import T, tiny_config
from tests.prepared import ROOT
from tests.worlds import run_world
from titans_pretrain.config import RunConfig, dump_config, load_config
from titans_pretrain.cut import cut_blocks
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import (
    Fragment,
    Layout,
    Place,
    Shard,
    flat_range_boxes,
    plan_layout,
    split_blocks,
)
from titans_pretrain.parallel.legal import RULES
from titans_pretrain.parallel.megatron import parallel_state
from titans_pretrain.parallel.world import start_world, world_size

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


# GPUs (1, 8 and 64 nodes) and override -> data-parallel degree and micro-batches of a rank.
SMALL = {(8, ""): (8, 1), (64, "parallel.context=8"): (8, 1)}
SHIPPED = {
    "titans-170m": SMALL,
    "titans-340m": SMALL,
    "titans-400m": SMALL,
    "titans-760m": SMALL,
    "titans-1.3b": {
        (8, "train.micro_batch=16"): (1, 8),
        (64, "train.micro_batch=16"): (8, 1),
        (512, ""): (64, 1),
    },
}


def test_the_shipped_sizes_fill_one_and_eight_nodes_and_the_largest_64() -> None:
    assert {path.stem for path in SIZES} == set(SHIPPED)
    for path in SIZES:
        for (gpus, override), (data_parallel, micro_batches) in SHIPPED[path.stem].items():
            config = load_config(path, override.split())
            layout = plan_layout(config, gpus)
            assert layout.world_size == gpus
            assert (layout.data_parallel, layout.micro_batches) == (data_parallel, micro_batches)
            assert layout.data_parallel * layout.context == gpus
            rows = config.train.micro_batch * layout.micro_batches * layout.data_parallel
            assert rows * config.data.sequence_length == 524_288


ALONE = ("parallel.context=1", "train.micro_batch=1")


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_a_node_s_degrees_divide_every_size(tensor: int) -> None:
    for path in SIZES:
        config = load_config(path, [*ALONE, f"parallel.tensor={tensor}"])
        assert plan_layout(config, 64).data_parallel == 64 // tensor


# Overrides of the 1.3B in TP4, ranks -> the value told and the remedy.
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
    config = load_config(
        ROOT / "configs" / "titans-1.3b.yaml", [*ALONE, "parallel.tensor=4", override]
    )
    with pytest.raises(ConfigError) as caught:
        plan_layout(config, ranks)
    value, remedy = BAD[override, ranks]
    assert value in caught.value.value
    assert remedy in caught.value.remedy
    assert caught.value.rule


# For each rule in turn, once or more: overrides of the tiny config, ranks, what the value and the
# remedy name.
REFUSED = [
    ({"zero": {"stage": 0}}, {}, 1, "parallel.zero.stage=0", "parallel.zero.stage=1"),
    ({"tensor": 2, "pipeline": 2}, {}, 6, "6 ranks", "a multiple of 4 ranks"),
    ({"tensor": 4}, {}, 4, "model.heads=2, parallel.tensor=4", "parallel.tensor=2"),
    (  # the MLP's width is the model's own where the config names none
        {"tensor": 3},
        {"model__width": 48, "model__heads": 6, "model__mlp_width": None, "model__vocab_size": 63},
        3,
        "model.mlp_width=128, parallel.tensor=3",
        "use parallel.tensor=1, or model.mlp_width=129",
    ),
    ({"sequence": True}, {}, 1, "parallel.tensor=1", "parallel.tensor above 1"),
    (
        {"tensor": 2, "sequence": True, "segments": 3},
        {"model__vocab_size": 64},
        2,
        "parallel.segments=3, parallel.sequence=true",
        "a sequence_length that 6 divides",
    ),
    ({"pipeline": 3}, {}, 3, "model.blocks=2", "at most 2"),
    ({"interleave": 2}, {}, 1, "parallel.interleave=2", "parallel.interleave=1"),
    ({"pipeline": 2, "zero": {"stage": 2}}, {}, 2, "parallel.pipeline=2", "zero.stage=1"),
    ({"pipeline": 2, "zero": {"stage": 3}}, {}, 2, "parallel.pipeline=2", "zero.stage=1"),
    ({"context": 2, "zero": {"stage": 2}}, {}, 2, "parallel.context=2", "zero.stage=1"),
    ({"context": 2, "zero": {"stage": 3}}, {}, 2, "parallel.context=2", "zero.stage=1"),
    ({"order": "FFBB", "zero": {"stage": 2}}, {}, 1, "parallel.order=FFBB", "parallel.order=FB"),
    ({"zero": {"overlap": True}}, {}, 1, "parallel.zero.overlap=true", "zero.stage=2"),
    ({"zero": {"stage": 3, "copy_within": 3}}, {}, 2, "copy_within=3", "copy_within=1"),
    (
        {"context": 8},
        {"model__variant": "lmm"},
        8,
        "data.sequence_length=32, parallel.context=8, parallel.segments=1, model.memory.chunk=8",
        "data.sequence_length=64",
    ),
    ({"order": "FFBB", "pipeline": 2}, {}, 2, "parallel.order=FFBB", "parallel.order=FB"),
    ({}, {}, 3, "3 data-parallel ranks", "train.global_batch=6"),
    ({}, {"train__ramp": {"start": 2, "steps": 2}}, 2, "train.ramp.start=2", "multiple of 4"),
    (
        {"pipeline": 2, "interleave": 2},
        {"train__global_batch": 6, "model__blocks": 4},
        2,
        "train.global_batch=6, train.micro_batch=2, 1 data-parallel ranks: 3 micro-batches",
        "a multiple of 4",
    ),
]


def test_each_rule_has_a_layout_that_breaks_it() -> None:
    broken = []
    for parallel, changes, ranks, value, remedy in REFUSED:
        config = tiny_config(parallel=parallel, **changes)
        with pytest.raises(ConfigError) as caught:
            plan_layout(config, ranks)
        broken.append(caught.value.rule)
        assert value in caught.value.value and remedy in caught.value.remedy, caught.value
    assert list(dict.fromkeys(broken)) == [f"{rule.rule}: {rule.why}" for rule in RULES]


def test_a_transformer_is_told_of_no_chunk() -> None:
    config = tiny_config(parallel={"context": 3})
    with pytest.raises(ConfigError) as caught:
        plan_layout(config, 3)
    assert caught.value.value.endswith("parallel.context=3, parallel.segments=1")


@pytest.mark.parametrize("ranks", [0, -2])
def test_no_ranks_have_no_layout(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"{ranks} ranks"):
        plan_layout(tiny_config(), ranks)


def test_a_layout_is_refused_before_any_process_group() -> None:
    from titans_pretrain.train import run_training

    with pytest.raises(ConfigError, match=r"parallel\.context=8, 1 ranks"):
        run_training(load_config(ROOT / "configs" / "titans-1.3b.yaml"))


def coordinates(config: RunConfig) -> tuple[Place, Place]:
    layout = plan_layout(config, world_size())
    world = start_world(config.train, layout)
    megatron = Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    place = world.place
    world.shut_down()
    return place, megatron


def test_ranks_stand_where_megatron_has_them() -> None:
    parallel = {"tensor": 2, "pipeline": 2, "context": 2}
    found = run_world(coordinates, 8, tiny_config(parallel=parallel, model__vocab_size=64))
    assert all(place == megatron for place, megatron in found)
    assert len({place for place, _ in found}) == 8


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(1, 7))
def test_blocks_are_cut_so_that_the_dearest_piece_is_cheapest(
    costs: list[int], head: int, pieces: int
) -> None:
    pieces = min(pieces, len(costs))

    def dearest(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max([*sums[:-1], sums[-1] + head])

    found = split_blocks(costs, head, pieces)
    assert [i for piece in found for i in piece] == list(range(len(costs)))
    assert all(found) and len(found) == pieces
    all_cuts = itertools.combinations(range(1, len(costs)), pieces - 1)
    best = min(dearest(cuts) for cuts in all_cuts)
    assert dearest(tuple(piece.start for piece in found[1:])) == best


def test_a_large_vocabulary_leaves_the_last_stage_fewer_blocks() -> None:
    """A block of the tiny transformer takes 21,504 FLOPs a token forward, the head 64 a word (that
    of 1000 words as much as three blocks, of 4000 as twelve), and the embedding none."""
    for vocabulary, sizes in ((61, [4, 4]), (1000, [5, 3]), (4000, [7, 1])):
        model = tiny_config(model__blocks=8, model__vocab_size=vocabulary).model
        assert [len(piece) for piece in cut_blocks(model, 2, T)] == sizes


def test_a_fragment_of_a_shard_fills_boxes_of_the_whole() -> None:
    whole = np.arange(6 * 8).reshape(6, 8)
    shard = Shard("w", (6, 8), dim=1, index=1, parts=2)
    local = np.ascontiguousarray(whole[:, 4:]).reshape(-1)
    fragment = Fragment(shard, 5, 14, {})
    cut = [
        whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1)
        for box in fragment.boxes()
    ]
    assert np.concatenate(cut).tolist() == local[5:19].tolist()


def test_a_layout_says_what_it_is() -> None:
    config = tiny_config(
        parallel={"tensor": 2, "sequence": True, "pipeline": 2}, model__vocab_size=64
    )
    layout = plan_layout(config, 8)
    assert isinstance(layout, Layout) and not layout.whole
    assert layout.describe() == "TP 2 + SP, PP 2, CP 1, DP 2, ZeRO-1"


def another_config(config: RunConfig, other: RunConfig) -> str:
    mine = other if os.environ["RANK"] == "2" else config
    try:
        start_world(mine.train, plan_layout(mine, world_size()), said=dump_config(mine))
    except ConfigError as e:
        return str(e)
    return "joined"


def test_ranks_that_disagree_on_the_config_say_so_on_every_rank() -> None:
    """Another degree on one rank: found before the groups that it would make wait for ever."""
    config = tiny_config()
    other = tiny_config(parallel={"pipeline": 2})
    told = run_world(another_config, 4, config, other, timeout=60)
    digest = [hashlib.sha256(dump_config(c).encode()).hexdigest()[:12] for c in (config, other)]
    for rank, words in enumerate(told):
        assert f"{digest[0]} on ranks 0, 1, 3; {digest[1]} on rank 2" in words
        assert f"this rank's is {digest[rank == 2]}" in words
        assert "same file, overrides and options" in words
