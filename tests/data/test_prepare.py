"""Inputs good and bad, the held-out share, and what a user reads when something is wrong."""

import errno
import gzip
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import SETTINGS, quiet
from tests.data.oracle import documents_of, write_corpus
from titans_pretrain.cli import main
from titans_pretrain.data.content import Reading
from titans_pretrain.data.inputs import find_inputs
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.scan import Scan, choose_validation, cut_units, scan_file
from titans_pretrain.errors import ConfigError, DataError, NodeError

DEMO = str(Path(__file__).parents[2] / "tokenizers" / "demo.model")


def texts_of(folder, split):
    manifest = load_manifest(folder)
    tokenizer = manifest.tokenizer()
    return [
        tokenizer.decode(ids[1:-1])
        for shard in manifest.splits[split].shards
        for ids in documents_of(folder, shard.file)
    ]


def lines(texts, key="text"):
    return "".join(json.dumps({key: t}) + "\n" for t in texts)


def test_every_document_once_in_one_split(prepared, corpus):
    train, held = texts_of(prepared, "train"), texts_of(prepared, "validation")
    assert sorted(train + held) == sorted(corpus[1])
    order = [t for t in corpus[1] if t in set(train)]
    assert train == order  # the shards keep the input's order


def test_shards_open_in_stock_webdataset(prepared):
    import webdataset

    urls = sorted(str(p) for p in prepared.glob("train-*.tar"))
    keys = [s["__key__"] for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert len(keys) == len(set(keys)) == len(load_manifest(prepared).splits["train"].members)
    sample = next(iter(webdataset.WebDataset(urls, shardshuffle=False)))
    assert {"tok", "len"} <= set(sample)


PACKED = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
PACKED[".zst"] = (
    lambda data: b"".join(  # several frames
        zstandard.compress(data[i : i + 10_000]) for i in range(0, len(data), 10_000)
    )
)


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_and_plain_inputs(suffix, corpus, tokenizer, tmp_path):
    """Same documents, same tokens; the units of work cut packed files too."""
    content = Path(corpus[0]).read_bytes()
    path = tmp_path / f"docs.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](content))
    prepare([str(path)], tmp_path / "out", tokenizer, SETTINGS, say=quiet)
    assert sorted(
        texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "validation")
    ) == (sorted(corpus[1]))
    assert len(load_manifest(tmp_path / "out").splits["train"].shards) >= 4


def test_folder_of_text_files(tokenizer, tmp_path):
    source = tmp_path / "texts"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (source / "deep" / "b.txt").write_text("two\n\nparagraphs\n")
    (source / "c.jsonl").write_text(lines(["one line", "another line"]) + "\n\n")
    (source / "notes.md").write_text("not an input")
    prepare([str(source)], tmp_path / "out", tokenizer, say=quiet)
    found = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "validation")
    expected = ["with a byte order mark", "two\n\nparagraphs\n", "one line", "another line"]
    assert sorted(found) == sorted(expected)


BAD = {
    "empty": b'{"text": ""}',
    "blank": b'{"text": " \\n\\t "}',
    "not JSON": b'{"text": "cut off',
    "no key": b'{"body": "elsewhere"}',
    "not text": b'{"text": 7}',
    "null": b'{"text": null}',
    "a list": b"[1, 2]",
    "not UTF-8": b'{"text": "\xff\xfe"}',
    "a huge number": b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    "half a pair": b'{"text": "\\ud800"}',
}


def test_bad_documents_are_skipped_counted_and_listed(tokenizer, tmp_path):
    good = [f"document number {i}" for i in range(1000)]
    content = lines(good[:500]).encode() + b"\n".join(BAD.values()) + b"\n"
    (tmp_path / "in.jsonl").write_bytes(content + lines(good[500:]).encode())
    out = tmp_path / "out"
    manifest = prepare([str(tmp_path / "in.jsonl")], out, tokenizer, say=quiet)
    assert sorted(texts_of(out, "train") + texts_of(out, "validation")) == sorted(good)
    assert manifest.header["skipped"]["documents"] == len(BAD)
    listed = json.loads((out / "skipped.json").read_text())
    assert [where for where, _ in listed] == [
        f"in.jsonl line {n}" for n in range(501, 501 + len(BAD))
    ]
    reasons = [why for _, why in listed]
    for why, part in zip(
        reasons,
        [
            "empty",
            "empty",
            "not JSON",
            "no key",
            "holds int",
            "NoneType",
            "no key",
            "UTF-8",
            "digits",
            "pair",
        ],
    ):
        assert part in why


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
def test_on_bad_stop(line, tokenizer, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines(["good"] * 3).encode() + line + b"\n" + lines(["other"]).encode())
    command = ["prepare", str(path), "--tokenizer", DEMO, "--workers", "1"]
    command += ["--out", str(tmp_path / "out"), "--on-bad", "stop"]
    assert main(command) == 3
    assert "in.jsonl line 4" in capsys.readouterr().err


def test_more_than_one_percent_bad_stops(tokenizer, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(lines([f"good {i}" for i in range(98)] + ["", ""]))
    with pytest.raises(DataError, match=r"2 of 100 documents") as told:
        prepare([str(path)], tmp_path / "out", tokenizer, say=quiet)
    assert "in.jsonl line 99: empty" in str(told.value) and told.value.exit_code == 3
    path.write_text(lines([f"good {i}" for i in range(99)] + [""]))
    manifest = prepare([str(path)], tmp_path / "other", tokenizer, say=quiet)
    assert manifest.header["documents"] == 99


def test_bad_text_files(tokenizer, tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(210):
        (source / f"{i:03d}.txt").write_text(f"text {i}")
    (source / "a.txt").write_text("")
    (source / "b.txt").write_bytes(b"fine so far \xff\xff")
    out = tmp_path / "out"
    prepare([str(source)], out, tokenizer, say=quiet)
    listed = dict(json.loads((out / "skipped.json").read_text()))
    assert listed["texts/a.txt"] == "empty"
    assert "not UTF-8 (near byte 12)" in listed["texts/b.txt"]
    assert len(texts_of(out, "train")) + len(texts_of(out, "validation")) == 210


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b"", "no usable document"),
        ("in.jsonl", b"\n\n", "no usable document"),
        ("in.jsonl", b'{"text": ""}\n', "no usable document"),
        ("in.jsonl", b'{"text": "only one"}\n', "1 different"),
        ("in.jsonl", b'{"text": "twin"}\n{"text": "twin"}\n', "1 different"),
        ("in.csv", b"a,b", "unknown kind of file"),
        ("in.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-30], "broken .gz archive"),
        ("in.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9999)[:-30], "broken .xz archive"),
        ("in.jsonl.zst", b"not zstandard", "broken .zst archive"),
        ("in.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9999)[:-5], "broken .zst archive"),
    ],
)
def test_refused_inputs(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([str(path)], tmp_path / "out", tokenizer, say=quiet)


def test_missing_and_empty_inputs(tokenizer, tmp_path):
    with pytest.raises(DataError, match="not found"):
        prepare([str(tmp_path / "none")], tmp_path / "out", tokenizer)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a\.txt: given twice"):
        prepare([str(tmp_path), str(tmp_path / "a.txt")], tmp_path / "out", tokenizer)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden" / "a.txt").write_text("a")
    with pytest.raises(DataError, match="no text files"):
        prepare([str(tmp_path / "empty")], tmp_path / "out", tokenizer)


@pytest.mark.parametrize("share", [0, -0.1, 0.6, float("nan")])
def test_refused_share(share):
    with pytest.raises(ConfigError, match="--validation"):
        Settings(validation=share)


@given(
    sizes=st.lists(st.integers(1, 100_000), min_size=2, max_size=300),
    share=st.sampled_from([0.01, 0.03, 0.2, 0.5]),
    seed=st.integers(0, 100),
)
def test_some_documents_are_held_out_and_some_kept(sizes, share, seed):
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(sizes), dtype=np.uint64)
    held = choose_validation(hashes, np.asarray(sizes, np.uint64), share)
    taken = [size for h, size in zip(hashes.tolist(), sizes) if h in held]
    assert 0 < len(taken) < len(sizes)
    again = choose_validation(hashes[::-1], np.asarray(sizes[::-1], np.uint64), share)
    assert again == held  # whatever the order of the documents


@given(sizes=st.lists(st.integers(1, 1000), min_size=100, max_size=400), seed=st.integers(0, 100))
def test_between_two_and_five_percent_is_held_out(sizes, seed):
    """Of 100 documents and more, none larger than 2 % of the text."""
    sizes = [max(s, 500) for s in sizes]
    hashes = np.random.default_rng(seed).integers(0, 2**64, len(sizes), dtype=np.uint64)
    held = choose_validation(hashes, np.asarray(sizes, np.uint64), 0.03)
    share = sum(s for h, s in zip(hashes.tolist(), sizes) if h in held) / sum(sizes)
    assert 0.02 <= share <= 0.05


def test_large_documents_are_spared_rather_than_missing_the_share():
    """The lowest hash belongs to half of the text: it stays in the train split."""
    held = choose_validation(
        np.arange(101, dtype=np.uint64), np.asarray([100] + [1] * 100, np.uint64), 0.03
    )
    assert 0 not in held and [h for h in range(101) if h in held] == [1, 2, 3, 4, 5, 6]


def test_equal_documents_stay_together(tokenizer, tmp_path):
    texts = [f"text {i % 40}" for i in range(200)]
    (tmp_path / "in.jsonl").write_text(lines(texts))
    prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", tokenizer, say=quiet)
    train, held = (set(texts_of(tmp_path / "out", s)) for s in ("train", "validation"))
    assert not train & held and len(train | held) == 40


def test_other_text_key(tokenizer, tmp_path):
    (tmp_path / "in.jsonl").write_text(lines(["one", "two", "three"], key="body"))
    with pytest.raises(DataError, match="--text-key"):
        prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", tokenizer, say=quiet)
    settings = Settings(text_key="body")
    out = tmp_path / "other"
    prepare([str(tmp_path / "in.jsonl")], out, tokenizer, settings, say=quiet)
    assert len(texts_of(out, "train")) == 2


def test_the_folder_belongs_to_one_preparation(corpus, tokenizer, tmp_path, prepared):
    other = write_corpus(tmp_path / "other.jsonl", 10, seed=3)
    assert other
    with pytest.raises(DataError, match="prepared from other inputs"):
        prepare([str(tmp_path / "other.jsonl")], prepared, tokenizer, SETTINGS, say=quiet)
    before = (prepared / "manifest.json").stat().st_mtime_ns
    prepare([str(corpus[0])], prepared, tokenizer, SETTINGS, say=quiet)  # already done: no work
    assert (prepared / "manifest.json").stat().st_mtime_ns == before
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.doc").write_text("precious")
    with pytest.raises(DataError, match=r"not empty \(thesis\.doc\)"):
        prepare([str(corpus[0])], taken, tokenizer, SETTINGS, say=quiet)
    assert (taken / "thesis.doc").read_text() == "precious"


@pytest.mark.parametrize("after", [1, 4, 9, 20])
def test_full_disk_loses_nothing(after, corpus, tokenizer, tmp_path, prepared, monkeypatch):
    """The n-th write meets a full disk: a clear error, and the same command finishes the work."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    with pytest.raises(NodeError, match="No space left") as told:
        prepare([str(corpus[0])], out, tokenizer, SETTINGS, say=quiet)
    assert told.value.exit_code == 76 and "same command again" in told.value.remedy
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(os, "fsync", real)
    prepare([str(corpus[0])], out, tokenizer, SETTINGS, say=quiet)
    assert load_manifest(out).hash == load_manifest(prepared).hash


def test_folder_that_cannot_be_written(corpus, tokenizer):
    with pytest.raises(NodeError, match="/proc/titans"):
        prepare([str(corpus[0])], "/proc/titans", tokenizer, SETTINGS, say=quiet)


def test_the_command(tmp_path, capsys, corpus):
    out = tmp_path / "out"
    command = ["prepare", str(corpus[0]), "--out", str(out), "--tokenizer", DEMO]
    assert main([*command, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "120 documents" in printed and "  validation   " in printed
    assert main([*command, "--workers", "0"]) == 2
    assert main([*command, "--tokenizer", str(corpus[0])]) == 3


@given(
    files=st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=5),
    unit=st.integers(1, 120),
)
def test_units_cover_every_document_once(files, unit):
    """Each document (by its first byte) lies in one piece; units close once they are full."""
    scans = []
    for sizes in files:
        offsets = [10 * i for i in range(len(sizes))]
        zeros = np.zeros(len(sizes), np.uint64)
        scans.append(Scan(zeros, np.asarray(sizes, np.uint64), np.asarray(offsets, np.uint64), []))
    taken = []
    for number, pieces in enumerate(units := cut_units(scans, unit)):
        held = []
        for piece in pieces:
            stop = float("inf") if piece.stop is None else piece.stop
            held += [
                (piece.file, i)
                for i in range(len(files[piece.file]))
                if piece.start <= 10 * i < stop
            ]
        size = sum(files[f][i] for f, i in held)
        if number < len(units) - 1:
            assert size >= unit and size - files[held[-1][0]][held[-1][1]] < unit
        taken += held
    assert taken == [(f, i) for f, sizes in enumerate(files) for i in range(len(sizes))]


def test_the_shipped_corpus_holds_out_between_two_and_five_percent():
    [file] = find_inputs([str(Path(DEMO).parents[1] / "configs" / "corpus")])
    scan = scan_file(file, Reading(), "stop", lambda _size: None)
    held = choose_validation(scan.hashes, scan.sizes, 0.03)
    taken = [int(size) for h, size in zip(scan.hashes.tolist(), scan.sizes) if h in held]
    assert 0.02 <= sum(taken) / int(scan.sizes.sum()) <= 0.05
    assert 0.02 <= len(taken) / 697 <= 0.05 and not held.spared
