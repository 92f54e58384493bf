"""What `inspect` says of prepared data, a run folder, and a path that is nothing."""

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain import cli
from titans_pretrain.config import load_config, parse_config
from titans_pretrain.errors import ConfigError, DataError
from titans_pretrain.inspect_command import inspect
from titans_pretrain.model.counts import parameter_count
from titans_pretrain.run.checkpoint import content_sha256
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics


def test_a_prepared_folder_and_its_shards_are_described_and_damage_is_named(tmp_path, capsys):
    lines = [json.dumps({"text": f"document {number} of forty"}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    tokenizer = str(Path(__file__).parent.parent / "tokenizers" / "demo.model")
    prepare = ["prepare", str(tmp_path / "text.jsonl"), "--tokenizer", tokenizer]
    assert cli.main([*prepare, "--out", str(out), "--workers", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "40 documents" in told
    assert "every shard and the tokenizer have the manifest's sha256" in told
    assert inspect(out / "manifest.json") in told
    [shard] = out.glob("train-*.tar")
    assert str(shard.name) in inspect(shard)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert cli.main(["inspect", str(out), "--verify"]) == 3
    assert str(shard.name) in capsys.readouterr().err


def test_a_run_tells_its_life_checkpoints_and_last_record(tmp_path):
    folder = RunFolder(tmp_path)
    for _ in range(2):
        with folder.take():
            folder.write_config("folder: x\n")
    with Metrics(folder, 0, False) as metrics:
        metrics.write(3, 4096, {"train/loss": 2.5})
    (folder.checkpoints / "step-00000003").mkdir()
    assert inspect(tmp_path).splitlines()[1:] == [
        "  life 2: ended",
        "  checkpoints: step-00000003",
        "  last record: step 3, 4,096 tokens",
        f"    {'train/loss':<24} 2.5",
    ]


def trained(tree: dict[str, Any]) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"), stop_after=2)


def test_a_checkpoint_tells_its_content_and_what_differs_now(tmp_path, recwarn):
    tree = small_run(tmp_path / "run", small_dataset(tmp_path))
    assert run_world(trained, 2, tree) == [75, 75]
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    told = inspect(folder)
    assert inspect(folder.parent) == told  # the latest
    assert [str(w.message) for w in recwarn] == []
    facts = dict(re.findall(r"^  (\w+(?: \w+)?)  +(.*)$", told, re.MULTILINE))
    assert facts["step"] == "2 of 100"
    assert facts["model"] == "mac, 2 blocks, width 32, 2 heads, 340 pieces"
    config = tmp_path / "run" / "config.yaml"
    parameters = sum(parameter_count(load_config(config).model).values())
    assert facts["parameters"] == f"{parameters:,}"
    assert facts["content sha256"] == content_sha256(folder)
    assert facts["files"].endswith("all as in checksums.json")
    assert "next_sample 16" in facts["data position"]
    assert "differs" not in told

    write_config(config, tree | {"optim": {"lr": 0.5}})
    state = json.loads((folder / "state.json").read_text())
    text = json.dumps(state | {"versions": {"torch": "1.0"}})
    (folder / "state.json").write_text(text)
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums["state.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(checksums))
    told = inspect(folder)
    assert facts["content sha256"] in told  # neither changes the training state
    assert f"config differs   optim.lr: 0.003 here, 0.5 in {config}" in told
    assert f"version differs  torch: 1.0 then, {version('torch')} now" in told


def test_other_paths_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="nothing known"):
        inspect(tmp_path)
    with pytest.raises(ConfigError, match="no such path"):
        inspect(tmp_path / "x.tar")


def test_a_step_folder_without_checksums_is_a_damaged_checkpoint(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(DataError, match="damaged checkpoint"):
        inspect(tmp_path / "step-00000001")


TP4 = ("parallel.tensor=4", "parallel.context=1", "train.micro_batch=1")


def test_a_config_tells_its_size_work_and_layouts():
    path = Path(__file__).parent.parent / "configs" / "titans-1.3b.yaml"
    told = inspect(path, overrides=["model.variant=mal", "train.steps=2", *TP4])
    assert "  mal, 18 blocks, width 2048, 8 heads of 256, MLP 5504\n" in told
    rows = dict(re.findall(r"^  (\w[\w ]*?)  +([\d,.]+)(?: |$)", told, re.MULTILINE))
    assert rows["embedding"] == "65,536,000"
    assert rows["all"] == "1,501,862,752"
    assert re.search(r"  with recompute +17,565.\d\d\n", told)
    kept = told.split("kept for backward")[1].split("\n\n")[0]
    sizes = {line[:22].strip(): float(line[22:].replace(",", "")) for line in kept.splitlines()[1:]}
    assert sizes.pop("sum") == pytest.approx(sum(sizes.values()), abs=0.5)
    # Logits in float32, a quarter on each of four tensor ranks, and the last norm's and map's rows.
    n, width, vocabulary = 4096, 2048, 32_000
    assert sizes["logits"] == pytest.approx(n * (vocabulary * 4 / 4 + width * 10) / 2**20, rel=1e-3)
    assert "  2 steps of 524,288 tokens: 1,048,576 in all, pads included\n" in told
    assert re.search(r"^ +1  no: parallel.tensor=4, 1 ranks; use a multiple of 4", told, re.M)
    assert [
        tuple(map(int, row))
        for row in re.findall(
            r"^ +(\d+) +(\d+) +TP (\d), PP 1, CP 1, DP (\d+), ZeRO-1$", told, re.M
        )
    ] == [(8, 64, 4, 2), (64, 8, 4, 16), (512, 1, 4, 128)]

    resolved = told.split("\nresolved\n")[1]
    assert "  steps: 2\n" in resolved and "  clip: 1.0\n" in resolved


def test_a_config_without_vocabulary_and_with_a_growing_batch(capsys):
    path = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
    ramp = ["train.ramp.start=8", "train.ramp.steps=9", "train.steps=10"]
    assert cli.main(["inspect", path, *ramp]) == 0
    told = capsys.readouterr().out
    assert "embedding and head are not counted here" in told
    assert f"{(9 * 8 + 16) * 256:,} in all" in told
    assert "not yet" not in told
    assert cli.main(["inspect", path, "train.stepz=1"]) == 2
    with pytest.raises(ConfigError, match="only the values of a config"):
        inspect(Path("somewhere"), overrides=["a=1"])
