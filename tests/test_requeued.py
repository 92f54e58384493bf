"""A run through four lives of one job, as TensorBoard and a reader of its folder find it."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED
from titans_pretrain.launch import verdict
from titans_pretrain.launch.local import free_port
from titans_pretrain.launch.story import read_story
from titans_pretrain.run.marks import JOB, RUN, Marks

STEPS = 10


def life(tree: dict[str, Any], queued: int, stop_after: int | None, dies_at: int) -> int:
    """One life under a job script; in step `dies_at` the process is gone, without a word."""
    from titans_pretrain.step import TrainStep
    from titans_pretrain.train import run_training

    os.environ[RUN], os.environ[JOB] = tree["folder"], f"12.{queued}"
    step = TrainStep.__call__

    def dies(self: TrainStep, batches: Any, number: int, *args: Any) -> Any:
        if number == dies_at:
            os._exit(9)
        return step(self, batches, number, *args)

    TrainStep.__call__ = dies  # type: ignore[method-assign]
    return run_training(parse_config(tree, "test"), stop_after=stop_after)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved on request at step 4 (an odd place), lost in step 7 by bad hardware, in step 6 without
    a word, then done; checkpoints are those of steps 4 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = small_dataset(tmp_path_factory.mktemp("prepared"))
    settings = {"validation__every": 3, "log__tensorboard": True, "train__steps": STEPS}
    tree = small_run(folder, data, **settings)
    tree["model"]["variant"] = "transformer"
    for queued, (stop_after, dies_at, code) in enumerate(
        [(4, 0, EXIT_SAVED), (None, 7, 137), (None, 6, 137), (None, 0, EXIT_DONE)]
    ):
        marks = Marks(folder, "12", queued)
        assert verdict.begin(marks, [marks.job]).do == "go"
        marks.write("started")
        if queued in (1, 3):
            marks.path("preflight").mkdir()
            (marks.path("preflight") / "table.txt").write_text(f"node  verdict\ntn{queued}  fit\n")
        if dies_at:
            with pytest.raises(AssertionError, match="without a word"):
                run_world(life, 1, tree, queued, stop_after, dies_at)
        else:
            assert run_world(life, 1, tree, queued, stop_after, dies_at) == [code]
        if queued == 1:
            marks.write("bad", "tn3\n")
        said = verdict.end(marks, [marks.job], code, (), ())
        assert said.do == ("again" if queued < 3 else "end")
    return folder


def test_every_curve_is_one_line(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps.pop("validation/loss") == steps.pop("validation/perplexity") == [3, 6, 9, 10]
    assert len(steps) > 10
    assert {tag: found for tag, found in steps.items() if found != list(range(1, STEPS + 1))} == {}
    tokens = EventAccumulator(str(run / "tensorboard" / "by_tokens"), {"scalars": 0}).Reload()
    found = [e.step for e in tokens.Scalars("by_tokens/train_loss")]
    assert found == sorted(set(found)) and len(found) == STEPS


def test_each_start_is_told_once_with_what_came_before(run: Path) -> None:
    events = plugin_event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    told = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("events/start")]
    [(first, begun), (second, text)] = told
    host = os.uname().nodename
    assert (first, begun) == (0, f"life 1 from scratch on {host} (job 12, start 1).")
    assert second == 5
    from_4 = f"from `{run}/checkpoints/step-00000004` on {host}"
    assert text.splitlines() == [
        f"- life 2 {from_4} (job 12, start 2). life 1 ended at step 4: asked: saved on request: "
        "--stop-after",
        f"- life 3 {from_4} (job 12, start 3). life 2 ended at step 6: hardware; without tn3 from "
        "then on",
        f"- life 4 {from_4} (job 12, start 4). life 3 ended at step 5: crash",
    ]
    [checks] = events.Tensors("events/preflight")
    assert checks.step == 5 and checks.tensor_proto.string_val[0].decode() == (
        "life 2:\n\n    node  verdict\n    tn1  fit\n\nlife 4:\n\n    node  verdict\n    tn3  fit"
    )
    saves = [e.step for e in events.Tensors("events/checkpoint")]
    assert saves == [4, STEPS]
    assert [e.step for e in events.Tensors("events/stop")] == [4]


def test_the_story_has_all_lives(run: Path) -> None:
    lives = read_story(run)
    assert [(x.first, x.last, x.reason, x.avoided) for x in lives] == [
        (0, 4, "asked", ()),
        (4, 6, "hardware", ("tn3",)),
        (4, 5, "crash", ()),
        (4, STEPS, "done", ()),
    ]
    assert [x.queued for x in lives] == [0, 1, 2, 3]
    times = [t for x in lives for t in (x.began, x.ended)]
    assert times == sorted(times)


@pytest.fixture
def board(run: Path) -> Iterator[Callable[[str], Any]]:
    """What the started TensorBoard answers."""
    port = free_port()
    command = [sys.executable, "-m", "titans_pretrain", "board", str(run), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://localhost:{port}/data/{path}", timeout=10) as answer:
            return json.loads(answer.read())

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def until(ask: Callable[[str], Any], path: str, there: Callable[[Any], bool]) -> Any:
    """It reads its files after it has begun to answer."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if there(found := ask(path)):
                return found
        time.sleep(0.2)
    raise AssertionError(f"{path}: no answer")


def test_tensorboard_itself_shows_one_curve(board: Callable[[str], Any]) -> None:
    """As `titans-pretrain board` starts it."""
    runs = until(board, "runs", lambda found: len(found) == 2)
    assert sorted(runs) == ["run/.", "run/by_tokens"]
    query = "plugin/scalars/scalars?run=run/.&tag=train/loss"
    points = until(board, query, lambda found: len(found) >= STEPS)
    assert [step for _, step, _ in points] == list(range(1, STEPS + 1))
    texts = board("plugin/text/text?run=run/.&tag=events/start")
    assert [text["step"] for text in texts] == [0, 5]
    assert texts[1]["text"].count("<li>life ") == 3
    assert "without tn3 from then on" in texts[1]["text"]
