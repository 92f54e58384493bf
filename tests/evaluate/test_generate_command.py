"""`titans-pretrain generate` writes what the run itself wrote at that step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.cli import main
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_DONE
from titans_pretrain.run.lines import read_lines


def train(tree: dict) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps by two ranks, each with a checkpoint and greedy samples."""
    folder = tmp_path_factory.mktemp("generate")
    tree = small_run(
        folder / "run",
        small_dataset(folder),
        train__steps=2,
        validation__every=1,
        checkpoint__every_steps=1,
        optim__lr=0.1,
        optim__min_lr=0.1,
    )
    tree["optim"]["warmup_steps"] = 0
    tree["model"]["vocab_size"] = 400  # more than the tokenizer has
    tree["log"]["sample"] = {"tokens": 8, "temperature": 0, "prompts": ["Once", "It was the"]}
    assert run_world(train, 2, tree) == [EXIT_DONE] * 2
    return folder / "run"


def written(run: Path) -> dict[int, str]:
    return {
        line["step"]: "\n---\n".join(s["prompt"] + s["text"] for s in line["samples"]) + "\n"
        for line in read_lines(run / "samples.jsonl", ("samples",))
    }


GREEDY = ["--prompt", "Once", "--prompt", "It was the", "--tokens", "8", "--temperature", "0"]


def test_it_repeats_the_samples_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = written(run)
    assert samples[1] != samples[2]
    for path, step in ((run, 2), (run / "checkpoints", 2), (run / "checkpoints/step-00000001", 1)):
        assert main(["generate", str(path), *GREEDY]) == 0
        assert capsys.readouterr().out == samples[step]


def test_seeds_draw_and_a_document_begins_without_a_prompt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--tokens", "12", "--seed", seed]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run/checkpoints/step-00000002/state.json"
    state.write_text(state.read_text() + " ")
    assert main(["generate", str(tmp_path / "run"), *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out == written(run)[1]
    assert "damaged checkpoint" in err and "step-00000002" in err
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000001")
    assert main(["generate", str(tmp_path / "run"), *GREEDY]) == 3
    assert "all 1 checkpoints are damaged" in capsys.readouterr().err


def test_mistakes_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), *GREEDY]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert main(["generate", str(run), "--tokenizer", str(tmp_path)]) == 3
    assert "--tokenizer FOLDER" in capsys.readouterr().err
    for wrong in (["--temperature", "-1"], ["--top-p", "0"], ["--tokens", "-3"]):
        with pytest.raises(SystemExit) as e:
            main(["generate", str(run), *wrong])
        assert e.value.code == 2
