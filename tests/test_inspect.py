"""What `inspect` says of a shard without manifest, a run folder, and a path that is nothing."""

import io
import tarfile

import pytest

from titans_pretrain.errors import ConfigError, DataError
from titans_pretrain.inspect_command import inspect
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics


def test_a_shard_lists_its_members_and_a_cut_one_is_a_data_error(tmp_path):
    path = tmp_path / "train-00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(5):
            for kind, size in (("len", 8), ("tok", 1000 + number)):
                entry = tarfile.TarInfo(f"{number:04d}.{kind}")
                entry.size = size
                tar.addfile(entry, io.BytesIO(bytes(size)))
    lines = inspect(path).splitlines()
    assert lines[1] == "  10 files, 5,050 bytes of content"
    assert lines[3].split() == ["0000.tok", "1,000", "bytes"]
    assert lines[10] == "  ... 2 more"
    path.write_bytes(path.read_bytes()[:1700])
    with pytest.raises(DataError, match=r"train-00000\.tar"):
        inspect(path)


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
