"""Traces of context ranks: blocks and waits are ranges, and on one clock the wave is seen."""

from __future__ import annotations

import gzip
import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.tiny import micro_batches, tiny_config
from tests.worlds import run_world
from titans_pretrain.cli import main
from titans_pretrain.errors import DataError
from titans_pretrain.measure.lanes import Span, draw, idle_shares, read_traces
from titans_pretrain.measure.profile import Profile
from titans_pretrain.measure.wave_benchmark import chain_of, spans_of
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.wavefront import simulate
from titans_pretrain.parallel.world import start_world
from titans_pretrain.step import TrainStep

BLOCKS, SLEEP = 4, 0.1


def profiled(folder: str, recompute: str) -> list[Any]:
    """Three steps of a chain of two, looked at in the second: losses and weights."""
    config = tiny_config(
        model__variant="lmm",
        model__blocks=BLOCKS,
        parallel__context=2,
        train__recompute=recompute,
        train__global_batch=2,
        profile__steps=[2, 2] if folder else None,
        profile__ranks=[0, 1],
    )
    layout = plan_layout(config, 2)
    world = start_world(config.train, layout)
    step = TrainStep(config, layout, world)
    profile = Profile(config, Path(folder), world, step.stages, 1, 3)
    write = MemoryLayer.write

    def slowly(*args: Any) -> Any:
        time.sleep(SLEEP if folder else 0)
        return write(*args)

    MemoryLayer.write = slowly  # type: ignore[method-assign]
    losses = []
    for s in (1, 2, 3):
        profile.reach(s)
        losses.append(step(micro_batches(config, s, 0, 1), s).loss)
    profile.close()
    assert "forward" not in vars(step.stages[0].model.blocks["0"])  # nothing is left behind
    assert step.link is not None and "receive" not in vars(step.link)
    weights = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    world.shut_down()
    return [losses, weights]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    run_world(profiled, 2, str(path), "none", timeout=200)
    return path / "profile" / "step-2-2"


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[Span]:
    return read_traces(folder)


def spans(seen: list[Span], rank: int, name: str) -> dict[int, Span]:
    """Layer -> its only span of that name."""
    found = [s for s in seen if (s.rank, s.name) == (rank, name)]
    assert len(found) == len({s.layer for s in found}) == BLOCKS, (rank, name)
    return {s.layer: s for s in found}


def within(inner: Span, outer: Span) -> bool:
    return outer.begin <= inner.begin and inner.end <= outer.end


def test_the_next_rank_is_a_layer_behind(seen: list[Span]) -> None:
    first, second = (spans(seen, rank, "forward") for rank in (0, 1))
    both = [
        min(first[n + 1].end, second[n].end) - max(first[n + 1].begin, second[n].begin)
        for n in range(BLOCKS - 1)
    ]
    assert max(both) > 0.2 * SLEEP, both  # rank 0 in layer n + 1 while rank 1 is in layer n
    for n in range(BLOCKS):
        assert second[n].end > first[n].end


def test_waits_are_named_and_lie_in_their_blocks(folder: Path, seen: list[Span]) -> None:
    forward, waits = spans(seen, 1, "forward"), spans(seen, 1, "waits for memory")
    assert all(within(waits[n], forward[n]) for n in range(BLOCKS))
    assert waits[0].end - waits[0].begin > 0.5 * SLEEP  # while rank 0 is in its first memory
    backward = spans(seen, 0, "backward")
    waits = spans(seen, 0, "waits for gradient of memory")
    assert all(within(waits[n], backward[n]) for n in range(BLOCKS))
    for n in range(BLOCKS - 1):  # backward goes through the blocks from the last to the first
        assert backward[n + 1].end <= backward[n].begin
    told = {(s.rank, s.name) for s in seen}
    assert (0, "waits for memory") not in told  # nobody is before it
    assert (1, "waits for gradient of memory") not in told
    shares = idle_shares(seen)
    assert 0 < shares[0] < 1 and 0 < shares[1] < 1
    summary = (folder / "rank-1.summary.txt").read_text()
    assert "  waits for memory" in summary and "  backward" in summary


def test_all_ranks_are_put_on_one_clock_and_drawn(
    folder: Path, seen: list[Span], capsys: Any
) -> None:
    now = time.time()
    assert all(now - 1800 < s.begin < now for s in seen)
    assert main(["bench", "wave", "--traces", str(folder)]) == 0
    assert "rank 1: waits for its neighbours" in capsys.readouterr().out
    trace = json.loads(gzip.decompress((folder / "lanes.trace.json.gz").read_bytes()))
    ranges = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["pid"] for e in ranges} == {0, 1} and min(e["ts"] for e in ranges) == 0
    picture = ElementTree.fromstring((folder / "lanes.svg").read_text())
    titles = [t.text or "" for t in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == len(ranges) == len(seen)
    assert any(t.startswith("rank 1, layer 3 waits for memory, ") for t in titles)


@pytest.mark.slow
def test_a_recomputed_block_is_told_and_no_number_changes(tmp_path: Path) -> None:
    looked = run_world(profiled, 2, str(tmp_path), "blocks", timeout=150)
    plain = run_world(profiled, 2, "", "blocks", timeout=150)
    assert looked[0][0] == plain[0][0]
    assert all(torch.equal(looked[0][1][name], w) for name, w in plain[0][1].items())
    seen = read_traces(tmp_path / "profile" / "step-2-2")
    for rank in (0, 1):
        again, backward = (spans(seen, rank, name) for name in ("recompute", "backward"))
        assert all(within(again[n], backward[n]) for n in range(BLOCKS))


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trace of a rank"):
        read_traces(tmp_path)


def test_a_simulated_wave_is_drawn() -> None:
    c = chain_of(3, 4, 0.036, 1 / 3)
    lanes = spans_of(simulate(c).acts)
    assert len([s for s in lanes if not s.waits]) == 3 * 4 * 2
    assert {s.rank for s in lanes if s.name == "waits for state"} == {1, 2}
    first = next(s for s in lanes if s.rank == 2 and s.waits)
    assert first.end - first.begin == pytest.approx(2 * 0.012)
    ElementTree.fromstring(draw([("measured & simulated", lanes), ("again", lanes)]))
