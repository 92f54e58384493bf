import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tests.data.conftest import quiet
from tests.data.oracle import (
    assert_row,
    data_config,
    documents_of,
    read_together,
    rows_of,
    write_corpus,
)
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.stream import TrainStream, batch_hash, concatenate
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.errors import ConfigError, DataError, NodeError

GLOBAL, STEPS = 24, 4


def stream(folder, rank=0, size=1, micro=1, align=16, **data):
    return TrainStream(
        data_config(folder, **data),
        global_batch=GLOBAL,
        micro_batch=micro,
        align=align,
        dp_rank=rank,
        dp_size=size,
    )


def hashes(folder, size, state=None, steps=STEPS, **data):
    """The global batches' hashes over all ranks, and the states the ranks agree on."""
    ranks = [stream(folder, rank, size, **data) for rank in range(size)]
    return read_together(ranks, state or ranks[0].start(), steps)


@pytest.fixture(scope="module")
def reference(prepared):
    return hashes(prepared, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_any_number_of_ranks_reads_the_same(prepared, reference, size):
    assert hashes(prepared, size) == reference


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_reads_the_same(prepared, reference, workers):
    assert hashes(prepared, 1, workers=workers) == reference


def test_two_ranks_with_workers(prepared, reference):
    assert hashes(prepared, 2, workers=1, steps=2) == reference[:2]


def test_resuming_at_each_step_and_at_another_size(prepared, reference):
    """4 -> 2 -> 8 -> 3 ranks: the state passed on is a few plain numbers."""
    state = stream(prepared).start()
    for (digest, after), size in zip(reference, (4, 2, 8, 3)):
        state = json.loads(json.dumps(state))
        [(found, state)] = hashes(prepared, size, state, steps=1)
        assert (found, state) == (digest, after)


@pytest.mark.parametrize("sample", [0, 1, 7, 100, 1234])
def test_resuming_at_any_sample(prepared, sample):
    """The batch at a sample holds what reading on from the start would bring there."""
    one = TrainStream(data_config(prepared), global_batch=1, micro_batch=1, align=16)
    begin = {**one.start(), "next_sample": max(0, sample - 3)}
    later = list(itertools.islice(one.batches(begin), 4 if sample >= 3 else sample + 1))[-1]
    direct = next(one.batches({**one.start(), "next_sample": sample}))
    assert batch_hash(later[0]) == batch_hash(direct[0])
    assert int(direct[0][0].samples[0]) == sample


def test_the_hash_sees_every_field_and_ignores_the_split(prepared):
    [whole] = next(iter(stream(prepared, micro=24).batches(stream(prepared).start())))[0]
    parts = next(iter(stream(prepared, micro=1).batches(stream(prepared).start())))[0]
    assert batch_hash([whole]) == batch_hash(reversed(parts)) == batch_hash([concatenate(parts)])
    changed = {
        "tokens": whole.tokens + 1,
        "labels": whole.labels + 1,
        "positions": whole.positions.clamp(min=1),
        "loss_mask": ~whole.loss_mask,
        "samples": whole.samples + 1,
    }
    for name, value in changed.items():
        fields = {**whole.__dict__, name: value}
        assert batch_hash([type(whole)(**fields)]) != batch_hash([whole]), name


@pytest.mark.parametrize(
    ("length", "align"), [(64, 1), (64, 16), (64, 64), (24, 8), (4096, 32), (1024, 1024), (8, 1)]
)
def test_rows_are_those_of_plain_loops(prepared, length, align):
    """Every block of an epoch, token by token: cut documents, labels past the row's end, pads."""
    manifest = load_manifest(prepared)
    pad = manifest.pad
    rows = [
        row
        for shard in manifest.splits["train"].shards
        for row in rows_of(documents_of(prepared, shard.file), length, align, pad)
    ]
    one = TrainStream(
        data_config(prepared, sequence_length=length), global_batch=1, micro_batch=1, align=align
    )
    assert one.epoch_rows["corpus"] == len(rows)
    opened = one._samples.opened()
    [reader], [order] = opened.readers, opened.orders
    address = order.locate(range(len(rows)))
    first_row = [int(reader.blocks[:s].sum()) for s in range(len(reader.blocks))]
    seen = set()
    for ([batch], _), shard, block in zip(one.batches(one.start()), address.shard, address.block):
        number = first_row[shard] + int(block)
        seen.add(number)
        assert_row(
            rows[number],
            batch.tokens[0],
            batch.labels[0],
            batch.positions[0],
            batch.loss_mask[0],
        )
        starts = (batch.positions[0] == 0).nonzero().flatten()
        assert (starts % align == 0).all()
    assert seen == set(range(len(rows)))


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 5), (2, 3), (3, 1), (8, 2)])
@pytest.mark.parametrize("rows", [0, 5])
def test_validation_is_the_same_for_any_layout(prepared, size, micro, rows):
    def read(size, micro):
        return [
            list(
                validation_batches(
                    load_manifest(prepared),
                    data_config(prepared),
                    micro_batch=micro,
                    align=16,
                    rows=rows,
                    dp_rank=rank,
                    dp_size=size,
                )
            )
            for rank in range(size)
        ]

    plain, ranks = read(1, 1)[0], read(size, micro)
    assert len({len(batches) for batches in ranks}) == 1  # no rank ends early
    everything = [b for batches in ranks for b in batches]
    assert batch_hash(everything) == batch_hash(plain)
    assert {len(b.samples) for b in everything} == {micro}
    for b in everything:
        empty = b.samples < 0
        assert not b.loss_mask[empty].any() and (b.positions[empty] == -1).all()
    if rows == 0:
        split = load_manifest(prepared).splits["validation"]
        counted = sum(int(b.loss_mask.sum()) for b in everything)
        assert counted == split.tokens - split.documents  # every label of every document
    else:
        assert sum(int((b.samples >= 0).sum()) for b in everything) == rows


def test_skips_leave_samples_out(prepared):
    s = stream(prepared, micro=24)
    state = s.skip(s.start(), 10, 40)
    (first, state), (second, _) = itertools.islice(s.batches(state), 2)
    assert first[0].samples.tolist() == [*range(10), *range(40, 54)]
    assert second[0].samples.tolist() == list(range(54, 78))
    assert state["next_sample"] == 54 and state["skips"] == [[10, 40]]


def test_changed_data_is_refused_unless_allowed(prepared, tokenizer, tmp_path):
    saved = {**stream(prepared).start(), "next_sample": 48}
    write_corpus(tmp_path / "other.jsonl", 80, seed=1)
    other = tmp_path / "other"
    prepare([str(tmp_path / "other.jsonl")], other, tokenizer, Settings(), say=quiet)
    cases = {
        "manifest": stream(other),
        "seq_len": stream(prepared, sequence_length=128),
        "align": stream(prepared, align=32),
        "seed": stream(prepared, seed=7),
    }
    for key, changed in cases.items():
        with pytest.raises(DataError, match=f"{key}: was .*, is ") as told:
            changed.load_state(saved)
        assert "allow_changed" in str(told.value)
    with pytest.raises(DataError, match="tokenizer: was "):
        stream(prepared).load_state({**saved, "tokenizer": "another"})
    state, changes = stream(prepared, sequence_length=128, allow_changed=True).load_state(saved)
    assert changes == ["seq_len: was 64, is 128"]
    assert state["next_sample"] == 48 and state["seq_len"] == 128
    assert stream(prepared).load_state(saved) == (saved, [])
    with pytest.raises(DataError, match="version 99"):
        stream(prepared).load_state({**saved, "version": 99})


def test_global_batch_that_ranks_cannot_share_is_refused(prepared):
    with pytest.raises(ConfigError, match="global_batch=24"):
        stream(prepared, size=5)
    with pytest.raises(ConfigError, match="micro_batch=16"):
        stream(prepared, micro=16)


def test_workers_leave_the_global_generator_alone(prepared):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = stream(prepared, workers=1).batches(stream(prepared).start())
    next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_iterator(prepared):
    before = set(multiprocessing.active_children())
    batches = stream(prepared, workers=2).batches(stream(prepared).start())
    next(batches)
    mine = set(multiprocessing.active_children()) - before
    assert len(mine) == 2
    batches.close()
    for process in mine:
        process.join(10)
        assert not process.is_alive()


def test_killed_worker_is_a_node_error(prepared):
    before = set(multiprocessing.active_children())
    batches = stream(prepared, workers=1).batches(stream(prepared).start())
    next(batches)
    [worker] = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(NodeError, match="data worker"):
        for _ in range(50):
            next(batches)


SIGNALLED = """
import itertools, signal, subprocess, sys, time
import psutil
from tests.data.test_stream import stream
batches = stream(sys.argv[1], workers=2).batches(stream(sys.argv[1]).start())
first = next(batches)
started = psutil.Process().children(recursive=True)
assert len(started) >= 3, started  # two workers, and the process that they are forked from
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    # From a third process, as a terminal or a scheduler does: the rank's own SIGTERM ends a loader.
    subprocess.run(["kill", f"-{int(number)}", *(str(p.pid) for p in started)], check=True)
time.sleep(0.5)
for _ in itertools.islice(batches, 20):
    pass
assert all(p.is_running() for p in started), started
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "our own signals still arrive"
batches.close()
"""


def test_workers_outlive_the_signals_that_ask_the_run_to_stop(prepared):
    """A process of its own: workers of an earlier stream would have been started otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(prepared)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_with_another_tokenizer_is_refused(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    load_manifest(folder).require_tokenizer()
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"tokenizer\.model: sha256 \w+\.\.\., manifest sha256"):
        load_manifest(folder).require_tokenizer()
    model.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model: No such file"):
        load_manifest(folder).require_tokenizer()
