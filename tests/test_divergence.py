"""Poisoned documents: what a run stops at, skips, or goes back from; bitwise, and once a budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.prepared import small_dataset, small_run
from tests.test_resume import content, curve
from tests.test_resume import train as train_plainly
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, DivergedError
from titans_pretrain.run import checkpoint

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
    `factor`: inf, or what makes a loss spike. Its exit code, or what it diverged with."""
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
        return str(e)


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
    (folder / "metrics.jsonl").rename(folder / "whole.jsonl")
    lines = [json.loads(line) for line in (folder / "whole.jsonl").read_text().splitlines()]
    assert all(("event" in line) != ("values" in line) for line in lines)
    (folder / "whole.jsonl").rename(folder / "metrics.jsonl")
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
    assert len(events(tmp_path / "whole")) == (2 if on == "skip" else 1)

    # Stopped on the way to the first of them, and after it; on request, so at odd steps.
    parts = tree_of(tmp_path / "parts", data, on)
    for steps in (6, 3, 4):
        assert run_world(train, ranks, parts, *bad, steps) == [EXIT_SAVED] * ranks
    assert run_world(train, ranks, parts, *bad) == [EXIT_DONE] * ranks
    assert losses(tmp_path / "parts") == expected
    assert content(parts["folder"]) == content(whole["folder"])
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
