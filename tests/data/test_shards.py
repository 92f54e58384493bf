"""Damaged shards are named with file and offset, and never read as if they were whole."""

import shutil

import numpy as np
import pytest

from tests.data.oracle import data_config, documents_of
from titans_pretrain.data.inspect import describe_manifest, describe_shard
from titans_pretrain.data.manifest import MEMBER, Split, load_manifest, write_manifest
from titans_pretrain.data.pack import ShardWriter, padded_counts
from titans_pretrain.data.shards import BlockReader, verify_shard
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.errors import ConfigError, DataError


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def read_an_epoch(folder, workers=0, vocab_size=None):
    """Samples read before the error, if any."""
    one = TrainStream(
        data_config(folder, workers=workers),
        global_batch=1,
        micro_batch=1,
        align=16,
        vocab_size=vocab_size,
    )
    for _, state in one.batches(one.start()):
        if state["next_sample"] >= one.epoch_rows["corpus"]:
            return


def flip(path, offset, bit=1):
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ bit]))


def victim(folder, shard=1):
    manifest = load_manifest(folder)
    split = manifest.splits["train"]
    first = split.members[split.first_member[shard] + 1]
    return folder / split.shards[shard].file, split, first


def test_whole_folder_reads(folder):
    read_an_epoch(folder)
    assert "every shard" in describe_manifest(folder, verify=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated(folder, workers):
    path, split, _ = victim(folder)
    whole = split.shards[1].bytes
    with path.open("r+b") as f:
        f.truncate(whole - 5000)
    with pytest.raises(DataError, match=f"ends at offset {whole - 5000}") as told:
        read_an_epoch(folder, workers)
    assert str(path) in str(told.value) and told.value.exit_code == 3


def test_missing(folder):
    path, _, _ = victim(folder)
    path.unlink()
    with pytest.raises(DataError, match="No such file") as told:
        read_an_epoch(folder)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("content", ["tok", "len"])
def test_flipped_bit_is_found_before_its_member_is_used(folder, content, where):
    path, _, row = victim(folder)
    begin = int(row[content])
    size = int(row["tokens"]) * 2 if content == "tok" else int(row["documents"]) * 4
    at = begin + {"first": 0, "middle": size // 2, "last": size - 1}[where]
    flip(path, at)
    with pytest.raises(
        DataError, match=rf"\.{content} at bytes {begin}\.\.{begin + size - 1} is"
    ) as e:
        read_an_epoch(folder)
    assert str(path) in str(e.value)
    assert "train-00001-00000-00001" in str(e.value)  # the member's key in the tar


def test_flipped_bit_in_a_header_is_found_by_verify(folder):
    path, split, row = victim(folder)
    flip(path, int(row["tok"]) - 300)
    with pytest.raises(DataError, match=path.name):
        verify_shard(folder, split.shards[1])
    with pytest.raises(DataError, match=path.name):
        describe_manifest(folder, verify=True)
    with pytest.raises(DataError, match=path.name):
        describe_shard(path)


def test_two_shards_exchanged(folder):
    path, split, _ = victim(folder)
    other = folder / split.shards[2].file
    content = other.read_bytes()[: split.shards[1].bytes].ljust(split.shards[1].bytes, b"\0")
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not what was prepared"):
        read_an_epoch(folder)


def test_ids_beyond_the_vocabulary(folder):
    with pytest.raises(DataError, match=r"\.tok at byte \d+: token id \d+") as told:
        read_an_epoch(folder, vocab_size=100)
    assert "100" in told.value.rule and "train-" in str(told.value)


def test_damaged_manifest(folder, tmp_path):
    path = folder / "manifest.json"
    whole = path.read_text()
    for content, message in [
        (whole.replace('"pad": 3', '"pad": 2'), "hash"),
        (whole[:-20], "manifest.json"),
        (whole.replace('"version": 1', '"version": 9'), "version 9"),
        ("[]", "version list"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            load_manifest(folder)
    path.write_text(whole)
    flip(folder / "train.members.npy", 300)
    with pytest.raises(DataError, match=r"train\.members\.npy: sha256"):
        load_manifest(folder)
    with pytest.raises(DataError, match="titans-pretrain prepare"):
        load_manifest(tmp_path / "nowhere")


def test_foreign_tokenizer_in_the_folder(folder):
    flip(folder / "tokenizer.model", 2000)
    with pytest.raises(DataError, match="tokenizer"):
        load_manifest(folder).tokenizer()


def test_alignment_without_a_column(folder):
    with pytest.raises(ConfigError, match="alignment 48"):
        BlockReader(load_manifest(folder), "train", 96, 48)
    with pytest.raises(ConfigError, match="alignment 64"):
        BlockReader(load_manifest(folder), "train", 96, 64)


def test_members_table_counts_what_the_tar_holds(prepared):
    """Tokens, documents and padded counts against documents read by stock WebDataset."""
    manifest = load_manifest(prepared)
    for split in manifest.splits.values():
        for number, shard in enumerate(split.shards):
            documents = documents_of(prepared, shard.file)
            rows = split.members[split.members["shard"] == number]
            assert len(documents) == shard.documents == rows["documents"].sum()
            assert sum(map(len, documents)) == shard.tokens == rows["tokens"].sum()
            for column, align in enumerate((1, 8, 16, 32, 64, 128, 256, 512, 1024)):
                padded = sum(-(-len(d) // align) * align for d in documents)
                assert rows["padded"][:, column].sum() == padded
            assert all(d[0] == manifest.bos and d[-1] == manifest.eos for d in documents)


def test_large_ids_and_one_long_document(tmp_path):
    """32-bit tokens; a document larger than a member and than several rows."""
    random = np.random.default_rng(0)
    documents = [random.integers(4, 100_000, n).astype("<u4") for n in (5, 3000, 1, 70)]
    writer = ShardWriter(tmp_path, "train", np.dtype("<u4"), 1000, 10_000)
    for document in documents:
        writer.add(document)
    shards, members = writer.close()
    assert members["documents"].tolist() == [2, 2]
    header = {
        "tokenizer": {"sha256": "", "vocab_size": 100_000, "bos": 1, "eos": 2, "pad": 3},
        "dtype": "<u4",
    }
    splits = {"train": Split(shards, members), "validation": Split([], np.zeros(0, MEMBER))}
    write_manifest(tmp_path, header, splits)
    reader = BlockReader(load_manifest(tmp_path), "train", 256, 8)
    found = []
    for block in range(int(reader.blocks[0])):
        row = np.full(256, 3), np.full(256, 3), np.full(256, -1), np.zeros(256, bool)
        reader.read(0, block, *row)
        found += row[0][row[2] >= 0].tolist()
    assert found == np.concatenate(documents).tolist()
    with pytest.raises(DataError, match="validation split is empty"):
        next(
            validation_batches(
                load_manifest(tmp_path), data_config(tmp_path), micro_batch=1, align=8
            )
        )


def test_padded_counts():
    assert padded_counts(np.array([1, 8, 9, 1025])).tolist() == [
        1 + 8 + 9 + 1025,
        8 + 8 + 16 + 1032,
        16 + 16 + 16 + 1040,
        32 + 32 + 32 + 1056,
        64 * 3 + 1088,
        128 * 3 + 1152,
        256 * 3 + 1280,
        512 * 3 + 1536,
        1024 * 3 + 2048,
    ]


def test_description_in_words(prepared):
    told = describe_manifest(prepared)
    split = load_manifest(prepared).splits["train"]
    [train] = [line.split() for line in told.splitlines() if line.split()[:1] == ["train"]]
    assert train[1:3] == [f"{split.documents:,}", f"{split.tokens:,}"] and "340 ids" in told
    shard = split.shards[0]
    assert f"{shard.documents:,} documents" in describe_shard(prepared / shard.file)
    with pytest.raises(DataError, match="not in the folder's manifest"):
        describe_shard(prepared / "other.tar")
