"""Members that stay bad: left out by every layout in the same way, recorded, and few."""

import itertools
import json
import shutil

import numpy as np
import pytest

from tests.data.conftest import quiet
from tests.data.faulty_server import serving
from tests.data.oracle import data_config, write_corpus
from tests.prepared import small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.batch import batch_hash
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.order import NEAR, Order
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.errors import DataError
from titans_pretrain.feed import fetch, open_stream
from titans_pretrain.parallel.world import start_world

GLOBAL, STEPS = 24, 30
MISSING, CUT, FLIPPED = 3, 5, 7  # shards


@pytest.fixture(scope="module")
def clean(tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("quarantine")
    write_corpus(base / "docs.jsonl", 150)
    settings = Settings(unit_bytes=30_000, member_tokens=400, shard_tokens=1_500)
    prepare([str(base / "docs.jsonl")], base / "data", tokenizer, settings, say=quiet)
    return base / "data"


def spoil(folder):
    """A shard missing, one cut in the middle, a bit flipped in a third. Returns the members that
    are bad: {(file, member or None)}."""
    split = load_manifest(folder).splits["train"]
    members = [range(*split.first_member[n : n + 2]) for n in range(len(split.shards))]
    files = [shard.file for shard in split.shards]
    (folder / files[MISSING]).unlink()
    cut = members[CUT][len(members[CUT]) // 2]
    with (folder / files[CUT]).open("r+b") as f:
        f.truncate(int(split.members[cut]["tok"]) + 7)
    flipped = members[FLIPPED][-1]
    with (folder / files[FLIPPED]).open("r+b") as f:
        f.seek(int(split.members[flipped]["tok"]) + 100)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))
    lost = {(files[CUT], m) for m in members[CUT] if m >= cut}
    return {(files[MISSING], None), (files[FLIPPED], flipped)} | lost


@pytest.fixture
def spoiled(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "spoiled")
    return folder, spoil(folder)


def stream(folder, rank=0, size=1, **data):
    told = {"on_bad": "quarantine", "max_bad": 0.5, **data}
    config = data_config(folder, **told)
    return TrainStream(
        config, global_batch=GLOBAL, micro_batch=1, align=16, dp_rank=rank, dp_size=size
    )


def read(folder, size=1, state=None, steps=STEPS, **data):
    """(hash of the global batch, state that the ranks agree on) of each step."""
    ranks = [stream(folder, rank, size, **data) for rank in range(size)]
    state = state or ranks[0].start()
    iterators = [s.batches(state) for s in ranks]
    found = []
    for together in itertools.islice(zip(*iterators), steps):
        told = [after["quarantine"] for _, after in together]
        state = ranks[0].agreed(state, together[0][1], told)
        state = json.loads(json.dumps(state))
        found.append((batch_hash(b for batches, _ in together for b in batches), state))
    for iterator in iterators:
        iterator.close()
    return found


def named(state):
    return {(entry["shard"], entry["member"]) for entry in state["quarantine"]}


def rows(folder, steps=STEPS, **data):
    """Sample number -> the bytes of its row."""
    one, found = stream(folder, **data), {}
    for batches, _ in itertools.islice(one.batches(one.start()), steps):
        for b in batches:
            parts = (b.tokens, b.labels, b.positions, b.loss_mask)
            found[int(b.samples[0])] = b"".join(p[0].numpy().tobytes() for p in parts)
    return found


def test_rows_on_bad_members_are_others_of_the_source_and_the_rest_is_as_it_was(clean, spoiled):
    folder, bad = spoiled
    steps = -(-next(iter(stream(clean).epoch_rows.values())) // GLOBAL)
    before, after = rows(clean, steps, on_bad="stop"), rows(folder, steps)
    assert before.keys() == after.keys()
    one = stream(clean)
    reader = one._samples.opened().readers[0]
    _, shard, block = one._samples.opened().locate(np.array(sorted(before)))
    files = [s.file for s in reader.split.shards]
    whole = {content: sample for sample, content in before.items()}
    replaced = 0
    for sample, s, b in zip(sorted(before), shard, block):
        begin, end = reader._range(s, b)
        touched = range(
            *np.searchsorted(reader._ends, [begin, end - 1], side="right") + np.array([0, 1])
        )
        hit = {(files[s], m) for m in touched} & bad or (files[s], None) in bad
        assert (after[sample] != before[sample]) == bool(hit), sample
        if hit:
            replaced += 1
            other = whole[after[sample]]  # a row of the source, itself read whole
            assert after[other] == before[other]
    assert replaced > 20
    assert rows(folder, steps) == after


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_layout_agrees(spoiled, size):
    folder, bad = spoiled
    reference = read(folder)
    assert read(folder, size) == reference
    assert named(reference[-1][1]) == bad
    firsts = [entry["sample"] for entry in reference[-1][1]["quarantine"]]
    assert min(firsts) < 2 * GLOBAL < 10 * GLOBAL < max(firsts)
    # The list grows with the samples that met them.
    for step, (_, state) in enumerate(reference):
        assert all(entry["sample"] < GLOBAL * (step + 1) for entry in state["quarantine"])


def test_workers_agree(spoiled):
    folder, _ = spoiled
    assert read(folder, workers=2) == read(folder)


def test_a_resumed_run_goes_on_alike_even_after_a_repair(clean, spoiled):
    folder, _ = spoiled
    reference = read(folder)
    digest, state = reference[5]
    assert read(folder, 2, state, steps=STEPS - 6) == reference[6:]
    shutil.rmtree(folder)
    shutil.copytree(clean, folder)
    known = read(folder, 3, reference[-1][1], steps=4)
    shutil.rmtree(folder)
    shutil.copytree(clean, folder)
    spoil(folder)
    assert known == read(folder, 1, reference[-1][1], steps=4)
    assert digest == reference[5][0]


def test_stop_is_the_default(spoiled):
    folder, _ = spoiled
    with pytest.raises(DataError, match=r"No such file|ends at|checksum"):
        read(folder, on_bad="stop")
    assert data_config(folder).on_bad == "stop"


def test_too_much_stops(spoiled):
    folder, bad = spoiled
    members = len(load_manifest(folder).splits["train"].members)
    with pytest.raises(DataError, match=rf"\d+ of {members} members cannot be used") as told:
        read(folder, max_bad=0.01)
    assert "data.max_bad" in told.value.rule and "train-" in told.value.value
    assert stream(folder).progress(read(folder)[-1][1])["data/quarantined"] == count(folder, bad)


def count(folder, bad):
    split = load_manifest(folder).splits["train"]
    missing = np.diff(split.first_member[MISSING : MISSING + 2])[0]
    return missing + sum(member is not None for _, member in bad)


def test_ids_beyond_the_vocabulary_condemn_their_member_whatever_is_read_first(clean):
    """The bad id lies in some rows of the member only; all of its rows are replaced."""
    split = load_manifest(clean).splits["train"]
    largest = {}
    for m, row in enumerate(split.members):
        raw = (clean / split.shards[row["shard"]].file).read_bytes()
        largest[m] = np.frombuffer(raw, "<u2", int(row["tokens"]), int(row["tok"])).max()
    vocab = int(sorted(largest.values())[-3])
    bad = {m for m, top in largest.items() if top >= vocab}
    assert 0 < len(bad) < len(largest) / 2

    def one(begin, steps):
        s = stream(clean)
        s._samples.recipe = (*s._samples.recipe[:3], vocab)
        s._samples._open = None
        read = list(itertools.islice(s.batches({**s.start(), "next_sample": begin}), steps))
        met = {entry["member"] for entry in read[-1][1]["quarantine"]}
        return [batch_hash(batches) for batches, _ in read], met

    forward, met = one(0, 30)
    assert met == bad
    assert [one(GLOBAL * step, 1)[0][0] for step in reversed(range(30))] == forward[::-1]


def test_damage_behind_a_url_is_as_damage_at_hand(clean, spoiled, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder, bad = spoiled
    reference = read(folder)
    cache = {"folder": str(tmp_path / "cache"), "retries": 1, "timeout": 10, "backoff": 0.01}
    with serving(folder) as (faulty, url):
        found = read(url, workers=2, cache=cache)
        assert [digest for digest, _ in found] == [digest for digest, _ in reference]
        assert named(found[-1][1]) == bad
        asked = len(faulty.requests)
        # A resumed run knows what is bad and asks no more for it.
        files = {file for file, member in bad if member is None}
        again = read(url, 1, found[-1][1], steps=3, cache={**cache, "backoff": 0.02})
        assert not files & {name for name, _ in faulty.requests[asked:]}
    assert [d for d, _ in again] == [d for d, _ in read(folder, 1, reference[-1][1], steps=3)]


def test_validation_stops_in_any_case(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "copy")
    manifest = load_manifest(folder)
    (folder / manifest.splits["validation"].shards[0].file).unlink()
    data = data_config(folder, on_bad="quarantine")
    with pytest.raises(DataError, match="No such file"):
        next(validation_batches(manifest, data, micro_batch=1, align=16))


def test_nothing_readable_is_an_error(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "copy")
    for shard in load_manifest(folder).splits["train"].shards:
        (folder / shard.file).unlink()
    with pytest.raises(DataError, match="none of 1000 rows drawn in place of sample 0"):
        read(folder, steps=1, max_bad=1.0)


def test_draws_come_from_the_window_first():
    order = Order([5, 3, 7, 2, 9, 4], "key", window=2)
    for sample in (0, 20, 29, 30, 47):
        window = order.window_of(sample)
        near = [order.draw(sample, n) for n in range(NEAR)]
        assert {shard for shard, _ in near} == set(order.shards_in(window))
        assert all(0 <= block < order.blocks[shard] for shard, block in near)
        assert near == [Order(order.blocks, "key", window=2).draw(sample, n) for n in range(NEAR)]
    assert [order.draw(0, n) for n in range(NEAR)] != [order.draw(1, n) for n in range(NEAR)]
    far = {order.draw(3, n)[0] for n in range(NEAR, NEAR + 60)}
    assert far == set(range(6))


def two_ranks(tree):
    config = parse_config(tree, "test")
    world = start_world(config.train)
    one = open_stream(config, world)
    state, found = one.start(), []
    batches = one.batches(state)
    try:
        for _ in range(STEPS):
            micro_batches, state = fetch(world, batches, one, state)
            found += micro_batches
        told = found, state
    except DataError as e:
        told = str(e), e.exit_code
    batches.close()
    world.shut_down()
    return told


def test_real_ranks_agree_and_stop_together(spoiled, tmp_path):
    folder, bad = spoiled
    tree = small_run(tmp_path, folder, train__global_batch=GLOBAL, train__micro_batch=1)
    tree["data"] |= {"on_bad": "quarantine", "max_bad": 0.5}
    (first, state), (second, other) = run_world(two_ranks, 2, tree)
    assert state == other and named(state) == bad
    source = {"books": {"path": str(folder)}}
    [*_, (digest, alone)] = read(folder, sources=source)
    last = [b for b in first + second if int(b.samples[0]) >= GLOBAL * (STEPS - 1)]
    assert batch_hash(last) == digest and alone == state
    tree["data"]["max_bad"] = 0.01
    (why, code), (other_why, other_code) = run_world(two_ranks, 2, tree)
    assert code == other_code == 3 and why == other_why and "cannot be used" in why
