"""What `inspect` tells of documents' lengths, pads, rows, and beginnings."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import quiet
from tests.data.oracle import documents_of, rows_of
from titans_pretrain.cli import main
from titans_pretrain.data import lengths
from titans_pretrain.data.inspect import describe_manifest
from titans_pretrain.data.lengths import beginnings, histogram, read_lengths, some_members, spaced
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.shards import BlockReader
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import DataError


@given(st.integers(0, 300), st.integers(0, 40))
def test_spaced(count, wanted):
    found = spaced(count, wanted).tolist()
    assert len(found) == min(count, wanted) == len(set(found)) and found == sorted(found)
    assert all(0 <= n < count for n in found)


def test_spaced_lies_in_the_middle_of_equal_parts():
    assert spaced(12, 3).tolist() == [2, 6, 10]
    assert spaced(3, 9).tolist() == [0, 1, 2]


def test_histogram():
    found = histogram(np.asarray([2, 3, 3, 4, 16, 31, 32]))
    assert found == [(1, 3, 8), (2, 1, 4), (3, 0, 0), (4, 2, 47), (5, 1, 32)]
    assert histogram(np.asarray([(1 << 31) - 1])) == [(30, 1, (1 << 31) - 1)]
    assert histogram(np.zeros(0, np.int64)) == []


def test_lengths_are_those_of_the_documents(prepared):
    manifest = load_manifest(prepared)
    for name, split in manifest.splits.items():
        found = read_lengths(BlockReader(manifest, name, 1, 1))
        wanted = [len(d) for s in split.shards for d in documents_of(prepared, s.file)]
        assert found.documents.tolist() == wanted and found.whole


def test_of_many_members_spaced_ones_are_read(prepared):
    manifest = load_manifest(prepared)
    split = manifest.splits["train"]
    count = len(split.members)
    assert some_members(split, 999, 999).tolist() == list(range(count))
    assert some_members(split, 999, 2).tolist() == spaced(count, 2).tolist()
    few = some_members(split, 2, 999)
    wanted = set(spaced(len(split.shards), 2).tolist())
    assert set(split.members["shard"][few].tolist()) == wanted
    assert len(few) == sum(split.members["shard"].tolist().count(s) for s in wanted)
    told = describe_manifest(prepared, shards=1)
    one = split.members["shard"].tolist().count(int(spaced(len(split.shards), 1)[0]))
    assert f"lengths of train documents, in tokens, of {one} of {count} members" in told


def test_beginnings_are_those_of_the_documents_named(prepared):
    """From every member, two of some; long ones cut at the line's end."""
    manifest = load_manifest(prepared)
    split, reader = manifest.splits["train"], BlockReader(manifest, "train", 1, 1)
    documents = [d for s in split.shards for d in documents_of(prepared, s.file)]
    wanted = len(split.members) + 3
    shown = list(beginnings(manifest, reader, read_lengths(reader), wanted))
    assert len(shown) == wanted
    numbers = []
    for line in shown:
        head, _, text = line.partition(" tokens): ")
        number, length = (int(word) for word in re.findall(r"[0-9]+", head.replace(",", "")))
        whole = repr(manifest.tokenizer().decode(documents[number]))
        assert length == len(documents[number]) and len(line) <= 100
        assert whole.startswith(text.removesuffix("...").removesuffix("'"))
        numbers.append(number)
    assert numbers == sorted(set(numbers)) and numbers[-1] > len(documents) * 0.9


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """16 documents as bytes: 1 to 16 letters each, with bos and eos 3 to 18 tokens."""
    folder = tmp_path_factory.mktemp("sequences")
    lines = [json.dumps({"text": "abcdefghijklmnop"[:n]}) + "\n" for n in range(1, 17)]
    (folder / "in.jsonl").write_text("".join(lines))
    out = folder / "out"
    prepare([str(folder / "in.jsonl")], out, Tokenizer.load("bytes"), Settings(0.1), say=quiet)
    return out


def test_the_whole_text(sequences, capsys):
    assert main(["inspect", str(sequences), "--sequence-length", "32", "--samples", "2"]) == 0
    told = capsys.readouterr().out
    manifest = load_manifest(sequences)
    train = manifest.splits["train"]
    documents = [d for s in train.shards for d in documents_of(sequences, s.file)]
    tokens = sum(map(len, documents))
    assert max(map(len, told.splitlines()[1:])) <= 100

    table = told.split("memory's chunk; rows of 32 tokens\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["1", "8", "16", "32"]  # 64 does not divide 32
    for line in table:
        align, pads, rows, filled = line.split()[:4]
        padded = sum(-(-len(d) // int(align)) * int(align) for d in documents)
        whole = rows_of(documents, 32, int(align), 0)
        assert pads == f"{padded / tokens - 1:.2%}" and int(rows) == len(whole)
        assert filled == f"{tokens / (32 * len(whole)):.2%}"

    text = told.split("lengths of train documents, in tokens\n")[1].split("\n  longer")[0]
    assert min(map(len, documents)) == 4
    for line, (low, high) in zip(text.splitlines()[1:], [(4, 7), (8, 15), (16, 31)], strict=True):
        inside = [len(d) for d in documents if low <= len(d) <= high]
        numbers = line.replace("#", "").split()
        assert numbers[0] == f"{low}-{high}" and numbers[1] == str(len(inside))
        assert numbers[3] == str(sum(inside))
    assert "longer than a row of 32: 0.00% of the documents, 0.00% of the tokens" in told

    shown = [line for line in told.splitlines() if line.startswith("  document ")]
    assert len(shown) == 4  # two of each split
    for line in shown[:2]:
        number = int(line.split()[1])
        assert line.endswith(repr(bytes(documents[number][1:-1]).decode()))
        assert f"({len(documents[number])} tokens)" in line


def test_bars_are_as_long_as_their_share(sequences):
    assert lengths._bars(np.asarray([0, 1, 7, 14])) == ["", "#", "#" * 7, "#" * 13]


def test_refused_sequence_length(sequences, capsys):
    assert main(["inspect", str(sequences), "--sequence-length", "0"]) == 2
    assert "--sequence-length 0" in capsys.readouterr().err


def test_a_damaged_length_is_named(sequences, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sequences, folder)
    split = load_manifest(folder).splits["train"]
    path = folder / split.shards[0].file
    content = bytearray(path.read_bytes())
    content[int(split.members[0]["len"])] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-00000\.tar.*\.len at bytes"):
        describe_manifest(folder)
