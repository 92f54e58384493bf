"""A streamed source cannot seek; a run that reads it passes by what is poisoned all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_streaming import TARS, texts_of, write_tar
from tests.prepared import TOKENIZER, small_run
from tests.test_divergence import losses, state_at
from tests.test_resume import content
from tests.test_resume import train as train_plainly
from tests.worlds import run_world
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED

BAD = 37  # a sample of the fifth batch, [32, 40)
SKIPPED = {"skip": [[32, 40]], "rewind": [[24, 40]]}  # saved at step 3, before [24, 32)


def train(tree: dict[str, Any], stop_after: int | None = None) -> int:
    """One life of a run whose gradients are not finite in the step that holds the sample BAD."""
    from titans_pretrain.step import TrainStep

    run, finite = TrainStep._run, TrainStep._gradients_finite
    held: list[bool] = []

    def noting(self: TrainStep, batches: Any, tokens: int, **kwargs: Any) -> Any:
        held[:] = [any(BAD in batch.samples for batch in batches)]
        return run(self, batches, tokens, **kwargs)

    TrainStep._run = noting  # type: ignore[method-assign]
    TrainStep._gradients_finite = lambda self: finite(self) and not held[0]  # type: ignore[method-assign]
    return train_plainly(tree, stop_after)


@pytest.mark.slow
@pytest.mark.parametrize("on", SKIPPED)
def test_a_streamed_run_passes_by_and_resumes_bitwise(on: str, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(TARS):
        write_tar(tars / f"part-{number:02d}.tar", texts_of(number))

    def tree(name: str, workers: int = 0) -> dict[str, Any]:
        source = {"path": str(tars), "stream": True, "tokenizer": str(TOKENIZER)}
        return small_run(
            tmp_path / name,
            Path("unused"),
            data__sources={"web": {**source, "virtual_workers": 4}},
            data__workers=workers,
            model__variant="transformer",
            train__steps=8,
            validation__every=0,
            checkpoint__every_steps=3,
            divergence={"on": on},
        )

    assert run_world(train, 2, tree("whole")) == [EXIT_DONE] * 2
    for steps in (2, 4):
        assert run_world(train, 2, tree("parts", 1), steps) == [EXIT_SAVED] * 2
    assert state_at(tmp_path / "parts", 6)["data"]["skips"] == SKIPPED[on]
    assert run_world(train, 2, tree("parts", 2)) == [EXIT_DONE] * 2
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert content(str(tmp_path / "parts")) == content(str(tmp_path / "whole"))
    assert run_world(train, 1, tree("one")) == [EXIT_DONE]
    ends = [state_at(tmp_path / name, 8)["data"] for name in ("whole", "one")]
    assert ends[0] == ends[1] and ends[0]["skips"] == SKIPPED[on]
