"""The stream over several sources, on small folders of random tokens."""

import itertools
import json

import numpy as np
import pytest
import torch

from tests.data.made import data, made
from tests.data.oracle import read_together
from titans_pretrain.data.order import Order
from titans_pretrain.data.stream import TrainStream, batch_hash
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.errors import DataError

GLOBAL, STEPS = 24, 4
# A ramp over the first steps, a constant and one that starts late.
WEIGHTS = {"a": [[0, 0.0], [3000, 3.0]], "b": 1.0, "late": [[1500, 0.0], [1501, 0.5]]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three sources, told apart by their ids; `b` is small: many epochs."""
    root = tmp_path_factory.mktemp("made")
    made(root / "a", 20_000, seed=0, low=4, high=70)
    made(root / "b", 2_000, seed=1, low=70, high=130)
    made(root / "late", 9_000, seed=2, low=130, high=200)
    return {name: root / name for name in ("a", "b", "late")}


def stream(folders, rank=0, size=1, weights=WEIGHTS, align=16, rows=None, total=GLOBAL, **more):
    sources = {name: (folder, weights[name]) for name, folder in folders.items()}
    return TrainStream(
        data(sources, **more),
        global_batch=total,
        micro_batch=1,
        align=align,
        dp_rank=rank,
        dp_size=size,
        rows=rows,
    )


def at(one, sample):
    return {**one.start(), "next_sample": sample}


def hashes(folders, size, state=None, steps=STEPS, **more):
    """The global batches' hashes over all ranks, and the states the ranks agree on."""
    ranks = [stream(folders, rank, size, **more) for rank in range(size)]
    # The late source begins in these steps.
    return read_together(ranks, state or at(ranks[0], 1480), steps)


@pytest.fixture(scope="module")
def reference(folders):
    return hashes(folders, 1)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_any_number_of_ranks_reads_the_same(folders, reference, size):
    assert hashes(folders, size) == reference


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_growing_batch_on_any_number_of_ranks(folders, size):
    def read(size):
        ranks = [
            stream(folders, rank, size, rows=lambda step: GLOBAL * (1 + (step > 2)), total=48)
            for rank in range(size)
        ]
        together = zip(*(s.batches(at(s, 1480)) for s in ranks))
        for step in itertools.islice(together, STEPS):
            yield batch_hash(b for batches, _ in step for b in batches), step[0][1]["next_sample"]

    found = list(read(size))
    assert [after - 1480 for _, after in found] == [24, 48, 96, 144]
    assert found == list(read(1))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_reads_the_same(folders, reference, workers):
    assert hashes(folders, 1, workers=workers) == reference


def test_resuming_at_each_step_and_at_another_size(folders, reference):
    state = at(stream(folders), 1480)
    for (digest, after), size in zip(reference, (4, 2, 8, 3)):
        state = json.loads(json.dumps(state))
        [(found, state)] = hashes(folders, size, state, steps=1)
        assert (found, state) == (digest, after)


def test_the_order_of_names_in_the_config_means_nothing(folders, reference):
    assert hashes(dict(reversed(folders.items())), 1) == reference


def test_rows_come_from_the_source_they_name_each_block_once_an_epoch(folders):
    """Ids tell the sources apart; blocks are those that the source alone would bring."""
    one = stream(folders)
    names = list(folders)
    alone = {}
    for name, folder in folders.items():
        only = TrainStream(data({"x": folder}), global_batch=1, micro_batch=1, align=16)
        alone[name] = only.batches(only.start())
    rows = {name: [] for name in names}
    source, index = one._samples.opened().mix.locate(np.arange(STEPS * 720))
    for step, (batches, _) in enumerate(itertools.islice(one.batches(one.start()), STEPS * 30)):
        for row, batch in enumerate(batches):
            sample = step * GLOBAL + row
            assert batch.samples.tolist() == [sample]
            assert batch.source.tolist() == [source[sample]]
            name = names[source[sample]]
            real = batch.tokens[batch.positions >= 0]
            low, high = {"a": (4, 70), "b": (70, 130), "late": (130, 200)}[name]
            assert low <= real.min() and real.max() < high
            rows[name].append((index[sample], batch.tokens))
    for name in names:
        expected = [next(alone[name])[0][0].tokens for _ in rows[name]]
        found = dict(rows[name])
        read = [i for i in range(len(expected)) if i in found]
        assert len(read) > 0.9 * len(expected) > 50  # the last frame is not read to its end
        assert all(torch.equal(found[i], expected[i]) for i in read)
    assert len(rows["b"]) > 10 * one.epoch_rows["b"]  # epochs of its own


@pytest.mark.parametrize("sample", [1, 1023, 1024, 2500, 10**9])
def test_resuming_at_any_sample(folders, sample):
    one = TrainStream(
        data({n: (f, WEIGHTS[n]) for n, f in folders.items()}),
        global_batch=1,
        micro_batch=1,
        align=16,
    )
    first = max(0, sample - 3)
    *_, later = itertools.islice(one.batches(at(one, first)), sample - first + 1)
    direct = next(one.batches(at(one, sample)))
    assert batch_hash(later[0]) == batch_hash(direct[0])
    assert int(direct[0][0].samples[0]) == sample


def test_progress_counts_what_was_read(folders):
    one = stream(folders)
    counts, state = np.zeros(3, int), one.start()
    for batches, after in itertools.islice(one.batches(state), 100):
        state = after
        counts += np.bincount([int(b.source[0]) for b in batches], minlength=3)
    found = one.progress(state)
    for name, count in zip(folders, counts.tolist()):
        assert found[f"data_samples/{name}"] == count
        assert found[f"data_epochs/{name}"] == count / one.epoch_rows[name]
        assert found[f"data_share/{name}"] == count / 2400
    assert found["data_share_asked/late"] == pytest.approx(0.5 / (1.5 + 3 * 2560 / 3000), rel=1e-3)
    assert one.progress(one.start())["data_share/a"] == 0.0


def test_changed_sources_are_refused_unless_allowed(folders, tmp_path):
    one = stream(folders)
    saved = at(one, 48)
    assert one.load_state(saved) == (saved, [])
    made(tmp_path / "b", 2_000, seed=9)
    renamed = {"a": folders["a"], "c": folders["b"], "late": folders["late"]}
    fewer = {"a": folders["a"], "b": folders["b"]}
    cases = {
        "sources.b.manifest: was": stream({**folders, "b": tmp_path / "b"}),
        "sources.b.weight: was .*1.0.*, is .*2.0": stream(folders, weights={**WEIGHTS, "b": 2.0}),
        "sources.late.weight: was": stream(folders, weights={**WEIGHTS, "late": [[1500, 0.5]]}),
        "sources.c.manifest: was absent": stream(renamed, weights={**WEIGHTS, "c": 1.0}),
        "sources.late.weight: was .*, is absent": stream(fewer),
        "seed: was 0, is 7": stream(folders, seed=7),
        "manifest: was absent": stream({"a": folders["a"]}, weights={"a": 1.0}),
    }
    for told, changed in cases.items():
        with pytest.raises(DataError, match=told) as error:
            changed.load_state(saved)
        assert "allow_changed" in str(error.value)
    state, changes = stream(fewer, allow_changed=True).load_state(saved)
    assert state["next_sample"] == 48 and list(state["sources"]) == ["a", "b"]
    assert len(changes) == 2


def test_weights_changed_from_now_on_leave_the_past_as_it_was(folders):
    """What the config says about samples already read is the same: so is what comes next."""
    before = {"a": 1.0, "b": 1.0, "late": 0.0}
    after = {"a": [[5000, 1.0], [9000, 3.0]], "b": 1.0, "late": [[4999, 0.0], [5000, 1.0]]}
    old, new = (stream(folders, weights=w, allow_changed=True) for w in (before, after))
    state, changes = new.load_state(at(old, 4000))
    assert len(changes) == 2
    a, b = next(old.batches(at(old, 4000))), next(new.batches(state))
    assert batch_hash(a[0]) == batch_hash(b[0])


def test_one_source_reads_what_it_always_did(tmp_path):
    """Hashes and state taken before there were mixes."""
    manifest = made(tmp_path / "x", 20_000)
    assert manifest.hash == "d6932cd5413ad14bd040b6191ea73a448dc75997cb9946f230ba279fda1f4e32"
    one = TrainStream(data({"a": tmp_path / "x"}, seed=5), global_batch=24, micro_batch=4, align=16)
    assert one.start() == {
        "version": 1,
        "manifest": manifest.hash,
        "tokenizer": "made",
        "seed": 5,
        "seq_len": 64,
        "align": 16,
        "next_sample": 0,
        "skips": [],
        "quarantine": [],
    }
    found = [batch_hash(next(one.batches(at(one, n)))[0])[:16] for n in (0, 480, 10**6)]
    assert found == ["2b2ac403807f3961", "51dbed41ea54a213", "236a280d6b960c25"]
    rows = validation_batches(
        manifest, data({"a": tmp_path / "x"}), micro_batch=4, align=16, rows=5
    )
    assert batch_hash(rows)[:16] == "3c31b79abb7da0a3"
    address = Order(one._samples.opened().orders[0].blocks, f"{manifest.hash}:5").locate([0, 999])
    *_, shard, block = one._samples.opened().locate(np.array([0, 999]))
    assert (shard.tolist(), block.tolist()) == (address.shard.tolist(), address.block.tolist())


def test_sources_that_do_not_belong_together(folders, tmp_path):
    made(tmp_path / "other", 2_000, tokenizer="of another kind")
    with pytest.raises(DataError) as told:
        stream({**folders, "b": tmp_path / "other"})
    text = str(told.value)
    assert f"data.sources.a ({folders['a']}): tokenizer sha256 made" in text
    assert f"data.sources.b ({tmp_path / 'other'}): sha256 of another kind" in text
    assert "titans-pretrain prepare" in text

    made(tmp_path / "twin", 2_000, seed=1, low=70, high=130)
    with pytest.raises(DataError, match="hold the same tokens"):
        stream({**folders, "late": tmp_path / "twin"})

    made(tmp_path / "empty", 0)
    with pytest.raises(DataError, match=r"empty: the train split is empty"):
        stream({**folders, "b": tmp_path / "empty"})
    with pytest.raises(DataError, match=r"nowhere/manifest\.json"):
        stream({**folders, "b": tmp_path / "nowhere"})
