"""An interrupted run is the uninterrupted one, bitwise: weights, moments, losses, next batch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.batch import Batch, concatenate
from titans_pretrain.data.stream import TrainStream, batch_hash
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED
from titans_pretrain.launch.local import free_port
from titans_pretrain.run import checkpoint
from titans_pretrain.run.metrics import read_records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def train(tree: dict[str, Any], stop_after: int | None = None, kill_at: int = 0) -> int:
    """One life of a run on this rank; with `kill_at`, a real SIGTERM to the last rank alone once
    that step is logged."""
    from titans_pretrain.train import run_training

    if kill_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        metrics = Path(tree["folder"]) / "metrics.jsonl"

        def send() -> None:
            while not metrics.exists() or f'"step": {kill_at},' not in metrics.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=send, daemon=True).start()
    return run_training(parse_config(tree, "test"), stop_after=stop_after)


def content(folder: str) -> str:
    checkpoints = Path(folder) / "checkpoints"
    return checkpoint.content_sha256(
        checkpoint.folder_of(checkpoints, checkpoint.list_steps(checkpoints)[-1])
    )


def curve(folder: str) -> list[tuple[int, float, float, float | None]]:
    records = read_records(Path(folder) / "metrics.jsonl")
    return [
        (
            r["step"],
            r["values"]["train/loss"],
            r["values"]["train/grad_norm"],
            r["values"].get("validation/loss"),
        )
        for r in records
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_100_steps_equal_37_and_63(ranks: int, precision: str, data: Path, tmp_path: Path) -> None:
    def tree(name: str) -> dict[str, Any]:
        return small_run(tmp_path / name, data, train__precision=precision)

    whole, parts, signalled = tree("whole"), tree("parts"), tree("signalled")
    assert run_world(train, ranks, whole) == [EXIT_DONE] * ranks
    assert run_world(train, ranks, parts, 37) == [EXIT_SAVED] * ranks
    first = checkpoint.list_steps(Path(parts["folder"]) / "checkpoints")
    assert first == [37]
    assert run_world(train, ranks, parts) == [EXIT_DONE] * ranks
    # Only one rank is told: all leave together.
    assert run_world(train, ranks, signalled, None, 20) == [EXIT_SAVED] * ranks
    (stopped,) = checkpoint.list_steps(Path(signalled["folder"]) / "checkpoints")
    assert 20 <= stopped < 90
    assert run_world(train, ranks, signalled) == [EXIT_DONE] * ranks

    expected = curve(whole["folder"])
    assert [step for step, *_ in expected] == list(range(1, 101))
    assert expected[99][1] < expected[0][1] - 0.5, "the model learns"
    assert expected[49][3] is not None
    for other in (parts, signalled):
        assert curve(other["folder"]) == expected
        assert content(other["folder"]) == content(whole["folder"])


Seen = list[tuple[int, int, list[Batch]]]  # step, data-parallel rank, its rows


def train_and_tell(tree: dict[str, Any], stop_after: int | None) -> tuple[int, Seen]:
    """As `train`; and what each step was fed on this rank."""
    from titans_pretrain.step import TrainStep

    seen: Seen = []
    call = TrainStep.__call__

    def noted(self: TrainStep, batches: list[Batch], step: int, *more: Any) -> Any:
        seen.append((step, self.world.place.data, batches))
        return call(self, batches, step, *more)

    TrainStep.__call__ = noted  # type: ignore[method-assign]
    return train(tree, stop_after), seen


def rows_of(told: list[Seen]) -> dict[int, tuple[list[int], str]]:
    """By step: its samples, data-parallel rank after rank, and the hash of their content. Ranks
    that share their rows must have the same."""
    by_step: dict[int, dict[int, list[Batch]]] = {}
    for step, place, batches in itertools.chain(*told):
        mine = by_step.setdefault(step, {}).setdefault(place, batches)
        assert batch_hash(mine) == batch_hash(batches)
    found = {}
    for step, places in by_step.items():
        whole = concatenate([b for _, batches in sorted(places.items()) for b in batches])
        found[step] = (whole.samples.tolist(), batch_hash([whole]))
    return found


# Ranks and degrees, two steps each; the last goes on to the end.
CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "interleave": 2}),
    (2, {"context": 2}),
    (2, {"zero": {"stage": 3}}),
    (1, {}),
]


@pytest.mark.slow
def test_a_run_that_changes_its_layout_is_one_run(data: Path, tmp_path: Path) -> None:
    """The same rows in each step, and losses within 1e-5 of a process that was never stopped."""
    steps = 2 * len(CHAIN)

    def tree(name: str, **changes: Any) -> dict[str, Any]:
        few = {"model__blocks": 4, "train__steps": steps, "validation__every": 0}
        return small_run(tmp_path / name, data, **few, **changes)

    ((code, whole),) = run_world(train_and_tell, 1, tree("whole"), None)
    assert code == EXIT_DONE
    expected = rows_of([whole])
    assert list(expected) == list(range(1, steps + 1))
    found: dict[int, tuple[list[int], str]] = {}
    for number, (ranks, parallel) in enumerate(CHAIN, 1):
        results = run_world(train_and_tell, ranks, tree("parts", parallel=parallel), 2)
        assert {code for code, _ in results} == {EXIT_DONE if ranks == 1 else EXIT_SAVED}
        found |= (fed := rows_of([seen for _, seen in results]))
        assert list(fed) == [2 * number - 1, 2 * number], parallel
    assert found == expected
    losses, theirs = (
        [loss for _, loss, *_ in curve(str(tmp_path / n))] for n in ("parts", "whole")
    )
    assert losses == pytest.approx(theirs, rel=1e-5) and len(losses) == steps


def test_what_the_bitwise_test_crosses(data: Path) -> None:
    """Accumulation above 1, shard edges and cut documents lie within the 100 steps."""
    config = parse_config(small_run(Path("unused"), data), "test")
    stream = TrainStream(config.data, global_batch=8, micro_batch=2, align=16)
    assert len(stream.manifest.splits["train"].shards) > 2
    assert stream.epoch_rows["books"] < 800  # more than one epoch, so every edge was crossed
    batches = stream.batches(stream.start())
    micro_batches, state = next(batches)
    assert len(micro_batches) == 4 and state["next_sample"] == 8
    cut = 0
    for _ in range(99):
        for batch in micro_batches:
            # The row's last token has a label beyond the row: its document was cut there.
            cut += int(batch.loss_mask[:, -1].sum())
        micro_batches, state = next(batches)
    assert cut > 100
    again, _ = next(stream.batches(state))
    assert batch_hash(again) == batch_hash(next(batches)[0])
    batches.close()


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "titans_pretrain", "train", str(config), *arguments]


Start = Callable[[list[str]], "subprocess.Popen[str]"]


@pytest.fixture
def begin() -> Iterator[Start]:
    """Starts a command in a session of its own; what still runs after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            arguments, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True], ids=["launcher", "group"])
def test_signals_save_and_leave_with_75(
    number: int, group: bool, data: Path, tmp_path: Path, begin: Start
) -> None:
    """Sent to the launcher of two ranks alone, or to a rank and its loaders (as Ctrl-C does)."""
    tree = small_run(
        tmp_path / "run",
        data,
        model__variant="transformer",
        train__steps=100_000,
        validation__every=0,
        data__workers=2,
    )
    config = write_config(tmp_path / "config.yaml", tree)
    process = begin(command(config) if group else command(config, "--ranks", "2"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 90
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_SAVED, output
    assert "Traceback" not in output
    (step,) = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    steps = [r["step"] for r in read_records(metrics)]
    assert steps == list(range(1, step + 1))
    assert f"saved at step {step} on request" in output


@pytest.mark.slow
def test_torchrun_starts_the_same_run(data: Path, tmp_path: Path) -> None:
    runs = {}
    for name, start in (
        ("ranks", command(tmp_path / "ranks.yaml", "--ranks", "2")),
        (
            "torchrun",
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1"),
                *("--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"),
                *command(tmp_path / "torchrun.yaml")[1:],
            ],
        ),
    ):
        tree = small_run(tmp_path / name, data, train__steps=5, validation__every=0)
        write_config(tmp_path / f"{name}.yaml", tree)
        done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == EXIT_DONE, done.stderr
        runs[name] = (curve(tree["folder"]), content(tree["folder"]))
    assert runs["ranks"] == runs["torchrun"]
    assert len(runs["ranks"][0]) == 5


@pytest.mark.slow
def test_kill_9_then_the_same_command_goes_on(data: Path, tmp_path: Path, begin: Start) -> None:
    whole = small_run(tmp_path / "whole", data, train__steps=60)
    tree = small_run(
        tmp_path / "run",
        data,
        train__steps=60,
        checkpoint__every_steps=10,
        log__tensorboard=True,
        log__memory_every=7,
    )
    assert run_world(train, 1, whole) == [EXIT_DONE]
    config = write_config(tmp_path / "config.yaml", tree)
    process = begin(command(config))
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 90
    while time.monotonic() < end and not (
        metrics.exists() and '"step": 23,' in metrics.read_text()
    ):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_DONE, done.stderr
    assert curve(tree["folder"]) == curve(whole["folder"])
    assert content(tree["folder"]) == content(whole["folder"])
    lives = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-00000060" / "state.json").read_text()
    )
    assert lives["life"] == 2
    # TensorBoard shows the same one curve, and looking into the memory changed nothing.
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"scalars": 0}).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(step, pytest.approx(loss)) for step, loss, *_ in curve(tree["folder"])]
    drift = next(tag for tag in board.Tags()["scalars"] if "drift" in tag)
    assert [event.step for event in board.Scalars(drift)] == list(range(7, 61, 7))


def test_another_kind_of_device_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from titans_pretrain.parallel.layout import Layout
    from titans_pretrain.parallel.world import World
    from titans_pretrain.train import tell_differences, versions

    config = parse_config(small_run(tmp_path, tmp_path), "test")
    layout = Layout(1, config.parallel, 1, 1)
    world = World(0, 1, 0, 1, torch.device("cuda", 0), 1, layout)
    saved = {"ranks": 1, "layout": layout.describe(), "threads": 1, "versions": versions()}
    saved["config"] = config.model_dump(mode="json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    tell_differences(config, world, saved | {"devices": "NVIDIA H200"})
    tell_differences(config, world, saved)  # of a checkpoint from before it was kept
    assert caplog.messages == []
    tell_differences(config, world, saved | {"devices": "NVIDIA H100"})
    assert caplog.messages == [
        "devices were NVIDIA H100, are NVIDIA H200: the run goes on, but not bitwise"
    ]


def init_from(tree: dict[str, Any], source: str) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"), init_from=source, stop_after=1)


def test_init_from_takes_weights_alone(data: Path, tmp_path: Path) -> None:
    first = small_run(tmp_path / "first", data, train__steps=30)
    assert run_world(train, 1, first) == [EXIT_DONE]
    source = checkpoint.folder_of(tmp_path / "first" / "checkpoints", 30)
    second = small_run(tmp_path / "second", data, train__steps=30, data__seed=5, optim__lr=1e-3)
    assert run_world(init_from, 2, second, str(source)) == [EXIT_SAVED] * 2
    (step, loss, _, _), *_ = curve(second["folder"])
    assert step == 1
    assert loss < curve(first["folder"])[0][1] - 0.5, "starts with the trained weights"
    state = json.loads(
        (tmp_path / "second" / "checkpoints" / "step-00000001" / "state.json").read_text()
    )
    assert state["data"]["next_sample"] == 8 and state["data"]["seed"] == 5


def records(folder: Path) -> list[dict[str, float]]:
    return [r["values"] for r in read_records(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, [1, 2, 3, 4]), (1000.0, [4])])
def test_checkpoints_by_the_clock(
    minutes: float, saved: list[int], data: Path, tmp_path: Path
) -> None:
    tree = small_run(
        tmp_path / "run",
        data,
        model__variant="transformer",
        train__steps=4,
        validation__every=0,
        checkpoint__every_minutes=minutes,
        checkpoint__keep_last=9,
    )
    assert run_world(train, 2, tree) == [EXIT_DONE] * 2
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == saved


def test_the_best_checkpoint_stays_and_metrics_tell_source_rate_and_time(
    data: Path, tmp_path: Path
) -> None:
    """Three good steps, then a rate that spoils the model: the best is not among the last."""
    tree = small_run(
        tmp_path / "run",
        data,
        model__variant="transformer",
        train__steps=12,
        validation__every=1,
        checkpoint__every_steps=1,
        checkpoint__keep_last=2,
    )
    tree["optim"] = {"lr": 3.0, "schedule": "wsd", "warmup_steps": 10, "decay_steps": 1}
    assert run_world(train, 2, tree) == [EXIT_DONE] * 2
    told = records(tmp_path / "run")
    losses = [values["validation/loss"] for values in told]
    best = 1 + losses.index(min(losses))
    assert best < 11, losses
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [best, 11, 12]
    assert [values["train/lr"] for values in told] == pytest.approx(
        [0.3 * step for step in range(1, 11)] + [3.0, 0.0]
    )
    for values in told:
        assert values["train_loss_by_source/books"] == pytest.approx(values["train/loss"])
        parts = ("data_wait", "forward_backward", "optimizer")
        spent = sum(values[f"time/{part}_s"] for part in parts)
        assert 0 < spent <= values["time/step_s"]
        assert values["machine/resident_gib"] > 0.1
        rate = values["speed/tokens_per_s"] * values["time/step_s"]
        assert 300 < rate <= 512 and rate == pytest.approx(round(rate))
    assert told[0]["time/save_stall_s"] == 0 < told[1]["time/save_stall_s"]
