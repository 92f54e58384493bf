"""Parquet, WebDataset tars and packed files as inputs: the documents of JSON lines, token for
token; restarts; and what a user reads when something is wrong."""

import gzip
import io
import json
import lzma
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard

from tests.data.conftest import SETTINGS, quiet
from tests.data.test_restart import content, killed_at
from titans_pretrain.data import unpack
from titans_pretrain.data.content import InputFile, Reading
from titans_pretrain.data.encode import cut_runs
from titans_pretrain.data.inputs import documents, find_inputs
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.scan import Piece
from titans_pretrain.errors import DataError


def jsonl(texts):
    return "".join(json.dumps({"text": t, "id": 7}) + "\n" for t in texts).encode()


def tar(samples):
    """A WebDataset tar of (key, {suffix: bytes}), as the library writes it."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return buffer.getvalue()


def parquet(path, column, rows=7, **more):
    table = pa.table({"id": list(range(len(column))), "text": column})
    pq.write_table(table, path, row_group_size=rows, **more)


def tar_of_texts(texts):
    return tar((f"{i:05d}", {"txt": t.encode(), "json": b"{}"}) for i, t in enumerate(texts))


def tar_of_json(texts):
    return tar(
        (f"{i:05d}", {"json": json.dumps({"text": t}).encode()}) for i, t in enumerate(texts)
    )


def tar_of_lines(texts):
    """Several documents a sample."""
    return tar((f"{i:05d}", {"jsonl": jsonl(texts[i : i + 9])}) for i in range(0, len(texts), 9))


def write_txt(folder, texts):
    (folder / "deep").mkdir()
    for i, text in enumerate(texts):
        (folder / "deep" / f"{i:05d}.txt").write_bytes(text.encode())


def write_mixed(folder, texts):
    """A kind after the other, in the order of their names."""
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[:20])))
    parquet(folder / "b.parquet", texts[20:50])
    (folder / "c.tar").write_bytes(tar_of_texts(texts[50:80]))
    (folder / "d").mkdir()
    for i, text in enumerate(texts[80:90]):
        (folder / "d" / f"{i}.txt.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "e.tgz").write_bytes(gzip.compress(tar_of_lines(texts[90:])))
    (folder / "notes.md").write_text("no input")


def dictionary(texts):
    return pa.array(texts).dictionary_encode()


FORMS = {
    "parquet": lambda f, t: parquet(f / "x.parquet", t),
    "parquet, one row group": lambda f, t: parquet(f / "x.parquet", t, 10_000),
    "parquet, large strings": lambda f, t: parquet(f / "x.parquet", pa.array(t, pa.large_string())),
    "parquet, dictionary": lambda f, t: parquet(f / "x.parquet", dictionary(t)),
    "tar of texts": lambda f, t: (f / "x.tar").write_bytes(tar_of_texts(t)),
    "tar of objects": lambda f, t: (f / "x.tar").write_bytes(tar_of_json(t)),
    "tar of lines": lambda f, t: (f / "x.tar").write_bytes(tar_of_lines(t)),
    "tar.gz": lambda f, t: (f / "x.tar.gz").write_bytes(gzip.compress(tar_of_texts(t))),
    "tar.xz": lambda f, t: (f / "x.tar.xz").write_bytes(lzma.compress(tar_of_lines(t))),
    "tar.zst": lambda f, t: (f / "x.tar.zst").write_bytes(zstandard.compress(tar_of_json(t))),
    "text files": write_txt,
    "a mixed folder": write_mixed,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tokens(form, corpus, prepared, tokenizer, tmp_path):
    """Shard for shard: the manifest's splits hold the sha256 of every shard and table."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    FORMS[form](source, corpus[1])
    manifest = prepare([str(source)], out, tokenizer, SETTINGS, say=quiet)
    assert manifest.header["splits"] == load_manifest(prepared).header["splits"]
    assert manifest.header["skipped"]["documents"] == 0
    assert manifest.header["text_bytes"] == sum(len(t.encode()) for t in corpus[1])


@pytest.mark.parametrize("form", ["parquet", "tar.gz"])
def test_any_number_of_processes(form, corpus, prepared, tokenizer, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    FORMS[form](source, corpus[1])
    manifest = prepare([str(source)], out, tokenizer, SETTINGS, 2, say=quiet)
    assert manifest.header["splits"] == load_manifest(prepared).header["splits"]


@pytest.mark.parametrize("form", ["parquet", "tar.gz", "a mixed folder"])
def test_killed_in_the_middle(form, corpus, tokenizer, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    FORMS[form](source, corpus[1])
    prepare([str(source)], tmp_path / "whole", tokenizer, SETTINGS, say=quiet)
    for step in (8, 35, 60):
        out = tmp_path / str(step)
        assert killed_at(step, source, tokenizer, out)
        prepare([str(source)], out, tokenizer, SETTINGS, say=quiet)
        assert content(out) == content(tmp_path / "whole")


def opened_by(monkeypatch, work):
    """How often `work` opens a packed file, and how many bytes it unpacks to get to its start."""
    real, count = unpack._unpacked, [0]

    def counting(packed, compression):
        count[0] += 1
        return real(packed, compression)

    monkeypatch.setattr(unpack, "_unpacked", counting)
    work()
    monkeypatch.undo()
    return count[0]


@pytest.mark.parametrize("name", ["x.jsonl.xz", "x.tar"])
def test_a_packed_file_is_opened_once_a_worker(name, corpus, tokenizer, tmp_path, monkeypatch):
    """Once for the scan and once for all units together; after a kill, too."""
    make = {"x.jsonl.xz": lambda t: lzma.compress(jsonl(t)), "x.tar": tar_of_texts}[name]
    path = tmp_path / name
    path.write_bytes(make(corpus[1]))

    def work(out):
        return lambda: prepare([str(path)], tmp_path / out, tokenizer, SETTINGS, say=quiet)

    assert opened_by(monkeypatch, work("out")) == 2
    assert len(load_manifest(tmp_path / "out").splits["train"].shards) >= 4
    assert killed_at(40, path, tokenizer, tmp_path / "killed")
    assert len(list((tmp_path / "killed" / ".work" / "units").glob("?????"))) >= 2
    assert opened_by(monkeypatch, work("killed")) == 1
    assert content(tmp_path / "killed") == content(tmp_path / "out")


def test_a_manifest_of_text_holds_what_it_always_held(prepared):
    """Options of raw sequences leave no trace where they are not used: runs know their data by
    the manifest's hash."""
    header = load_manifest(prepared).header
    assert list(header["identity"]["settings"]) == [
        "validation",
        "on_bad",
        "text_key",
        "member_tokens",
        "shard_tokens",
        "unit_bytes",
    ]
    keys = ["sha256", "vocab_size", "bos", "eos", "pad", "unk", "unknown_tokens"]
    assert list(header["tokenizer"]) == keys


def test_runs_of_units():
    plain, packed = InputFile("/a", "a", ".jsonl", ""), InputFile("/b", "b", ".jsonl", ".gz")
    units = [
        [Piece(0, 0, 10)],
        [Piece(0, 10, None), Piece(1, 0, 5)],  # begins in the plain file
        [Piece(1, 5, 9)],
        [Piece(1, 9, 14)],
        [Piece(1, 14, None)],
    ]

    def numbers(missing, workers):
        runs = cut_runs(units, missing, [plain, packed], workers)
        return [[number for number, _ in run] for run in runs]

    assert numbers([0, 1, 2, 3, 4], 1) == [[0], [1, 2, 3, 4]]
    assert numbers([0, 1, 2, 3, 4], 2) == [[0], [1, 2, 3], [4]]
    assert numbers([0, 1, 2, 3, 4], 9) == [[0], [1], [2], [3], [4]]
    assert numbers([0, 2, 4], 1) == [[0], [2], [4]]  # what is done lies between


@pytest.mark.parametrize("form", FORMS)
def test_reading_from_any_document_on(form, corpus, tmp_path):
    """A place that a document names is where reading can begin."""
    FORMS[form](tmp_path, corpus[1])
    for file in find_inputs([str(tmp_path)])[:3]:
        whole = [(d.offset, "".join(d.texts())) for d in documents(file, Reading())]
        assert [offset for offset, _ in whole] == sorted({offset for offset, _ in whole})
        for first in range(0, len(whole), 11):
            rest = documents(file, Reading(), whole[first][0])
            assert [(d.offset, "".join(d.texts())) for d in rest] == whole[first:]


def good(count=1000):
    return [f"document number {i}" for i in range(count)]


def skipped(tmp_path, tokenizer):
    """[(where, why)] of what `in` in tmp_path loses."""
    prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer, say=quiet)
    return json.loads((tmp_path / "out" / "skipped.json").read_text())


def invalid_utf8():
    bad = pa.array([b"\xff\xfe", b"fine"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 2, bad.buffers())


def test_bad_rows_of_parquet_are_skipped_and_counted(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    column = pa.chunked_array([good(500), [None, "", " \n"], invalid_utf8(), good()[500:]])
    parquet(tmp_path / "in" / "x.parquet", column, 100)
    found = skipped(tmp_path, tokenizer)
    assert found == [
        ["in/x.parquet row 500", "null"],
        ["in/x.parquet row 501", "empty"],
        ["in/x.parquet row 502", "empty"],
        ["in/x.parquet row 503", "not UTF-8 (byte 0 of the value)"],
    ]
    assert load_manifest(tmp_path / "out").header["documents"] == 1001


def test_bad_samples_of_tars_are_skipped_and_counted(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    bad = [
        ("p0", {"jpg": b"\xff\xd8", "cls": b"3"}),
        ("p1", {"txt": b" \n"}),
        ("p2", {"txt": b"\xff"}),
        ("p3", {"json": b'{"title": "no text"}', "jpg": b""}),
        ("p4", {"json": b'{"text": null}'}),
        ("p5", {"jsonl": b'{"text": "fine"}\n{"text"\n'}),
    ]
    texts = [(f"g{i}", {"txt": t.encode()}) for i, t in enumerate(good())]
    (tmp_path / "in" / "x.tar").write_bytes(tar([*texts[:500], *bad, *texts[500:]]))
    found = skipped(tmp_path, tokenizer)
    assert [where for where, _ in found] == [
        "in/x.tar sample p0",
        "in/x.tar sample p1.txt",
        "in/x.tar sample p2.txt",
        "in/x.tar sample p3.json",
        "in/x.tar sample p4.json",
        "in/x.tar sample p5.jsonl line 2",
    ]
    wanted = ["no member .txt, .json, .jsonl", "empty", "not UTF-8", "no key 'text' among 'title'"]
    for (_, why), part in zip(found, [*wanted, "NoneType", "not JSON"], strict=True):
        assert part in why
    assert load_manifest(tmp_path / "out").header["documents"] == 1001


def test_on_bad_stop_names_the_row(tokenizer, tmp_path):
    parquet(tmp_path / "x.parquet", ["a", "b", None])
    with pytest.raises(DataError, match=r"x\.parquet row 2: null"):
        prepare([str(tmp_path / "x.parquet")], tmp_path / "out", tokenizer, Settings(on_bad="stop"))


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def broken_parquet(cut):
    buffer = io.BytesIO()
    text = [f"{i} " + "words of many kinds " * 50 for i in range(50)]
    pq.write_table(pa.table({"text": text}), buffer, write_page_checksum=True)
    return cut(buffer.getvalue())


TAR = tar_of_texts(good(40))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.parquet", broken_parquet(lambda d: d[:-20]), "broken or unreadable parquet"),
        ("x.parquet", broken_parquet(lambda d: d[: len(d) // 2]), "broken or unreadable parquet"),
        ("x.parquet", broken_parquet(lambda d: flipped(d, 300)), "broken or unreadable parquet"),
        ("x.parquet", b"", "broken or unreadable parquet"),
        ("x.tar", TAR[: len(TAR) // 2 + 100], "broken tar"),
        ("x.tar", TAR[: 512 * 10], "broken tar .*before its end mark"),
        ("x.tar", flipped(TAR, 512 * 20), "broken tar .*before its end mark"),
        ("x.tar", b"", "broken tar"),
        ("x.tar", b"no archive " * 100, "broken tar"),
        ("x.tar.gz", gzip.compress(TAR)[:-30], "broken .gz archive|broken tar"),
        ("x.tar.zst", zstandard.compress(TAR)[:-5], "broken .zst archive|broken tar"),
    ],
)
def test_broken_files_are_named(name, data, message, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"(?s)in.*{name}: .*({message})"):
        prepare([str(tmp_path / name)], tmp_path / "out", tokenizer, say=quiet)


def test_two_members_of_one_name(tokenizer, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for text in (b"one", b"two"):
            header = tarfile.TarInfo("a.txt")
            header.size = len(text)
            archive.addfile(header, io.BytesIO(text))
    with pytest.raises(DataError, match="duplicate file name"):
        prepare([str(tmp_path / "x.tar")], tmp_path / "out", tokenizer, say=quiet)


@pytest.mark.parametrize(
    ("column", "key", "message"),
    [
        (["a", "b"], "body", r"no column 'body'; it has id, text"),
        ([1, 2], "text", r"column 'text' holds int64"),
        ([[1], [2]], "text", r"column 'text' holds list<"),
        ([b"a", b"b"], "text", r"column 'text' holds binary"),
    ],
)
def test_columns_that_do_not_fit(column, key, message, tokenizer, tmp_path):
    parquet(tmp_path / "x.parquet", column)
    with pytest.raises(DataError, match=message) as told:
        prepare([str(tmp_path / "x.parquet")], tmp_path / "out", tokenizer, Settings(text_key=key))
    assert "--text-key" in told.value.remedy


def test_names_with_dots_and_plain_directories_in_tars(tokenizer, tmp_path):
    """As webdataset groups them: the key ends at the first dot of the name."""
    folder = tmp_path / "made"
    (folder / "a").mkdir(parents=True)
    for name, text in {"a/one.en.txt": "x", "a/one.de.txt": "y", "a/two.txt": "z"}.items():
        (folder / name).write_text(text)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(folder, ".")
    [file] = find_inputs([str(tmp_path / "x.tar")])
    found = {d.where: "".join(d.texts()) for d in documents(file, Reading())}
    assert len(found) == 3 and sorted(found.values()) == ["x", "y", "z"]
    shutil.rmtree(folder)
