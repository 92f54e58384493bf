"""Plain tars of texts, streamed: the rows, elastic and resumable within its bounds, its errors."""

import functools
import itertools
import json
import random
import shutil

import numpy as np
import pytest
import webdataset

from tests.data.faulty_server import serving
from tests.data.oracle import WORDS, assert_row, rows_of
from tests.prepared import TOKENIZER, small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import DataConfig, parse_config
from titans_pretrain.data.batch import batch_hash
from titans_pretrain.data.order import permute
from titans_pretrain.data.streaming import StreamedStream, open_batches
from titans_pretrain.errors import ConfigError, DataError, TitansError

LENGTH, ALIGN, GLOBAL, V, TARS = 64, 16, 24, 4, 11


def texts_of(number):
    draw = random.Random(number)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(1, 120))) for _ in range(draw.randint(2, 9))
    ]


def write_tar(path, texts):
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as tar:
        for n, text in enumerate(texts):
            member = {"txt": text} if n % 2 else {"json": {"text": text}}
            tar.write({"__key__": f"{n:04d}", **member})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    for number in range(TARS):
        write_tar(folder / f"part-{number:02d}.tar", texts_of(number))
    return folder


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def data_config(path, count=V, workers=0, **data):
    source = {"path": str(path), "stream": True, "tokenizer": str(TOKENIZER)}
    data.setdefault("cache", {"retries": 2, "timeout": 10, "backoff": 0.02})
    tree = {"sources": {"web": {**source, "virtual_workers": count}}, "workers": workers}
    return DataConfig.model_validate({**tree, "sequence_length": LENGTH, **data})


def always(rows, _step):
    return rows


def stream(path, rank=0, size=1, micro=1, rows=GLOBAL, align=ALIGN, **data):
    one = open_batches(
        data_config(path, **data),
        rows=functools.partial(always, rows),
        global_batch=GLOBAL,
        micro_batch=micro,
        align=align,
        dp_rank=rank,
        dp_size=size,
    )
    assert isinstance(one, StreamedStream)
    return one


def read(path, size=1, state=None, steps=8, **data):
    """(hash of the global batch, state to be saved) of each step."""
    ranks = [stream(path, rank, size, **data) for rank in range(size)]
    iterators = [s.batches(state or ranks[0].start()) for s in ranks]
    found = []
    for together in itertools.islice(zip(*iterators), steps):
        positions = [after["positions"] for _, after in together]
        whole = [
            s.complete(after, lambda _, p=positions: p) for s, (_, after) in zip(ranks, together)
        ]
        assert all(w == whole[0] for w in whole)
        digest = batch_hash(b for batches, _ in together for b in batches)
        found.append((digest, json.loads(json.dumps(whole[0]))))
    for iterator in iterators:
        iterator.close()
    return found


@pytest.fixture(scope="module")
def reference(folder):
    return read(folder)


def test_rows_are_those_of_plain_loops(folder, tokenizer):
    one = stream(folder)
    pad = tokenizer.pad
    wanted = []
    for v in range(V):
        tars = list(range(TARS))[v::V]
        rows = []
        for epoch in range(10):
            order = permute(np.arange(len(tars)), len(tars), f"{one.key}:{v}:{epoch}")
            for tar in order:
                documents = [d.tolist() for d in tokenizer.encode_documents(texts_of(tars[tar]))]
                rows += rows_of(documents, LENGTH, ALIGN, pad)
        wanted.append(rows)
    compared = 0
    for batches, _ in itertools.islice(one.batches(one.start()), 10):
        for b in batches:
            k, v = divmod(int(b.samples[0]), V)
            row = (b.tokens[0], b.labels[0], b.positions[0], b.loss_mask[0])
            assert_row(wanted[v][k], *row)
            compared += 1
    # Beyond the first epoch.
    assert compared == 10 * GLOBAL > V * max(len(rows) for rows in wanted) / 10


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_divide_the_virtual_workers_agree(folder, reference, size):
    assert read(folder, size) == reference


def test_loader_processes_agree(folder, reference):
    assert read(folder, 1, workers=3, steps=4) == reference[:4]
    assert read(folder, 2, reference[1][1], workers=2, steps=2) == reference[2:4]


def test_resuming_at_each_step_at_another_size(folder, reference):
    state = stream(folder).start()
    for wanted, size in zip(reference, (4, 2, 1, 2, 4, 1, 2, 4)):
        [found] = read(folder, size, state, steps=1)
        assert found == wanted
        state = found[1]


def test_rows_of_a_ramp(folder, reference):
    """Smaller steps at first: the same samples in the same order."""
    small = stream(folder, rows=4, micro=4)
    parts = [batches[0] for batches, _ in itertools.islice(small.batches(small.start()), 6)]
    assert batch_hash(parts) == reference[0][0]


def test_what_must_not_change(folder, tmp_path, reference):
    saved = reference[2][1]
    assert stream(folder).load_state(saved) == (saved, [])
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "part-99.tar").write_bytes((folder / "part-00.tar").read_bytes())
    cases = {
        "streamed": stream(other),
        "virtual_workers": stream(folder, count=2),
        "seed": stream(folder, seed=3),
        "align": stream(folder, align=32),
    }
    for key, changed in cases.items():
        with pytest.raises(DataError, match=f"{key}: was .*, is "):
            changed.load_state(saved)
    state, changes = stream(folder, count=2, allow_changed=True).load_state(saved)
    assert state["positions"] == [[0, 0, 0, 0]] * 2 and state["next_sample"] == 3 * GLOBAL
    assert "virtual_workers: was 4, is 2" in changes


def test_counts_that_do_not_fit(folder):
    with pytest.raises(ConfigError, match="virtual_workers=4, data-parallel ranks=3") as told:
        stream(folder, size=3)
    assert "virtual_workers=6" in told.value.remedy
    with pytest.raises(ConfigError, match="11 tars, virtual_workers=12") as told:
        stream(folder, count=12, size=2)
    assert told.value.remedy == "set virtual_workers=10"
    with pytest.raises(ConfigError, match="global_batch=24"):
        stream(folder, micro=5)


def test_configs_that_do_not_fit(folder, tmp_path):
    source = {"path": str(folder), "stream": True, "tokenizer": str(TOKENIZER)}
    tree = small_run(tmp_path, folder, validation__every=0)
    parse_config({**tree, "data": {**tree["data"], "sources": {"a": source}}}, "test")
    for change, message in [
        ({"sources": {"a": source, "b": {"path": "b"}}}, "cannot be mixed"),
        ({"sources": {"a": {**source, "tokenizer": None}}}, "tokenized as they come"),
        ({"sources": {"a": {**source, "stream": False}}}, "no stream: true"),
        ({"sources": {"a": source}, "on_bad": "quarantine"}, "only prepared sources"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse_config({**tree, "data": {**tree["data"], **change}}, "test")
    tree = small_run(tmp_path, folder, data__sources={"a": source})
    with pytest.raises(ConfigError, match="no validation split"):
        parse_config(tree, "test")


def member_starts(path):
    import tarfile

    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def broken(path, how):
    content = path.read_bytes()
    second = member_starts(path)[1]
    if how == "cut between members":
        path.write_bytes(content[:second])
    elif how == "cut inside a member":
        path.write_bytes(content[: second + 515])
    elif how == "damaged header":
        path.write_bytes(content[: second + 3] + b"\xff" + content[second + 4 :])
    elif how == "no tar":
        path.write_bytes(b"text " * 1000)
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "no text":
        with path.open("wb") as file, webdataset.TarWriter(file) as tar:
            tar.write({"__key__": "a", "jpg": b"x"})
    elif how == "no member":
        with path.open("wb") as file, webdataset.TarWriter(file):
            pass
    elif how == "not UTF-8":
        with path.open("wb") as file, webdataset.TarWriter(file) as tar:
            tar.write({"__key__": "a", "txt": b"\xff\xff"})
    return second


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("cut between members", "broken tar: it ends at byte {second}, before its end mark"),
        ("cut inside a member", "broken tar: it ends at byte "),
        ("damaged header", "broken tar: at byte {second} there is no header"),
        ("no tar", "broken tar: at byte 0 there is no header"),
        ("empty file", "broken tar: it ends at byte 0"),
        ("missing", "No such file"),
        ("no text", r"no member \.txt, \.json, \.jsonl"),
        ("no member", r"no sample with a member \.txt, \.json, \.jsonl"),
        ("not UTF-8", r"sample a\.txt: not UTF-8"),
    ],
)
def test_what_is_broken_stops(folder, tmp_path, how, word):
    copy = shutil.copytree(folder, tmp_path / "copy")
    second = broken(copy / "part-05.tar", how)
    one = stream(copy)
    if how == "missing":  # after the run has begun
        shutil.copy(folder / "part-05.tar", copy)
        one = stream(copy)
        (copy / "part-05.tar").unlink()
    with pytest.raises(DataError, match=word.format(second=second)) as told:
        list(itertools.islice(one.batches(one.start()), 20))
    assert "part-05.tar" in told.value.value and told.value.exit_code == 3
    assert str(told.value).startswith(told.value.value)


def test_an_error_of_a_loader_process_arrives(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    broken(copy / "part-05.tar", "damaged header")
    one = stream(copy, workers=1)
    with pytest.raises(DataError, match=r"part-05\.tar: broken tar"):
        list(itertools.islice(one.batches(one.start()), 20))


def test_blank_documents_are_none(folder, tmp_path, reference):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for number in range(TARS):
        texts = [part for text in texts_of(number) for part in (text, " ", "\n")]
        write_tar(copy / f"part-{number:02d}.tar", texts)
    assert [d for d, _ in read(copy)] == [d for d, _ in reference]
    state = read(copy)[3][1]
    assert [d for d, _ in read(copy, 2, state, steps=4)] == [d for d, _ in reference[4:]]
    for number in range(TARS):
        write_tar(copy / f"part-{number:02d}.tar", [" ", ""])
    with pytest.raises(DataError, match="blank documents only"):
        read(copy)


def test_paths_without_tars(tmp_path):
    with pytest.raises(DataError, match=r"no \.tar in it"):
        stream(tmp_path)
    with pytest.raises(DataError, match="named twice"):
        stream(f"{tmp_path}/a.tar::{tmp_path}/a.tar")
    with pytest.raises(DataError, match=r"\{0\.\.3"):
        stream(f"{tmp_path}/part-{{0..3.tar")


def test_urls_with_braces_and_faults(folder):
    with serving(folder) as (faulty, url):
        path = f"{url}/part-{{00..10}}.tar"
        faulty.faults = {
            "part-02.tar": ["cut 3000"],
            "part-03.tar": ["503", "503"],
            "part-06.tar": ["cut 0"],
        }
        found = read(path, 2)
        assert (f"part-{2:02d}.tar", 3000) in faulty.requests
        assert read(path) == found
        faulty.always("part-04.tar", "cut 2000")
        with pytest.raises(DataError, match=r"part-04\.tar: at byte 2000: .*transfer closed"):
            read(path)
        faulty.always("part-04.tar", "404")
        with pytest.raises(DataError, match=r"part-04\.tar: at byte 0: .*404"):
            read(path)


def test_a_pipe_that_breaks_is_read_again_up_to_there(folder, tmp_path, monkeypatch):
    """It cannot go on in the middle; no byte is lost or comes twice."""
    command = tmp_path / "command"
    command.write_text(
        f"""#!/bin/sh
        name=${{1##*/}}
        if [ -e "{tmp_path}/$name" ]; then exec cat "{folder}/$name"; fi
        touch "{tmp_path}/$name"
        head -c 5000 "{folder}/$name"
        exit 7
        """
    )
    command.chmod(0o755)
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://bucket=pipe:{command} x")
    broken_once = read("s3://bucket/part-{00..10}.tar")
    assert len(list(tmp_path.glob("*.tar"))) == TARS
    assert read("s3://bucket/part-{00..10}.tar") == broken_once
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://bucket=pipe:cat {folder}")
    assert read("s3://bucket/part-{00..10}.tar") == broken_once


def trained(tree, stop_after=None):
    """The run's exit code, or its error."""
    from titans_pretrain.train import run_training

    try:
        return run_training(parse_config(tree, "test"), stop_after=stop_after)
    except TitansError as e:
        return str(e)


def test_a_run_that_streams(folder, tmp_path):
    """Trained in one go and in two parts: the same losses, to the last bit; validated on a
    prepared set."""
    prepared = small_dataset(tmp_path)

    def tree(name, **changes):
        source = {"path": str(folder), "stream": True, "tokenizer": str(TOKENIZER)}
        return small_run(
            tmp_path / name,
            prepared,
            data__sources={"web": {**source, "virtual_workers": V}},
            data__validation={"books": {"path": str(prepared)}},
            validation__every=3,
            train__steps=6,
            **changes,
        )

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["values"]["train/loss"] for line in lines]

    assert run_world(trained, 1, tree("whole")) == [0]
    assert run_world(trained, 1, tree("parts"), 3) == [75]
    assert run_world(trained, 1, tree("parts")) == [0]
    assert losses("whole") == losses("parts") and len(losses("whole")) == 6
    changed = tree("parts", train__micro_batch=4)
    changed["data"]["sources"]["web"]["virtual_workers"] = 2
    [told] = run_world(trained, 1, changed)
    assert "virtual_workers: was 4, is 2" in told
