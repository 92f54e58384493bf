"""Poisoned documents: what a run stops at, skips, or goes back from; bitwise, and once a budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.prepared import small_dataset, small_run
from tests.test_resume import content, curve
from tests.test_resume import train as train_plainly
from tests.worlds import run_world
from titans_pretrain.config import DivergenceConfig, parse_config
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.divergence import Divergence, robust_z
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, ConfigError, DivergedError
from titans_pretrain.phases import where
from titans_pretrain.run import checkpoint, dcp

STEPS = 16
BAD = (11, 14)  # the batches, from 1, that hold a poisoned document


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


Pair = tuple[int, int]


@pytest.fixture(scope="module")
def poison(data: Path) -> list[Pair]:
    """For each of the batches BAD two tokens that follow one another in no other."""
    config = parse_config(tree_of(Path("unused"), data, "stop"), "test")
    align = config.model.alignment
    stream = TrainStream(config.data, global_batch=8, micro_batch=8, align=align)
    batches = stream.batches(stream.start())
    rows = [next(batches)[0][0].tokens for _ in range(STEPS + 8)]
    batches.close()
    pairs = [set(zip(r[:, :-1].flatten().tolist(), r[:, 1:].flatten().tolist())) for r in rows]
    return [min(pairs[n - 1].difference(*pairs[: n - 1], *pairs[n:])) for n in BAD]


def train(
    tree: dict[str, Any], poison: list[Pair], factor: float, stop_after: int | None = None
) -> int | str:
    """One life of a run on this rank, whose model multiplies the logits of rows that hold poison by
    `factor`: inf, or what makes a loss spike. Its exit code, or what it diverged with, in which
    phases."""
    from titans_pretrain.model.titans import TitansLM

    forward = TitansLM.forward

    def poisoned(self: TitansLM, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits, state = forward(self, tokens, *args, **kwargs)
        bad = torch.zeros(len(tokens), dtype=torch.bool)
        for first, second in poison:
            bad |= ((tokens[:, :-1] == first) & (tokens[:, 1:] == second)).any(1)
        return logits * torch.where(bad, factor, 1.0)[:, None, None], state

    TitansLM.forward = poisoned  # type: ignore[method-assign]
    try:
        return train_plainly(tree, stop_after)
    except DivergedError as e:
        assert e.exit_code == 4
        return f"{e}\nin {where(e)[1]}"


def tree_of(folder: Path, data: Path, on: str, **changes: Any) -> dict[str, Any]:
    return small_run(
        folder,
        data,
        **{
            "model__variant": "transformer",
            "train__steps": STEPS,
            "validation__every": 8,
            "checkpoint__every_steps": 4,
            "checkpoint__keep_last": 9,
            "divergence": {"on": on, "spike": 20.0, "window": 8},
            **changes,
        },
    )


def losses(folder: Path) -> list[tuple[int, float, float, float | None]]:
    return curve(str(folder))


def events(folder: Path) -> list[tuple[int, str]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["event"]) for line in lines if "event" in line]


def state_at(folder: Path, step: int) -> dict[str, Any]:
    path = checkpoint.folder_of(folder / "checkpoints", step) / "state.json"
    return json.loads(path.read_text())


POISONS = {"not finite": math.inf, "spike": 300.0}
# Samples left out: batch 11 is [80, 88), 14 is [104, 112). Rewound to step 8 [64, 72): next is 64.
SKIPPED = {"skip": [[80, 88], [104, 112]], "rewind": [[64, 112]]}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", POISONS)
@pytest.mark.parametrize("on", ["skip", "rewind"])
def test_a_run_passes_by_what_is_poisoned_and_resumes_bitwise(
    on: str, kind: str, ranks: int, data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    bad = poison, POISONS[kind]
    whole = tree_of(tmp_path / "whole", data, on)
    assert run_world(train, ranks, whole, *bad) == [EXIT_DONE] * ranks
    expected = losses(tmp_path / "whole")
    assert [step for step, *_ in expected] == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) and loss < 20 for _, loss, *_ in expected)
    assert state_at(tmp_path / "whole", STEPS)["data"]["skips"] == SKIPPED[on]
    assert len(events(tmp_path / "whole")) == 2

    # Stopped on the way to the first of them, and after it; on request, so at odd steps.
    parts = tree_of(tmp_path / "parts", data, on)
    for steps in (6, 3, 4):
        assert run_world(train, ranks, parts, *bad, steps) == [EXIT_SAVED] * ranks
    assert run_world(train, ranks, parts, *bad) == [EXIT_DONE] * ranks
    assert losses(tmp_path / "parts") == expected
    assert content(parts["folder"]) == content(whole["folder"])
    assert events(tmp_path / "parts") == events(tmp_path / "whole")


def train_without(tree: dict[str, Any], skips: list[list[int]]) -> int:
    """One life of a run on this rank, which never hears of some samples."""
    start = TrainStream.start
    TrainStream.start = lambda self: {**start(self), "skips": skips}  # type: ignore[method-assign]
    return train_plainly(tree)


@pytest.mark.parametrize("on", SKIPPED)
def test_what_is_passed_by_might_as_well_never_have_been(
    on: str, data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    """Also the steps that a rewind goes back over; TensorBoard shows one curve, and the events."""
    trees = [
        tree_of(tmp_path / name, data, on, log__tensorboard=True) for name in ("poisoned", "clean")
    ]
    assert run_world(train, 1, trees[0], poison, POISONS["spike"]) == [EXIT_DONE]
    assert run_world(train_without, 1, trees[1], SKIPPED[on]) == [EXIT_DONE]
    found, expected = tmp_path / "poisoned", tmp_path / "clean"
    assert losses(found) == losses(expected)
    last = [checkpoint.folder_of(folder / "checkpoints", STEPS) for folder in (found, expected)]
    assert dcp.hash_tensors(last[0]) == dcp.hash_tensors(last[1])
    states = [state_at(folder, STEPS) for folder in (found, expected)]
    for key in ("data", "tokens", "validation_loss"):
        assert states[0][key] == states[1][key]
    assert states[0]["divergence"]["losses"] == states[1]["divergence"]["losses"]
    assert [p["step"] for p in states[0]["divergence"]["passed_by"]] == (
        [11, 13] if on == "skip" else [11, 11]
    )

    board = EventAccumulator(str(found / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [e.value for e in board.Scalars("data/skipped")][-1] == sum(
        b - a for a, b in SKIPPED[on]
    )
    # As TensorBoard itself reads them, which hides what was told of steps that are done again: a
    # second rewind tells of the first once more.
    shown = plugin_event_accumulator.EventAccumulator(str(found / "tensorboard")).Reload()
    told = [
        (e.step, e.tensor_proto.string_val[0].decode()) for e in shown.Tensors("events/divergence")
    ]
    assert told == events(found) and len(told) == 2
    if on == "rewind":
        step, text = told[-1]
        assert step == 9 and text.startswith("step 11: loss 63.")
        assert text.endswith("samples 64 to 111 are skipped; back to the checkpoint of step 8")
    assert [e.step for e in board.Tensors("events/start")] == [0]


@pytest.mark.parametrize("kind", POISONS)
def test_a_run_stops_with_4_and_says_at_what(
    kind: str, data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    tree = tree_of(tmp_path / "run", data, "stop", validation__every=0)
    (told, other) = run_world(train, 2, tree, poison, POISONS[kind])
    assert told.splitlines()[0] == other.splitlines()[0] or kind == "not finite"
    assert told.startswith("step 11: loss ")
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    if kind == "spike":
        loss, rest = told.removeprefix("step 11: loss ").split(", a spike: robust z-score ")
        z, rest = rest.split(" above the median ")
        before = [loss for _, loss, *_ in losses(tmp_path / "run")][-8:]
        assert robust_z(float(loss), before) == pytest.approx(float(z), abs=0.05)
        assert "samples 80, 81, 82, 83, 84, 85, 86, 87\n" in rest
    # Spikes are looked at only where the config says so, and then only those learnt from count.
    tree = tree_of(tmp_path / "default", data, "stop", validation__every=0, divergence={})
    given = run_world(train, 1, tree, poison, POISONS[kind])
    if kind == "spike":
        assert given == [EXIT_DONE]
        assert max(loss for _, loss, *_ in losses(tmp_path / "default")) > 20
        assert "divergence" not in state_at(tmp_path / "default", STEPS)
    else:
        assert given[0].startswith("step 11: loss nan")


@pytest.mark.slow
@pytest.mark.parametrize("on", SKIPPED)
def test_other_ranks_and_workers_go_on_with_the_same_samples(
    on: str, data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    bad = poison, POISONS["spike"]
    whole, parts = (tree_of(tmp_path / n, data, on) for n in ("whole", "parts"))
    parts["data"]["workers"] = 1
    assert run_world(train, 1, whole, *bad) == [EXIT_DONE]
    assert run_world(train, 2, parts, *bad, 13) == [EXIT_SAVED] * 2
    assert state_at(tmp_path / "parts", 13)["data"]["skips"] == SKIPPED[on]
    parts["data"]["workers"] = 0
    assert run_world(train, 1, parts, *bad) == [EXIT_DONE]
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert other[1] == pytest.approx(one[1], rel=1e-4)
    ends = [state_at(tmp_path / n, STEPS) for n in ("whole", "parts")]
    assert ends[0]["data"] == ends[1]["data"]
    assert ends[0]["data"]["next_sample"] == SKIPPED[on][-1][1] + (32 if on == "skip" else 64)
    assert ends[0]["tokens"] == ends[1]["tokens"]


@pytest.mark.parametrize("on", SKIPPED)
def test_a_hopeless_run_ends_with_4(
    on: str, data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    policy = {"on": on, "budget": 1, "within": 6}
    tree = tree_of(tmp_path / on, data, on, divergence=policy, validation__every=0)
    # Rewound to step 8, step 11 is once more the poisoned one: the second of two in six steps.
    (told,) = run_world(train, 1, tree, poison, math.inf)
    found = told.splitlines()[0]
    assert found.startswith("step 13: loss nan" if on == "skip" else "step 11: loss nan")
    assert "helped no longer: steps 11 were passed by before" in found


def test_without_a_checkpoint_there_is_no_way_back(
    data: Path, poison: list[Pair], tmp_path: Path
) -> None:
    tree = tree_of(tmp_path / "run", data, "rewind", checkpoint__every_steps=50)
    (told,) = run_world(train, 1, tree, poison, math.inf)
    assert "there is no checkpoint to go back to" in told
    assert told.endswith("in ('loading',)")  # which the watchdog allows longer than a step
    tree["checkpoint"]["every_steps"] = 0
    with pytest.raises(ConfigError, match=r"divergence\.on=rewind, checkpoint\.every_steps=0"):
        parse_config(tree, "test")


def test_robust_z_scores() -> None:
    assert robust_z(9.0, [1, 2, 3, 4, 5]) == pytest.approx(6 / 1.4826)
    assert robust_z(9.0, [5, 4, 1e9, 2, 1]) == pytest.approx((9 - 4) / (1.4826 * 2))
    assert robust_z(-3.0, [1, 2, 3, 4, 5]) == pytest.approx(-6 / 1.4826), "a fall is no spike"
    assert robust_z(2.0, [2.0] * 8) == 0
    assert robust_z(2.1, [2.0] * 8) > 1000 > 1 > robust_z(2.0 + 1e-9, [2.0] * 8)


PAST = [4.0, 4.1, 3.9, 4.2, 3.8, 4.0, 4.1, 3.9]  # median 4.0, median absolute deviation 0.1


def detector(past: list[float], **config: Any) -> Divergence:
    found = Divergence(DivergenceConfig.model_validate({"spike": 10.0, "window": 8, **config}))
    for loss in past:
        found.learnt_from(loss)
    return found


def test_spikes_are_judged_by_the_last_losses_learnt_from() -> None:
    limit = 4.0 + 10 * 1.4826 * 0.1
    found = detector(PAST)
    assert found.judge(limit - 1e-6) == ""
    assert found.judge(limit + 0.5) == (
        "a spike: robust z-score 13.4 above the median 4.0000 of the last 8 losses "
        "(divergence.spike=10)"
    )
    assert found.judge(0.0) == "" == detector(PAST[:7]).judge(99.0) == detector([]).judge(99.0)
    assert detector(PAST, spike=0).judge(99.0) == ""
    moved = detector([9.0 * loss for loss in PAST] + PAST)
    assert moved.judge(limit + 0.5) != "", "older losses are forgotten"

    state = json.loads(json.dumps(found.state()))["divergence"]
    again = Divergence(found.config, state)
    assert again.state() == found.state() and again.judge(6.0) == found.judge(6.0) != ""
    assert detector(PAST, spike=0).state() == {}, (
        "by default a checkpoint holds no more than before"
    )
    assert detector([], spike=0, on="skip").state() != {}


def test_a_budget_is_fresh_after_progress() -> None:
    error = DivergedError("step 9: loss nan", "finite", "lower the rate")
    found = detector([], on="skip", budget=2, within=10)
    found.pass_by(9, (64, 72), error)
    found.pass_by(9, (72, 80), error)
    with pytest.raises(DivergedError, match=r"step 9: loss nan; .* steps 9, 9 were passed by"):
        found.pass_by(18, (152, 160), error)
    again = Divergence(found.config, found.state()["divergence"])
    again.pass_by(19, (160, 168), error)
    again.go_back(None)
    assert again.state()["divergence"]["passed_by"] == [{"step": 19, "samples": [160, 168]}]
