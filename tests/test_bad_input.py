"""What a run says, and with which exit code, when something outside it is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_SAVED, DataError, TitansError
from titans_pretrain.run import checkpoint
from titans_pretrain.run.folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def attempt(
    tree: dict[str, Any], stop_after: int | None = None, init_from: str | None = None
) -> tuple[int, str]:
    from titans_pretrain.train import run_training

    try:
        config = parse_config(tree, "test")
        return run_training(config, stop_after=stop_after, init_from=init_from), ""
    except TitansError as e:
        return e.exit_code, str(e)


def refused(ranks: int, tree: dict[str, Any], *arguments: Any) -> tuple[int, str]:
    """The refusal, which all ranks must share."""
    results = run_world(attempt, ranks, tree, *arguments)
    assert len({code for code, _ in results}) == 1, results
    assert all(message.count("rule:") == 1 and "remedy:" in message for _, message in results)
    return results[0]


def small(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    quick = {"model__variant": "transformer", "train__steps": 4, "validation__every": 0}
    return small_run(folder, data, **(quick | changes))


def test_cuda_where_there_is_none(data: Path, tmp_path: Path) -> None:
    code, message = refused(2, small(tmp_path / "run", data, train__device="cuda"))
    assert code == 2 and "train.device=cuda" in message
    assert not (tmp_path / "run").exists()


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS}


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", **ADDRESS}, "WORLD_SIZE=2 without RANK"),
        ({**TWO, "MASTER_PORT": ""}, "WORLD_SIZE=2 without MASTER_PORT"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "1"}, "RANK=1 in the environment, WORLD_SIZE=1"),
        ({**TWO, "RANK": "x"}, "RANK=x in the environment, WORLD_SIZE=2"),
        ({**TWO, "RANK": "2"}, "RANK=2 in the environment, WORLD_SIZE=2"),
        ({**TWO, "RANK": "-1"}, "RANK=-1 in the environment, WORLD_SIZE=2"),
        ({**TWO, "LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({**TWO, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_world_that_makes_no_sense(
    environment: dict[str, str], value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    code, message = attempt(small(tmp_path / "run", tmp_path / "nowhere"))
    assert code == 2 and message.startswith(value)
    assert "rule:" in message and "remedy: use train --ranks N or torchrun" in message
    assert not (tmp_path / "run").exists()


def command(arguments: list[str], rank: int, own: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it says; one rank has arguments of its own."""
    from titans_pretrain.cli import main

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = main(arguments + (own if os.environ["RANK"] == str(rank) else []))
    return code, heard.getvalue()


@pytest.mark.parametrize(
    ("rank", "own", "words"),
    [
        (0, ["parallel.pipeline=3"], "parallel.pipeline=3, 2 ranks"),
        (1, ["optim.lrr=1"], "did you mean optim.lr?"),
        (1, ["--stop-after", "2"], "configs (sha256)"),
    ],
    ids=["layout", "config", "options"],
)
def test_what_one_rank_alone_is_told_ends_all_at_once(
    rank: int, own: list[str], words: str, tmp_path: Path
) -> None:
    """The others would wait for a rank that leaves before it has met them."""
    config = write_config(tmp_path / "config.yaml", small(tmp_path / "run", tmp_path / "nowhere"))
    told = run_world(command, 2, ["train", str(config)], rank, own, timeout=90)
    for code, message in told:
        assert code == 2 and words in message and message.count("rule:") == 1
    if "sha256" not in words:  # the other one is told whose it is
        assert [f"rank {rank}: " in message for _, message in told] == [rank == 1, rank == 0]
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_share_the_batch(data: Path, tmp_path: Path) -> None:
    code, message = refused(3, small(tmp_path / "run", data))
    assert code == 2 and "3 data-parallel ranks" in message


def test_missing_data(tmp_path: Path) -> None:
    code, message = refused(2, small(tmp_path / "run", tmp_path / "nowhere"))
    assert code == 3 and "nowhere" in message


def test_a_tokenizer_that_is_not_the_data_s(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "tokenizer.model").write_bytes(b"another")
    code, message = refused(2, small(tmp_path / "run", copy))
    assert code == 3 and "tokenizer.model: sha256" in message
    assert not (tmp_path / "run").exists()


def test_vocabulary_smaller_than_the_tokenizer_s(data: Path, tmp_path: Path) -> None:
    code, message = refused(2, small(tmp_path / "run", data, model__vocab_size=100))
    assert code in (2, 3) and "100" in message and "340" in message


def test_a_tokenizer_s_vocabulary_that_the_ranks_cannot_divide(data: Path, tmp_path: Path) -> None:
    """Its size is known once the data is open: then the layout is asked again, before anything is
    built or written."""
    divided = {"parallel": {"tensor": 3}, "model__width": 48, "model__heads": 3}
    code, message = refused(3, small(tmp_path / "run", data, **divided))
    assert code == 2 and "model.vocab_size=340, parallel.tensor=3" in message
    assert "model.vocab_size=342" in message.split("remedy:")[1]
    assert not (tmp_path / "run").exists()


def test_run_folder_in_use(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunFolder(folder).take():
        before = sorted(p.name for p in folder.rglob("*"))
        code, message = refused(2, small(folder, data))
        assert code == 2 and "in use" in message
        assert sorted(p.name for p in folder.rglob("*")) == before


def test_what_changed_since_the_checkpoint(data: Path, tmp_path: Path) -> None:
    tree = small(tmp_path / "run", data)
    assert run_world(attempt, 1, tree, 2) == [(EXIT_SAVED, "")]
    folder = checkpoint.folder_of(tmp_path / "run" / "checkpoints", 2)
    content = checkpoint.content_sha256(folder)
    config = (tmp_path / "run" / "config.yaml").read_text()

    code, message = refused(1, small(tmp_path / "run", data, data__sequence_length=128))
    assert code == 3 and "seq_len: was 64, is 128" in message
    code, message = refused(1, small(tmp_path / "run", data, model__width=64))
    assert code == 2 and "model.width: 32 in the checkpoint, 64 here" in message
    (tmp_path / "other").mkdir()
    other = small_dataset(tmp_path / "other", documents=30)
    code, message = refused(2, small(tmp_path / "run", other))
    assert code == 3 and "manifest: was" in message
    assert checkpoint.content_sha256(folder) == content
    assert (tmp_path / "run" / "config.yaml").read_text() == config  # that of what is there
    # Said on purpose, the run goes on with the new data.
    allowed = small(tmp_path / "run", other, data__allow_changed=True)
    assert run_world(attempt, 1, allowed) == [(0, "")]
    assert f"path: {other}" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_damaged_shard_stops_every_rank_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    tree = small(tmp_path / "run", copy, train__steps=200, data__workers=1)
    assert run_world(attempt, 2, tree, 2) == [(EXIT_SAVED, "")] * 2
    shard = sorted(copy.glob("train-*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    code, message = refused(2, tree)
    assert code == 3 and shard.name in message
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints")[0] == 2


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 3, "whole_below": 0}], ids=str)
def test_a_damaged_validation_shard_stops_every_rank(
    zero: dict[str, int], data: Path, tmp_path: Path
) -> None:
    """Rank 0 alone reads it (the other one has rows of pads); both leave with its message. In
    ZeRO-3 the other's forward would wait for it."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (shard,) = copy.glob("validation-*.tar")
    shard.write_bytes(shard.read_bytes()[:-512])
    quick = {"train__steps": 40, "validation__every": 2, "validation__rows": 2}
    tree = small(tmp_path / "run", copy, **quick, parallel={"zero": zero})
    code, message = refused(2, tree)
    assert code == 3 and shard.name in message


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hostile_checkpoint_with_right_checksums_is_refused(
    ranks: int, data: Path, tmp_path: Path
) -> None:
    tree = small(tmp_path / "run", data)
    assert run_world(attempt, 1, tree, 2) == [(EXIT_SAVED, "")]
    folder = checkpoint.folder_of(tmp_path / "run" / "checkpoints", 2)
    content = pickle.dumps(Hostile(tmp_path / "ran"))
    (folder / ".metadata").write_bytes(content)
    code, message = refused(ranks, tree)  # its checksum is not looked past
    assert code == 3 and "damaged" in message
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums[".metadata"] = hashlib.sha256(content).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(checksums))
    code, message = refused(ranks, tree)
    assert code == 3 and "names pathlib" in message
    code, message = refused(ranks, small(tmp_path / "new", data), None, str(folder))
    assert code == 3 and "names pathlib" in message
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_newer_code_ends_the_run_and_none_older_takes_its_place(
    data: Path, tmp_path: Path
) -> None:
    tree = small(tmp_path / "run", data, checkpoint__every_steps=2)
    assert run_world(attempt, 1, tree) == [(0, "")]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert checkpoint.list_steps(checkpoints) == [2, 4]
    checkpoint.require_format(checkpoints)
    folder = checkpoint.folder_of(checkpoints, 4)
    state = json.loads((folder / "state.json").read_text()) | {"format": checkpoint.FORMAT + 1}
    (folder / "state.json").write_text(json.dumps(state))
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(checksums))
    content = checkpoint.content_sha256(folder)
    code, message = refused(2, small(tmp_path / "run", data, train__steps=8))
    assert code == 3 and f"{folder}: format {checkpoint.FORMAT + 1}" in message
    with pytest.raises(DataError, match=f"format {checkpoint.FORMAT + 1}"):
        checkpoint.require_format(checkpoints)
    assert checkpoint.list_steps(checkpoints) == [2, 4]
    assert checkpoint.content_sha256(folder) == content


def full_disk(tree: dict[str, Any], what: str) -> tuple[int, str]:
    """The disk fills up while the run is under way; seen by rank 0 alone."""
    from titans_pretrain.run import files, lines, metrics

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if what == "metrics":
        write = lines.Lines._write

        def later(self: Any, line: bytes) -> None:
            if json.loads(line)["step"] == 3:
                refuse()
            write(self, line)

        lines.Lines._write = later  # type: ignore[method-assign]
    elif what == "events":  # told by rank 0 once the checkpoint is there
        tree = {**tree, "log": {**tree["log"], "tensorboard": True}}
        metrics.Metrics._add_texts = (  # type: ignore[method-assign]
            lambda self, step, texts: refuse() if "events/checkpoint" in texts else None
        )
    else:
        files.atomic_write = refuse  # type: ignore[assignment]
        checkpoint._write = refuse  # type: ignore[assignment]
    return attempt(tree)


@pytest.mark.parametrize("what", ["metrics", "events", "checkpoint"])
def test_a_full_disk_ends_every_rank_with_76(what: str, data: Path, tmp_path: Path) -> None:
    tree = small(tmp_path / "run", data, checkpoint__every_steps=0 if what == "checkpoint" else 2)
    for code, message in run_world(full_disk, 2, tree, what):
        assert code == 76 and "No space left" in message
    left = checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    # Told at the first step after the checkpoint is complete, or at the end.
    possible = {"metrics": [[2]], "events": [[2], [2, 4]], "checkpoint": [[]]}
    assert left in possible[what]
    # With room again, the same command finishes the run.
    assert run_world(attempt, 2, tree) == [(0, "")] * 2


def test_init_from_what_is_no_checkpoint(data: Path, tmp_path: Path) -> None:
    code, message = refused(2, small(tmp_path / "run", data), None, str(tmp_path))
    assert code == 3 and "checksums.json" in message


def test_divergence_ends_every_rank_with_4_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    tree = small(tmp_path / "run", data, train__steps=40, checkpoint__every_steps=1)
    code, message = refused(2, tree | {"optim": {"lr": 1e25, "clip": 1e30}})
    assert code == 4
    assert "loss and gradients are finite" in message and "samples" in message
    step = int(message.split(":")[0].removeprefix("step "))
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1] == step - 1


class Gone(Exception):
    pass


def leave_at_step_3(tree: dict[str, Any]) -> tuple[int, str]:
    """Rank 1 goes away between two steps, without a word to the others."""
    from titans_pretrain import step

    call = step.TrainStep.__call__

    def vanish(self: Any, batches: Any, number: int, *rest: Any) -> Any:
        if number == 3 and self.world.rank == 1:
            raise Gone
        return call(self, batches, number, *rest)

    step.TrainStep.__call__ = vanish  # type: ignore[method-assign]
    try:
        return attempt(tree)
    except Gone:
        return -1, "gone"


def test_a_lost_peer_is_a_node_fault(data: Path, tmp_path: Path) -> None:
    tree = small(tmp_path / "run", data, train__steps=40, checkpoint__every_steps=2)
    (code, message), (gone, _) = run_world(leave_at_step_3, 2, tree)
    assert gone == -1
    assert code == 76 and "lost another rank" in message
    assert run_world(attempt, 2, tree) == [(0, "")] * 2
