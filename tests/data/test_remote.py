"""Shards behind URLs: a server that fails in every way, one node's cache, and many readers."""

import collections
import contextlib
import itertools
import logging
import os
import time

import pytest

from tests.data.conftest import quiet
from tests.data.faulty_server import serving
from tests.data.oracle import data_config, write_corpus
from titans_pretrain.config import CacheConfig
from titans_pretrain.data import cache as cache_module
from titans_pretrain.data.batch import batch_hash
from titans_pretrain.data.cache import Cache, open_cache
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.mirror import open_source
from titans_pretrain.data.order import WINDOW
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.remote import Patience, Wanted, fetch, join, shown
from titans_pretrain.data.stream import TrainStream
from titans_pretrain.errors import ConfigError, DataError, NodeError

GLOBAL = 24


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Some fifty small shards: three windows and a bit."""
    base = tmp_path_factory.mktemp("remote")
    write_corpus(base / "docs.jsonl", 250)
    settings = Settings(unit_bytes=30_000, member_tokens=500, shard_tokens=1_500)
    manifest = prepare([str(base / "docs.jsonl")], base / "data", tokenizer, settings, say=quiet)
    assert len(manifest.splits["train"].shards) > 3 * WINDOW
    return base / "data"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(folder):
    with serving(folder) as (faulty, url):
        yield faulty, url


def stream(path, cache, workers=0, **options):
    told = {"folder": str(cache), "gib": 0.01, "retries": 2, "timeout": 10, "backoff": 0.02}
    data = data_config(path, workers=workers, cache={**told, **options})
    return TrainStream(data, global_batch=GLOBAL, micro_batch=GLOBAL, align=16)


def hashes(one, steps, state=None):
    batches = one.batches(state or one.start())
    found = [batch_hash(read) for read, _ in itertools.islice(batches, steps)]
    batches.close()
    return found


@pytest.fixture(scope="module")
def epoch(folder):
    """Steps of one epoch, and the hashes of their batches read in place."""
    one = TrainStream(data_config(folder), global_batch=GLOBAL, micro_batch=GLOBAL, align=16)
    steps = -(-one._samples.opened().orders[0].total // GLOBAL)
    return steps, hashes(one, steps)


def shard_names(folder, numbers):
    return [load_manifest(folder).splits["train"].shards[n].file for n in numbers]


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def test_what_heals_changes_nothing(server, folder, epoch, tmp_path, caplog):
    faulty, url = server
    names = shard_names(folder, range(6))
    orders = (["503", "503"], ["cut 1000"], ["stall 2000"], ["flip 900"], ["short 700"], ["cut 0"])
    faulty.faults = dict(zip(names, orders)) | {"manifest.json": ["503"]}
    with caplog.at_level(logging.WARNING):
        assert hashes(stream(url, tmp_path, timeout=1.5), epoch[0]) == epoch[1]
    tries = collections.Counter(faulty.fetched())
    assert [tries[n] for n in names] == [3, 2, 2, 2, 2, 2]
    # Cut and stalled transfers go on where they ended; wrong content is fetched anew.
    begun = {n: [at for name, at in faulty.requests if name == n] for n in names}
    assert begun[names[1]] == [0, 1000] and begun[names[2]] == [0, 2000]
    assert begun[names[3]] == begun[names[4]] == [0, 0]
    words = ("503", "at byte 1000", "no byte for 1.5 s", "sha256", "at byte 700: it ends here")
    for name, word in zip(names, words):
        assert any(f"{url}/{name}" in line and word in line for line in caplog.messages), word


def test_worker_processes_fetch_each_shard_once(server, folder, epoch, tmp_path):
    faulty, url = server
    assert hashes(stream(url, tmp_path, workers=3), epoch[0]) == epoch[1]
    fetched = collections.Counter(faulty.fetched())
    assert set(fetched.values()) == {1}
    assert len(fetched) == len(load_manifest(folder).splits["train"].shards)
    # The manifest is asked for by the rank alone.
    assert faulty.fetched(".json") == ["manifest.json"]


def test_the_next_window_is_fetched_ahead_and_no_more(server, folder, tmp_path):
    faulty, url = server
    one = stream(url, tmp_path)
    order = one._samples.opened().orders[0]
    batches = one.batches(one.start())
    next(batches)
    near = set(shard_names(folder, [*order.shards_in(0), *order.shards_in(1)]))
    assert len(near) == 2 * WINDOW
    wait_until(lambda: set(faulty.fetched()) == near)
    time.sleep(0.5)
    assert sorted(faulty.fetched()) == sorted(near)


def test_the_cache_is_bounded_and_keeps_the_windows_in_use(server, folder, epoch, tmp_path):
    faulty, url = server
    shards = load_manifest(folder).splits["train"].shards
    sizes = [s.bytes for s in shards]
    limit = sum(sorted(sizes)[-2 * WINDOW :]) + max(sizes)
    assert limit < sum(sizes) - max(sizes)
    one = stream(url, tmp_path, gib=limit / 2**30)
    order = one._samples.opened().orders[0]
    sha256 = [s.sha256 for s in shards]
    # The first two windows and most of the third: then the next epoch's shards would come.
    third = next(n for n in itertools.count() if order.window_of(n) == 2)
    steps, found, largest = third // GLOBAL + 10, [], 0
    batches = one.batches(one.start())  # open to the end: closing ends what is on its way
    for read, state in itertools.islice(batches, steps):
        found.append(batch_hash(read))
        size = 0
        for entry in os.scandir(tmp_path / "shards"):
            with contextlib.suppress(FileNotFoundError):  # it has arrived, and has its name now
                size += entry.stat().st_size
        largest = max(largest, size)
        window = order.window_of(state["next_sample"] - 1)
        wait_until(lambda w=window: {sha256[s] for s in order.shards_in(w)} <= held(tmp_path))
    assert found == epoch[1][:steps]
    assert largest <= limit
    assert set(collections.Counter(faulty.fetched()).values()) == {1}
    # Of the first window some had to go; the second may be needed no more either.
    may_go = {sha256[s] for s in order.shards_in(0) + order.shards_in(1)}

    def gone():
        return {file.sha256 for file in shards if file.file in faulty.fetched()} - held(tmp_path)

    wait_until(lambda: gone() <= may_go)  # one on its way is asked for and not yet held
    assert gone()
    batches.close()


def held(cache):
    names = (p.name.split(".") for p in (cache / "shards").iterdir())
    return {parts[0] for parts in names if len(parts) == 2 and parts[1].isdecimal()}


def test_a_later_run_finds_its_shards(server, epoch, tmp_path):
    faulty, url = server
    assert hashes(stream(url, tmp_path), epoch[0]) == epoch[1]
    before = len(faulty.fetched())
    cache_module._open_cache.cache_clear()
    assert hashes(stream(url, tmp_path), epoch[0]) == epoch[1]
    assert len(faulty.fetched()) == before


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("404", r"404.*\(at member \d+ of train\)"),
        ("500", r"500.*\(at member \d+ of train\)"),
        ("flip {tok}", r"sha256 .*\.tok at bytes {tok}\.\."),
        ("short 700", r"at byte 700: it ends here; \d+ bytes.*member \d+ of train"),
        ("cut 700", r"at byte 700: .*transfer closed.*\(at member \d+ of train\)"),
        ("stall 700", r"at byte 700: no byte for 1 s.*\(at member \d+ of train\)"),
    ],
)
def test_what_does_not_heal_stops(server, folder, epoch, tmp_path, fault, word):
    faulty, url = server
    manifest = load_manifest(folder)
    row = manifest.splits["train"].members[manifest.splits["train"].first_member[2]]
    fault, word = (text.replace("{tok}", str(row["tok"])) for text in (fault, word))
    [name] = shard_names(folder, [2])
    faulty.always(name, fault)
    begun = time.monotonic()
    with pytest.raises(DataError, match=word) as told:
        hashes(stream(url, tmp_path, timeout=1 if "stall" in fault else 10), epoch[0])
    assert time.monotonic() - begun < 30
    assert f"{url}/{name}" in told.value.value and told.value.exit_code == 3
    asked = faulty.fetched().count(name)
    assert asked == (1 if fault == "404" else 3) or asked <= 6  # fetched ahead in vain as well


def test_processes_share_a_failure(server, folder, tmp_path):
    """Who waited while another process failed does not begin anew; a later run does."""
    faulty, url = server
    shard = load_manifest(folder).splits["train"].shards[3]
    wanted = Wanted(join(url, shard.file), shard.bytes, shard.sha256)
    caches = [Cache(tmp_path, 1 << 20, Patience(1, 1.0, 0.01)) for _ in range(2)]
    faulty.always(shard.file, "503")
    for each in caches:
        with pytest.raises(cache_module.FetchFailed, match="503"):
            each.open(wanted)
    assert faulty.fetched() == [shard.file] * 2
    faulty.faults = {}
    time.sleep(0.2)
    os.close(Cache(tmp_path, 1 << 20, Patience(1, 1.0, 0.01)).open(wanted))


def test_an_open_file_outlives_its_eviction(server, folder, tmp_path):
    _, url = server
    shards = load_manifest(folder).splits["train"].shards[:3]
    wanted = [Wanted(join(url, s.file), s.bytes, s.sha256) for s in shards]
    cache = Cache(tmp_path, max(s.bytes for s in shards), Patience(0, 1.0, 0.01))
    first = cache.open(wanted[0])
    os.close(cache.open(wanted[1]))
    assert held(tmp_path) == {shards[1].sha256}
    content = (folder / shards[0].file).read_bytes()
    assert os.pread(first, shards[0].bytes + 1, 0) == content
    os.close(first)
    # What another process has in its window stays, even where the room does not suffice.
    cache.want("window", [wanted[1]])
    wait_until(lambda: wanted[1].sha256 in cache._pins)
    other = Cache(tmp_path, max(s.bytes for s in shards), Patience(0, 1.0, 0.01))
    os.close(other.open(wanted[2]))
    assert held(tmp_path) == {shards[1].sha256, shards[2].sha256}
    cache.want("window", [])
    os.close(other.open(wanted[0]))
    assert held(tmp_path) == {shards[0].sha256}


def test_what_a_killed_process_left_is_gone_on_with(server, folder, tmp_path):
    faulty, url = server
    shard = load_manifest(folder).splits["train"].shards[0]
    cache = Cache(tmp_path, 1 << 20, Patience(0, 1.0, 0.01))
    part = tmp_path / "shards" / f"{shard.sha256}.{shard.bytes}.part"
    part.write_bytes((folder / shard.file).read_bytes()[:999])
    os.close(cache.open(Wanted(join(url, shard.file), shard.bytes, shard.sha256)))
    assert faulty.requests == [(shard.file, 999)]
    assert held(tmp_path) == {shard.sha256} and not part.exists()


@pytest.mark.parametrize("flipped", ["tok", "len"])
def test_a_copy_that_the_disk_damaged_is_fetched_again(server, folder, epoch, tmp_path, flipped):
    faulty, url = server
    hashes(stream(url, tmp_path), epoch[0])
    split = load_manifest(folder).splits["train"]
    shard = split.shards[4]
    with (tmp_path / "shards" / f"{shard.sha256}.{shard.bytes}").open("r+b") as copy:
        copy.seek(int(split.members[split.first_member[4]][flipped]))
        copy.write(b"\xff\xff")
    assert hashes(stream(url, tmp_path), epoch[0]) == epoch[1]
    assert faulty.fetched().count(shard.file) == 2


def test_a_copy_that_lost_its_end_is_fetched_again(server, folder, epoch, tmp_path):
    faulty, url = server
    hashes(stream(url, tmp_path), epoch[0])
    shard = load_manifest(folder).splits["train"].shards[4]
    with (tmp_path / "shards" / f"{shard.sha256}.{shard.bytes}").open("r+b") as copy:
        copy.truncate(3000)
    assert hashes(stream(url, tmp_path), epoch[0]) == epoch[1]
    assert faulty.requests.count((shard.file, 0)) == 2


def test_other_schemes(folder, epoch, tmp_path, monkeypatch):
    """file: is copied, s3: goes through `aws`, and any scheme through a command of one's own."""
    assert hashes(stream(f"file://{folder}", tmp_path / "1"), 3) == epoch[1][:3]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "aws").write_text(f'#!/bin/sh\nexec cat "{folder}/${{4##*/}}"\n')
    (tools / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert hashes(stream("s3://bucket/x", tmp_path / "2"), 3) == epoch[1][:3]
    monkeypatch.setenv("GOPEN_REWRITE", f"gs://bucket=pipe:cat {folder}")
    assert hashes(stream("gs://bucket", tmp_path / "3"), 3) == epoch[1][:3]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(NodeError, match="the program curl was not found"):
        stream("http://127.0.0.1:9", tmp_path / "4")


def test_urls_that_are_no_source(server, tmp_path):
    _, url = server
    with pytest.raises(DataError, match=r"nowhere/manifest\.json: at byte 0: .*404") as told:
        stream(f"{url}/nowhere", tmp_path)
    assert "manifest.json, its tables" in told.value.rule
    with pytest.raises(DataError, match=r"tokenizer\.model|at byte 0"):
        stream("file:///nowhere", tmp_path)
    with pytest.raises(ConfigError, match="unknown scheme 'htp'"):
        stream("htp://host/folder", tmp_path)
    with pytest.raises(ConfigError, match=r"two windows of 16 shards are .* GiB"):
        stream(url, tmp_path, gib=1e-5)


def test_names_that_lead_elsewhere_are_refused(folder, tmp_path):
    from titans_pretrain.data.manifest import write_manifest

    whole = load_manifest(folder)
    for change in ({"file": "../other.tar"}, {"file": "a;rm -r x"}, {"sha256": "../../x"}):
        shards = [type(s)(**{**s.__dict__, **change}) for s in whole.splits["train"].shards[:1]]
        split = type(whole.splits["train"])(shards, whole.splits["train"].members)
        bad = tmp_path / "bad"
        bad.mkdir(exist_ok=True)
        write_manifest(bad, whole.header, {"train": split})
        with pytest.raises(DataError, match="its manifest holds"):
            open_source(f"file://{bad}", CacheConfig(folder=str(tmp_path / "cache")))


def test_a_disk_that_refuses_is_a_node_error(server, folder, tmp_path, monkeypatch):
    _, url = server
    monkeypatch.setenv("SLURMD_NODENAME", "tn3")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NodeError, match="Not a directory") as told:
        stream(url, tmp_path / "file" / "cache")
    assert "data.cache.folder" in told.value.remedy and told.value.exit_code == 76
    assert told.value.node == ""  # a disk that may be all nodes'
    one = stream(url, tmp_path / "full")
    for shard in load_manifest(folder).splits["train"].shards:
        part = tmp_path / "full" / "shards" / f"{shard.sha256}.{shard.bytes}.part"
        part.symlink_to("/dev/full")
    with pytest.raises(NodeError, match="No space left on device") as told:
        hashes(one, 1)
    assert told.value.node == "tn3"


def test_pauses_grow_and_differ():
    pauses = [[Patience(9, 1, 2.0).pause(n) for _ in range(50)] for n in range(9)]
    for n, drawn in enumerate(pauses):
        middle = min(60.0, 2.0 * 2**n)
        assert 0.5 * middle <= min(drawn) < max(drawn) <= 1.5 * middle


def test_urls_in_messages_hold_no_secrets():
    url = "https://user:secret@host:80/folder/?sig=secret"
    assert join(url, "a b.tar") == "https://user:secret@host:80/folder/a%20b.tar?sig=secret"
    assert shown(url) == "https://host:80/folder/?..."
    assert shown("s3://bucket/x") == "s3://bucket/x"


def test_a_transfer_no_longer_wanted_ends(server, folder, tmp_path):
    faulty, url = server
    shard = load_manifest(folder).splits["train"].shards[0]
    faulty.always(shard.file, "stall 100")
    end = time.monotonic() + 0.4
    with pytest.raises(cache_module.FetchFailed, match="no longer wanted"):
        fetch(
            Wanted(join(url, shard.file), shard.bytes, shard.sha256),
            tmp_path / "part",
            Patience(5, 30.0, 10.0),
            lambda: time.monotonic() > end,
        )
    assert time.monotonic() < end + 3


def test_one_cache_a_process_and_a_default_folder(monkeypatch, tmp_path):
    config = CacheConfig(folder=str(tmp_path))
    assert open_cache(config) is open_cache(CacheConfig(folder=str(tmp_path)))
    monkeypatch.setenv("TMPDIR", "/node/tmp")
    assert str(cache_module.default_folder()) == f"/node/tmp/titans-pretrain-{os.getuid()}"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    assert str(cache_module.default_folder()) == "/home/me/.cache/titans-pretrain"
