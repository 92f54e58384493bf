"""What `inspect` says of prepared data, a run folder, and a path that is nothing."""

import json
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.errors import ConfigError, DataError
from titans_pretrain.inspect_command import inspect
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


def test_other_paths_are_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="nothing known"):
        inspect(tmp_path)
    with pytest.raises(ConfigError, match="no such path"):
        inspect(tmp_path / "x.tar")


def test_a_step_folder_without_checksums_is_a_damaged_checkpoint(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(DataError, match="damaged checkpoint"):
        inspect(tmp_path / "step-00000001")
