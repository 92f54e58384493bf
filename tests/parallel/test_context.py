"""A sequence over a chain of ranks gives what it gives in one process: losses and every gradient.

Gradients are held to 1e-9 of each tensor's largest entry, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.model.helpers import hot_model, inert, losses_of
from tests.parallel.context_mistakes import MISTAKES, make_mistakes
from tests.parallel.context_runs import (
    Run,
    in_world,
    message_bytes,
    micro_batches,
    model_config,
    plain_run,
    unit,
    worst,
)
from tests.parallel.context_schedule import (
    alive_after_forward,
    in_segments,
    in_segments_plain,
    through_megatron,
)
from tests.worlds import run_world
from titans_pretrain.parallel.context import shard

TWO: dict[str, dict[str, Any]] = {
    **{
        case: {"case": case, "count": True}
        for case in ("transformer", "transformer-window", "lmm", "mac", "mag-window", "mal-window")
    },
    **{case: {"case": case} for case in ("lmm-paper", "mac-pool2", "mac-learned", "mal-grouped")},
    "mac, recomputed": {"case": "mac", "recompute": True, "order": "FFBB reversed"},
    "mag-window, recomputed": {"case": "mag-window", "recompute": True},
    "mag-window, reversed": {"case": "mag-window", "order": "FFBB reversed"},
    "mal-window, skewed": {"case": "mal-window", "order": "skewed", "recompute": True},
    "mag-window, blocking": {"case": "mag-window", "order": "FFBB", "blocking": True},
    "transformer, recomputed": {"case": "transformer", "recompute": True, "order": "FFBB"},
    "mac in bf16": {"case": "mac", "dtype": torch.bfloat16},
    "mag-window in bf16": {"case": "mag-window", "dtype": torch.bfloat16},
}
FOUR: dict[str, dict[str, Any]] = {
    "transformer": {"case": "transformer"},
    "mag": {"case": "mag"},  # a window beyond the row
    "mac, blocking": {"case": "mac", "blocking": True},
    "lmm, recomputed": {"case": "lmm", "order": "FFBB", "recompute": True},
    "mac-pool2, recomputed": {"case": "mac-pool2", "order": "skewed", "recompute": True},
    "mal-window": {"case": "mal-window"},
}
ALL = [(2, name) for name in TWO] + [(4, name) for name in FOUR]


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[dict[str, Run]]]:
    return {
        2: run_world(in_world, 2, TWO, timeout=300),
        4: run_world(in_world, 4, FOUR, timeout=300),
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, Run]:
    cases = {step["case"] for steps in (TWO, FOUR) for step in steps.values()}
    return {case: plain_run(case) for case in sorted(cases)}


def step_of(size: int, name: str) -> dict[str, Any]:
    return {2: TWO, 4: FOUR}[size][name]


@pytest.mark.parametrize(("size", "name"), [s for s in ALL if "bf16" not in s[1]])
def test_loss_and_every_gradient_equal_one_process(worlds, plain, size: int, name: str) -> None:
    ours, reference = worlds[size][0][name], plain[step_of(size, name)["case"]]
    assert abs(ours.loss - reference.loss) < 1e-12 * abs(reference.loss)
    assert worst(ours, reference)[0] < 1e-9, worst(ours, reference)


@pytest.mark.parametrize(("size", "name"), ALL)
def test_every_parameter_has_a_gradient_on_every_rank(worlds, size: int, name: str) -> None:
    """Zeros, where a rank's share of the documents never reaches a parameter."""
    assert [w[name].without_gradient for w in worlds[size]] == [[]] * size


@pytest.mark.parametrize(("size", "name"), ALL)
def test_bytes_are_what_the_arithmetic_says(worlds, size: int, name: str) -> None:
    """Recompute sends nothing again; states are wide, keys and values as the model is."""
    step = step_of(size, name)
    config = model_config(step["case"])
    wide, narrow = (4, 2) if step.get("dtype") else (8, 8)
    share = 16 * unit(config) // size
    edges = [
        sum(
            message_bytes(config, len(b.tokens), r * share, wide, narrow)
            for b in micro_batches(config)
        )
        for r in range(1, size)
    ]
    expected = [(edges[r] if r < size - 1 else 0) + (edges[r - 1] if r else 0) for r in range(size)]
    assert [w[name].sent for w in worlds[size]] == expected


@pytest.mark.parametrize(("size", "name"), ALL)
def test_both_ends_of_every_link_agree_on_the_order(worlds, size: int, name: str) -> None:
    logs = [w[name].log for w in worlds[size]]

    def keys(rank: int, way: str, act: str) -> list[Any]:
        return [key for w, a, key in logs[rank] if (w, a) == (way, act)]

    for rank in range(size - 1):
        there = keys(rank, "forward", "sent")
        assert there == keys(rank + 1, "forward", "received")
        back = keys(rank + 1, "backward", "sent")
        assert back == keys(rank, "backward", "received")
        assert sorted(there) == sorted(back) and len(set(there)) == len(there) > 0


@pytest.mark.parametrize("name", [name for name, step in TWO.items() if step.get("count")])
def test_ranks_only_send_to_neighbours_between_embedding_and_loss(worlds, name: str) -> None:
    assert [w[name].operators for w in worlds[2]] == [{"send", "recv"}] * 2


@pytest.mark.parametrize("name", ["mac in bf16", "mag-window in bf16"])
def test_bf16_halves_the_keys_alone(worlds, name: str) -> None:
    reference = plain_run(TWO[name]["case"], dtype=torch.bfloat16)
    assert abs(worlds[2][0][name].loss - reference.loss) < 2e-3 * reference.loss


@pytest.mark.parametrize("case", ["lmm", "mac", "mag-window", "mal-window"])
def test_the_memory_matters_in_these_models(plain, case: str) -> None:
    """Without what it learns, a label's loss is another by more than 1 % on average."""
    model = hot_model(model_config(case))
    moved, labels = 0.0, 0
    with torch.no_grad():
        for b in micro_batches(model.config):
            with_, without = (losses_of(m, b.tokens, b.positions) for m in (model, inert(model)))
            moved, labels = moved + (with_ - without).abs().sum().item(), labels + len(with_)
    assert moved / labels > 0.01 * plain[case].loss


@pytest.fixture(scope="module")
def mistaken() -> list[dict[str, Any]]:
    return run_world(make_mistakes, 2, timeout=300)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_would_be_seen(mistaken, name: str) -> None:
    mistake = MISTAKES[name]
    right = plain_run(mistake.case, mistake.rows)
    run = mistaken[0][name]
    if mistake.seen == "gradients":
        assert worst(run, right)[0] > 1e-3
    elif mistake.seen == "missing":
        assert mistaken[1][name].without_gradient
        assert not mistaken[1][name + ", right"].without_gradient
        assert worst(mistaken[0][name + ", right"], right)[0] < 1e-9
    else:
        assert mistake.seen in run


def test_the_schedule_of_megatron_gives_the_same() -> None:
    for name, (loss, labels, gradients) in run_world(through_megatron, 2, timeout=200)[0].items():
        right = plain_run(name)
        assert abs(loss / labels - right.loss) < 1e-12 * right.loss
        assert worst(Run(0.0, gradients), right)[0] < 1e-9


@pytest.mark.parametrize("case", ["lmm", "mac", "mag-window"])
def test_what_a_rank_keeps_for_backward_falls_with_its_share(alive, case: str) -> None:
    """A token more costs each of four ranks a quarter of its activations."""
    for whole, mine in (rank[case] for rank in alive):
        assert mine < 1.05 * whole / 4, (whole, mine)


@pytest.fixture(scope="module")
def alive() -> list[dict[str, tuple[int, int]]]:
    return run_world(alive_after_forward, 4, timeout=200)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_last_ranks_state_starts_the_next_segment(size: int) -> None:
    cases = {1: ["mac"], 2: ["mac", "mag-bare", "transformer"], 4: ["lmm", "mal"]}[size]
    runs = run_world(in_segments, size, cases, timeout=200)[0]
    for case in cases:
        right = in_segments_plain(case)
        assert abs(runs[case].loss - right.loss) < 1e-12 * right.loss
        assert worst(runs[case], right)[0] < 1e-9, case


def test_a_share_is_a_run_of_columns() -> None:
    batch = micro_batches(model_config("lmm"))[0]
    parts = [shard(batch, i, 4) for i in range(4)]
    for name in ("tokens", "labels", "positions", "loss_mask"):
        joined = torch.cat([getattr(p, name) for p in parts], dim=1)
        assert torch.equal(joined, getattr(batch, name))
    assert torch.equal(parts[3].samples, batch.samples)
    with pytest.raises(ValueError, match="rows of 64 tokens over 3"):
        shard(batch, 0, 3)
