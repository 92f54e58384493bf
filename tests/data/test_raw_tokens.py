"""Bytes and integers as vocabularies of their own: what they encode, what a folder keeps of them,
and the inputs that are ids already."""

import gzip
import hashlib
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import quiet
from tests.data.oracle import data_config, documents_of
from tests.data.test_inputs import tar
from tests.data.test_restart import content, killed_at
from titans_pretrain.cli import main
from titans_pretrain.data.baselines import fit_baselines
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import ConfigError, DataError

IDS = Settings(text_key="input_ids", unit_bytes=4_000, member_tokens=600, shard_tokens=2_000)


@given(st.text(max_size=60), st.lists(st.integers(0, 60), max_size=3))
def test_bytes_are_their_own_ids(text, cuts):
    tokenizer = Tokenizer.load("bytes")
    data = text.encode()
    assert tokenizer.encode(text).tolist() == list(data)
    assert tokenizer.decode([256, *tokenizer.encode(text), 257, 258]) == text
    bounds = [0, *sorted(cuts), 60]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    assert tokenizer.encode_parts(parts).tolist() == list(data)


def test_bytes():
    tokenizer = Tokenizer.load("bytes")
    special = (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk)
    assert (tokenizer.vocab_size, special, tokenizer.dtype) == (259, (256, 257, 258, -1), "<u2")
    assert tokenizer.decode([0x41, 0xFF, 0x42]) == "A\\xffB"
    assert tokenizer.pieces([0x41, 256, 0xFF]) == ["A", "<bos>", "\\xff"]
    assert tokenizer.encode_documents(["A"])[0].tolist() == [256, 0x41, 257]


def test_integers():
    tokenizer = Tokenizer.load("integers:50257")
    special = (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk)
    assert (tokenizer.vocab_size, special) == (50260, (50257, 50258, 50259, -1))
    assert tokenizer.encode("3 0 50256").tolist() == [3, 0, 50256]
    assert tokenizer.decode([50257, 3, 0, 50258]) == "3 0"
    assert tokenizer.encode_parts([np.asarray([1, 2]), np.asarray([3])]).tolist() == [1, 2, 3]
    for text in ("3 x", "50257", "-1", "9" * 30):
        with pytest.raises(DataError, match="integers:50257"):
            tokenizer.encode(text)
    sizes = {65_533: "<u2", 65_534: "<u4"}  # with bos, eos and pad
    assert {n: Tokenizer.load(f"integers:{n}").dtype.str for n in sizes} == sizes


def test_own_special_ids_are_not_doubled():
    """As in folders of GPT-2's ids: 50256 ends documents, and no new ids are made."""
    own = {"bos": 50256, "eos": 50256, "pad": 50256}
    tokenizer = Tokenizer.load("integers:50257", **own)
    assert tokenizer.vocab_size == 50257
    for ids in ([7, 8], [7, 8, 50256], [50256, 7, 8], [50256, 7, 8, 50256, 50256, 50256]):
        assert tokenizer.encode_parts([np.asarray(ids)]).tolist() == [7, 8]
    assert tokenizer.encode_parts([np.asarray([50256, 50256])]).tolist() == []
    some = Tokenizer.load("integers:10", pad=0)
    assert (some.bos, some.eos, some.pad, some.vocab_size) == (10, 11, 0, 12)
    assert some.encode_parts([np.asarray([0, 4, 0, 5, 0, 0])]).tolist() == [0, 4, 0, 5]


@pytest.mark.parametrize(
    "name", ["bytes:9", "integers", "integers:", "integers:0", "integers:-1", "integers:1e3"]
)
def test_refused_names(name, capsys):
    with pytest.raises(ConfigError, match="raw vocabularies are"):
        Tokenizer.load(name)
    assert main(["prepare", "x", "--out", "y", "--tokenizer", name]) == 2


def test_refused_special_ids(tmp_path):
    with pytest.raises(DataError, match=r"integers:9: pad id 9.*\n.*0\.\.8"):
        Tokenizer.load("integers:9", pad=9)
    path = tmp_path / "tokenizer.model"
    for line in (b'{"tokenizer": "letters", "ids": 3}', b'{"tokenizer": "bytes"}', b'{"tokenizer"'):
        path.write_bytes(line)
        with pytest.raises(DataError, match=r"tokenizer\.model: "):
            Tokenizer.load(path)


def test_inspect_says_what_they_are(capsys):
    assert main(["tokenizer", "inspect", "bytes", "--text", "aé"]) == 0
    told = capsys.readouterr().out
    assert "bytes: every byte is a token, 259 ids" in told and "bos 256, eos 257, pad 258" in told
    assert "3 tokens: a \\xc3 \\xa9" in told and "decoded: 'aé'" in told
    assert main(["tokenizer", "inspect", "integers:70000"]) == 0
    told = capsys.readouterr().out
    assert "token ids 0..69999 as they are given, 70,003 ids" in told
    assert "32-bit integers" in told


# ---- folders of bytes


def test_a_folder_of_bytes_goes_through_the_whole_stack(tmp_path, capsys):
    texts = [f"line {i}: é\n" for i in range(60)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = tmp_path / "out"
    command = ["prepare", str(source), "--tokenizer", "bytes", "--out", str(out), "--workers", "1"]
    assert main(command) == 0
    manifest = load_manifest(out)
    told = manifest.header["tokenizer"]
    assert (told["kind"], told["vocab_size"], told["unknown_tokens"]) == ("bytes", 259, 0)
    assert (told["bos"], told["eos"], told["pad"], told["unk"]) == (256, 257, 258, -1)
    assert told["sha256"] == hashlib.sha256((out / "tokenizer.model").read_bytes()).hexdigest()
    tokenizer = manifest.tokenizer()
    documents = [d for p in out.glob("*.tar") for d in documents_of(out, p.name)]
    assert all(d[0] == 256 and d[-1] == 257 for d in documents)
    assert sorted(tokenizer.decode(d) for d in documents) == sorted(texts)
    assert sum(map(len, documents)) == sum(len(t.encode()) + 2 for t in texts)

    capsys.readouterr()
    assert main(["inspect", str(out), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "tokenizer: bytes" in told and "259 ids" in told and r"'line " in told
    assert "0 unknown tokens" in told and "bytes per token" not in told

    stream = TrainStream(data_config(out), global_batch=2, micro_batch=2, align=8)
    [batch], _ = next(stream.batches(stream.start()))
    assert int(batch.tokens.max()) <= 258
    with pytest.raises(DataError, match="ids are below the vocabulary size 200"):
        small = TrainStream(
            data_config(out), global_batch=2, micro_batch=2, align=8, vocab_size=200
        )
        next(small.batches(small.start()))
    found = fit_baselines(data_config(out), align=8)
    assert 0 < found.bigram < found.unigram < np.log(259)

    (out / "tokenizer.model").write_bytes(Tokenizer.load("bytes").model.replace(b"258", b"255"))
    with pytest.raises(DataError, match="the folder's tokenizer is the one its tokens come from"):
        manifest.tokenizer()


def raw(tmp_path, names, settings, tokenizer="bytes", **more):
    out = tmp_path / "out"
    paths = [str(tmp_path / name) for name in names]
    prepare(paths, out, Tokenizer.load(tokenizer, **more), settings, say=quiet)
    manifest = load_manifest(out)
    return [
        d[1:-1]
        for split in manifest.splits.values()
        for s in split.shards
        for d in documents_of(out, s.file, manifest.dtype)
    ]


def test_any_file_is_bytes_and_may_be_cut(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
    (tmp_path / "genome.fa.gz").write_bytes(gzip.compress(data))
    (tmp_path / "program").write_bytes(data[::-1])
    settings = Settings(document_length=300, unit_bytes=2_000, validation=0.1)
    found = raw(tmp_path, ["genome.fa.gz", "program"], settings)
    wanted = [list(d[i : i + 300]) for d in (data, data[::-1]) for i in range(0, 10_000, 300)]
    assert sorted(found) == sorted(wanted)
    assert load_manifest(tmp_path / "out").header["identity"]["settings"]["document_length"] == 300


def test_whole_files_of_bytes(tmp_path):
    """Text with a byte order mark, or no text at all: bytes are kept as they are."""
    contents = [b"\xef\xbb\xbftext", b"\xff\x00\xfe", b" \n"]
    for i, data in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(data)
    found = raw(tmp_path, ["0.txt", "1.txt", "2.txt"], Settings())
    assert sorted(found) == sorted(list(data) for data in contents)


# ---- inputs that are ids already


@pytest.fixture(scope="module")
def documents():
    """60 documents of ids below 300, and their JSON lines."""
    draw = np.random.default_rng(1)
    return [draw.integers(0, 300, draw.integers(1, 200)).tolist() for _ in range(60)]


def as_npy(folder, documents):
    for i, ids in enumerate(documents):
        np.save(folder / f"{i:03d}.npy", np.asarray(ids, np.int32))


def as_bin(folder, documents):
    flat = [i for ids in documents for i in [*ids, 299]]
    np.asarray(flat, "<u2").tofile(folder / "x.bin")


def as_parquet(folder, documents, kind=None):
    table = pa.table({"input_ids": pa.array(documents, kind)})
    pq.write_table(table, folder / "x.parquet", row_group_size=13)


def as_tar(folder, documents):
    members = [json.dumps({"input_ids": ids}).encode() for ids in documents]
    (folder / "x.tar").write_bytes(tar((f"{i:03d}", {"json": m}) for i, m in enumerate(members)))


def as_jsonl(folder, documents):
    lines = [json.dumps({"input_ids": ids}) + "\n" for ids in documents]
    (folder / "x.jsonl").write_text("".join(lines))


FORMS = {
    "npy": as_npy,
    "bin": as_bin,
    "parquet": as_parquet,
    "parquet, uint16": lambda f, d: as_parquet(f, d, pa.large_list(pa.uint16())),
    "tar": as_tar,
    "jsonl": as_jsonl,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ids_gives_the_same_tokens(form, documents, tmp_path):
    documents = [[i % 299 for i in ids] for ids in documents]  # 299 separates those of the .bin
    source = tmp_path / "in"
    source.mkdir()
    FORMS[form](source, documents)
    tokenizer = Tokenizer.load("integers:300")
    settings = Settings(**{**vars(IDS), "separator": 299}) if form == "bin" else IDS
    manifest = prepare([str(source)], tmp_path / "out", tokenizer, settings, say=quiet)
    assert len(manifest.splits["train"].shards) >= 4
    found = [
        [d for s in split.shards for d in documents_of(tmp_path / "out", s.file)]
        for split in manifest.splits.values()
    ]
    wanted = [[300, *ids, 301] for ids in documents]
    assert sorted(found[0] + found[1]) == sorted(wanted)
    assert found[0] == [ids for ids in wanted if ids in found[0]]  # in the order of the input
    told = manifest.header["tokenizer"]
    assert (told["kind"], told["vocab_size"]) == ("integers", 303)
    hashes = {s.sha256 for split in manifest.splits.values() for s in split.shards}
    (tmp_path / "jsonl").mkdir()
    as_jsonl(tmp_path / "jsonl", documents)
    again = prepare([str(tmp_path / "jsonl")], tmp_path / "again", tokenizer, IDS, say=quiet)
    assert {s.sha256 for split in again.splits.values() for s in split.shards} == hashes


def test_rows_of_an_array_are_documents(tmp_path):
    rows = np.arange(120, dtype=np.uint8).reshape(30, 4)
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", np.asarray([7, 8, 9], np.int64))
    found = raw(tmp_path, ["x.npy", "y.npy"], Settings(), "integers:120")
    assert sorted(found) == sorted([*rows.tolist(), [7, 8, 9]])


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_a_long_sequence_is_cut_in_any_number_of_units(kind, tmp_path):
    ids = np.random.default_rng(2).integers(0, 1000, 5_003)
    np.save(tmp_path / "x.npy", ids)
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    settings = Settings(document_length=100, unit_bytes=3_000, validation=0.1)
    found = raw(tmp_path, [f"x.{kind}"], settings, "integers:1000")
    wanted = [ids[i : i + 100].tolist() for i in range(0, 5_003, 100)]
    assert sorted(found) == sorted(wanted)
    assert len(load_manifest(tmp_path / "out").splits["train"].shards) >= 5


def test_separators_and_lengths_together(tmp_path):
    ids = [1, 2, 3, 4, 5, 0, 6, 0, 7, 8, 9]
    np.asarray(ids, "<u2").tofile(tmp_path / "x.bin")
    settings = Settings(document_length=2, separator=0)
    found = raw(tmp_path, ["x.bin"], settings, "integers:10")
    assert sorted(found) == [[1, 2], [3, 4], [5], [6], [7, 8], [9]]


def test_a_killed_preparation_of_ids_goes_on(tmp_path):
    ids = np.random.default_rng(3).integers(0, 300, 40_000)
    np.asarray(ids, "<u2").tofile(tmp_path / "x.bin")
    settings = Settings(document_length=500, unit_bytes=40_000)
    tokenizer = Tokenizer.load("integers:300")
    prepare([str(tmp_path / "x.bin")], tmp_path / "whole", tokenizer, settings, say=quiet)
    assert killed_at(30, tmp_path / "x.bin", tokenizer, tmp_path / "out", settings)
    prepare([str(tmp_path / "x.bin")], tmp_path / "out", tokenizer, settings, say=quiet)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_large_ids_are_stored_in_32_bits(tmp_path):
    ids = np.asarray([[99_999, 70_000, 1], [2, 3, 4]])
    ids.astype("<u4").tofile(tmp_path / "x.bin")
    settings = Settings(document_length=3)
    assert sorted(raw(tmp_path, ["x.bin"], settings, "integers:100000")) == sorted(ids.tolist())


# ---- what is refused


BAD = {
    '{"input_ids": [5, 300]}': "id 300 at place 1; ids lie in 0..299",
    '{"input_ids": [5, -1]}': "id -1 at place 1; ids lie in 0..299",
    '{"input_ids": [1.5]}': "a list of float64",
    '{"input_ids": ["5"]}': "a list of <U1",
    '{"input_ids": [[1], [2]]}': "in 2 dimension(s)",
    '{"input_ids": [[1], [2, 3]]}': "key 'input_ids': ",
    '{"input_ids": [true, false]}': "a list of bool",
    '{"input_ids": [9999999999999999999999]}': "a list of object",
    '{"input_ids": []}': "empty",
    '{"input_ids": "5 6"}': "holds str, not a list of ids",
    '{"tokens": [5]}': "no key 'input_ids' among 'tokens'",
}


def test_bad_lists_are_skipped_and_counted(tmp_path):
    lines = [json.dumps({"input_ids": [n % 300, n // 300]}) for n in range(2000)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines[:1000], *BAD, *lines[1000:]]))
    settings = Settings(text_key="input_ids")
    raw(tmp_path, ["x.jsonl"], settings, "integers:300")
    found = json.loads((tmp_path / "out" / "skipped.json").read_text())
    for number, ((where, why), part) in enumerate(zip(found, BAD.values(), strict=True)):
        assert where == f"x.jsonl line {1001 + number}" and part in why


def test_ids_outside_of_the_vocabulary_stop_most_preparations(tmp_path):
    """Named with file and document: more than one document in a hundred."""
    np.save(tmp_path / "x.npy", np.asarray([[1, 2], [3, 70_000]]))
    with pytest.raises(DataError, match=r"x\.npy row 1: id 70000 at place 1; ids lie in 0\.\.9"):
        raw(tmp_path, ["x.npy"], Settings(), "integers:10")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "x.bin").write_bytes(np.arange(300, dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"x\.bin id 200: id 250 at place 50"):
        raw(tmp_path, ["x.bin"], Settings(document_length=100), "integers:250")


def refused(tmp_path, name, content, tokenizer, settings=None):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content)
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    with pytest.raises((ConfigError, DataError)) as told:
        settings = settings or Settings()
        prepare([str(path)], out, Tokenizer.load(tokenizer), settings, say=quiet)
    return str(told.value)


def test_refused_files(tmp_path):
    floats = np.zeros(4)
    assert "x.npy: 1-D array of float64" in refused(tmp_path, "x.npy", floats, "integers:9")
    cube = np.zeros((2, 2, 2), int)
    assert "x.npy: 3-D array of int64" in refused(tmp_path, "x.npy", cube, "integers:9")
    assert "one array of integers" in refused(tmp_path, "x.npy", b"no array", "integers:9")
    objects = np.asarray([{}, []], object)
    assert "one array of integers" in refused(tmp_path, "x.npy", objects, "integers:9")
    assert "x.bin: 3 bytes" in refused(tmp_path, "x.bin", b"abc", "integers:9")
    wide = np.arange(2000, dtype="<u4").tobytes()
    assert "32-bit integers?" in refused(tmp_path, "x.bin", wide, "integers:2000")
    assert "no usable document" in refused(tmp_path, "x.bin", b"", "integers:9")
    assert "unknown kind of file" in refused(tmp_path, "x.txt", b"1 2 3", "integers:9")
    assert "unknown kind of file" in refused(tmp_path, "x.bin.gz", b"1 2 3", "integers:9")
    model = str(tmp_path.parent / "none.model")
    assert "bytes, or integers:VOCAB" in refused(tmp_path, "x.txt", b"1 2 3", model)


def test_refused_options(tmp_path, tokenizer):
    line = b'{"text": "a"}\n{"text": "b"}\n'
    cut = Settings(document_length=9)
    assert "--document-length 9 with x.jsonl" in refused(tmp_path, "x.jsonl", line, "bytes", cut)
    rows = np.zeros((2, 2), int)
    assert "a 2-D array" in refused(tmp_path, "x.npy", rows, "integers:9", cut)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ConfigError, match="a tokenizer of text"):
        prepare([str(tmp_path / "x.txt")], tmp_path / "out", tokenizer, cut)
    with pytest.raises(ConfigError, match="document_length 0"):
        Settings(document_length=0)
    apart = Settings(separator=9)
    assert "without a .bin file" in refused(tmp_path, "x.npy", rows, "integers:9", apart)
    assert "in 0..8" in refused(tmp_path, "x.bin", b"\1\0", "integers:9", apart)
