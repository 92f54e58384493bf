"""Checkpoints: what is saved is what is loaded, by any number of ranks, and nothing else is."""

from __future__ import annotations

import enum
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.live_bytes import LiveBytes
from tests.parallel.through_zero import batches_of, start
from tests.parallel.tiny import tiny_config
from tests.worlds import run_world
from titans_pretrain.config import CheckpointConfig, RunConfig
from titans_pretrain.errors import ConfigError, DataError, NodeError
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.layout import Fragment
from titans_pretrain.parallel.world import World
from titans_pretrain.run import checkpoint, dcp
from titans_pretrain.run.saver import Saver
from titans_pretrain.step import TrainStep

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def state_of(config: RunConfig, step: int, **more: Any) -> dict[str, Any]:
    data = {"next_sample": step * 8}
    return {"step": step, "life": 1, "data": data, "config": config.model_dump(), **more}


def rng() -> dict[str, torch.Tensor]:
    return {"rng/cpu": torch.get_rng_state()}


def pieces(fragments: list[Fragment], key: str) -> dict[str, tuple[int, torch.Tensor]]:
    return {f.name: (f.start, f.tensors[key].clone()) for f in fragments}


def owned(step: TrainStep) -> list[Any]:
    fragments = step.optimizer.fragments()
    return [{f.name: (f.start, f.tensors[k].clone()) for f in fragments} for k in KINDS]


def train_save_train(config: RunConfig, folder: Path, first: int, more: int) -> Any:
    world, step = start(config)
    for s in range(1, first + 1):
        step(batches_of(config, s, world), s)
    checkpoint.save(
        folder, state_of(config, first), step.optimizer.fragments(), rng(), world, lambda: None
    )
    saved = owned(step)
    reports = [step(batches_of(config, s, world), s) for s in range(first + 1, first + more + 1)]
    end = owned(step)
    world.shut_down()
    return saved, [(r.loss, r.grad_norm) for r in reports], end


def load_train(config: RunConfig, folder: Path, more: int) -> Any:
    world, step = start(config)
    warnings: list[str] = []
    found = checkpoint.find_latest(folder, world, warnings.append)
    assert found is not None
    tensors = {"rng/cpu": torch.zeros_like(torch.get_rng_state())}
    checkpoint.load(found, config.model.model_dump(), step.optimizer.fragments(), tensors)
    step.optimizer.weights_loaded(found.step)
    loaded = owned(step)
    reports = [
        step(batches_of(config, s, world), s) for s in range(found.step + 1, found.step + more + 1)
    ]
    end = owned(step)
    same_rng = torch.equal(tensors["rng/cpu"], torch.get_rng_state())
    world.shut_down()
    return loaded, [(r.loss, r.grad_norm) for r in reports], end, warnings, found.step, same_rng


def merged(results: list[Any], index: int) -> dict[str, torch.Tensor]:
    """{kind/name: whole flat tensor} from every rank's pieces."""
    whole: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for kind, part in zip(KINDS, result[index], strict=True):
            for name, (at, piece) in part.items():
                whole.setdefault(f"{kind}/{name}", {})[at] = piece
    return {k: torch.cat([v for _, v in sorted(p.items())]) for k, p in whole.items()}


AGAIN: list[tuple[int, str, dict[str, Any]]] = [
    *((ranks, precision, {}) for precision in ("fp32", "bf16") for ranks in (1, 2)),
    (2, "bf16", {"tensor": 2, "sequence": True}),
    (2, "bf16", {"pipeline": 2, "interleave": 2}),
    (2, "bf16", {"context": 2}),
    (2, "bf16", {"zero": {"stage": 2}}),
    (2, "bf16", {"zero": {"stage": 3}}),
]


@pytest.mark.parametrize(("ranks", "precision", "parallel"), AGAIN, ids=str)
def test_same_layout_goes_on_bitwise(
    ranks: int, precision: str, parallel: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"model__vocab_size": 64, "train__global_batch": 4}
    changes |= {"model__variant": "mac", "model__blocks": 4 if "pipeline" in parallel else 2}
    changes = {"parallel": parallel, **changes} if parallel else {}
    config = tiny_config(train__precision=precision, **changes)
    before = run_world(train_save_train, ranks, config, tmp_path, 3, 3)
    after = run_world(load_train, ranks, config, tmp_path, 3)
    for a, b in zip(before, after, strict=True):
        assert a[1] == b[1] and len(a[1]) == 3
        for x, y in zip(a[0] + a[2], b[0] + b[2], strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[n][1], y[n][1]) for n in x)
        assert b[3] == [] and b[4] == 3 and b[5]


@pytest.mark.parametrize(("saver", "loader"), [(2, 1), (1, 2), (2, 4)])
def test_another_number_of_ranks_loads_the_same_state(
    saver: int, loader: int, tmp_path: Path
) -> None:
    config = tiny_config()
    before = run_world(train_save_train, saver, config, tmp_path, 2, 2)
    after = run_world(load_train, loader, config, tmp_path, 2)
    a, b = merged(before, 0), merged(after, 0)
    assert a.keys() == b.keys() and len(a) > 30
    assert all(torch.equal(a[k], b[k]) for k in a)
    for (x, nx), (y, ny) in zip(before[0][1], after[0][1], strict=True):
        assert x == pytest.approx(y, rel=1e-5) and nx == pytest.approx(ny, rel=1e-5)


def test_content_hash_tells_state_apart_from_layout(tmp_path: Path) -> None:
    config = tiny_config()
    run_world(train_save_train, 2, config, tmp_path / "a", 2, 0)
    folder = checkpoint.folder_of(tmp_path / "a", 2)
    content = checkpoint.content_sha256(folder)
    run_world(resave, 1, config, tmp_path / "a", tmp_path / "b", "")
    copy = checkpoint.folder_of(tmp_path / "b", 2)
    assert sorted(p.name for p in copy.iterdir()) != sorted(p.name for p in folder.iterdir())
    assert checkpoint.content_sha256(copy) == content
    for i, name in enumerate(("exp_avg_sq", "weight", "rng")):
        run_world(resave, 1, config, tmp_path / "a", tmp_path / f"c{i}", name)
        changed = checkpoint.folder_of(tmp_path / f"c{i}", 2)
        assert checkpoint.content_sha256(changed) != content, name


def resave(config: RunConfig, source: Path, target: Path, flip: str) -> None:
    """Loads and saves again, with one bit of one tensor changed where asked."""
    world, step = start(config)
    found = checkpoint.find_latest(source, world, print)
    assert found is not None
    tensors = {"rng/cpu": torch.zeros_like(torch.get_rng_state())}
    fragments = step.optimizer.fragments()
    checkpoint.load(found, config.model.model_dump(), fragments, tensors)
    if flip == "rng":
        tensors["rng/cpu"][100] ^= 1
    elif flip:
        fragments[-1].tensors[flip][-1:].view(torch.int32).bitwise_xor_(1)
    life = {**found.state, "life": 7}
    checkpoint.save(target, life, fragments, tensors, world, lambda: None)
    world.shut_down()


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "metadata", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: str, tmp_path: Path
) -> None:
    config = tiny_config()
    run_world(train_save_train, 2, config, tmp_path, 1, 0)
    run_world(train_save_train, 2, config, tmp_path, 2, 0)
    folder = checkpoint.folder_of(tmp_path, 2)
    victim = sorted(folder.glob("__1_*"))[0]
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "missing":
        victim.unlink()
    elif damage == "metadata":
        victim = folder / ".metadata"
        victim.write_bytes(victim.read_bytes()[:-2])
    else:
        victim = folder / "state.json"
        victim.write_text(victim.read_text().replace('"step": 2', '"step": 9'))
    results = run_world(load_train, 2, config, tmp_path, 0)
    for result in results:
        assert result[4] == 1
        assert len(result[3]) == 1 and victim.name in result[3][0]
    shutil.rmtree(checkpoint.folder_of(tmp_path, 1))
    with pytest.raises(AssertionError, match="all 1 checkpoints are damaged"):
        run_world(load_train, 2, config, tmp_path, 0)


class Hostile:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.witness),))


def test_a_hostile_metadata_file_is_refused_unopened(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(str(witness))))
    with pytest.raises(DataError, match="pathlib"):
        dcp.read_metadata(folder)
    assert not witness.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert witness.exists()  # the attack itself works


class ByName(pickle.Pickler):
    """Enumerations as Python 3.11.2 pickles them."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


class Gained:
    """getattr of anything else."""

    def __reduce__(self) -> Any:
        return (getattr, (dcp.Metadata, "__init__"))


def test_metadata_of_another_python_is_read(tmp_path: Path) -> None:
    run_world(train_save_train, 1, tiny_config(), tmp_path, 1, 0)
    folder = checkpoint.folder_of(tmp_path, 1)
    metadata = dcp.read_metadata(folder)
    with (folder / ".metadata").open("wb") as file:
        ByName(file).dump(metadata)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert dcp.read_metadata(folder) == metadata

    (folder / ".metadata").write_bytes(pickle.dumps(Gained()))
    with pytest.raises(DataError, match="names '__init__' of"):
        dcp.read_metadata(folder)


def test_stored_paths_may_not_leave_the_folder(tmp_path: Path) -> None:
    config = tiny_config()
    run_world(train_save_train, 1, config, tmp_path, 1, 0)
    folder = checkpoint.folder_of(tmp_path, 1)
    content = (folder / ".metadata").read_bytes()
    assert b"__0_0.distcp" in content
    (folder / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(DataError, match="not a table of tensors in this folder"):
        dcp.read_metadata(folder)


@pytest.mark.parametrize("dropped", [".metadata", "state.json", "__0_0.distcp", "everything"])
def test_a_file_that_is_not_in_the_checksums_is_damage(dropped: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    names = (".metadata", "state.json", "__0_0.distcp")
    for name in names:
        (folder / name).write_text('{"format": 1, "step": 1}')
    digest = checkpoint._sha256(folder / "state.json")
    listed = {n: digest for n in names if dropped not in (n, "everything")}
    (folder / "checksums.json").write_text(json.dumps(dict.fromkeys(names, digest)))
    assert checkpoint.verify(folder)["step"] == 1
    (folder / "checksums.json").write_text(json.dumps(listed))
    with pytest.raises(
        DataError, match=f"does not list.*{'state' if dropped == 'everything' else dropped}"
    ):
        checkpoint.verify(folder)
    (folder / "checksums.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="damaged checkpoint"):
        checkpoint.verify(folder)


def other_model(config: RunConfig, folder: Path) -> str:
    world, step = start(config)
    found = checkpoint.find_latest(folder, world, print)
    assert found is not None
    try:
        checkpoint.load(found, config.model.model_dump(), step.optimizer.fragments(), {})
    except ConfigError as e:
        world.shut_down()
        return str(e)
    raise AssertionError("loaded")


def test_a_checkpoint_of_another_model_names_the_keys(tmp_path: Path) -> None:
    run_world(train_save_train, 1, tiny_config(), tmp_path, 1, 0)
    changed = tiny_config(model__width=48, model__memory__chunk=16)
    (message,) = run_world(other_model, 1, changed, tmp_path)
    assert "model.width: 32 in the checkpoint, 48 here" in message
    assert "model.memory.chunk: 8 in the checkpoint, 16 here" in message


def save_into_nowhere(config: RunConfig, folder: Path, how: str) -> Any:
    world, step = start(config)
    args = (step.optimizer.fragments(), rng(), world)
    checkpoint.save(folder, state_of(config, 1), *args, lambda: None)
    kept = checkpoint.content_sha256(checkpoint.folder_of(folder, 1))
    write = torch.save
    if how == "full" and world.rank == 1:  # one rank's disk is full

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        torch.save = full
    message = ""

    def newer_life() -> None:
        raise NodeError("life 2 holds the folder", "one life at a time", "leave")

    try:
        checkpoint.save(
            folder,
            state_of(config, 2),
            *args,
            newer_life if how == "life" else lambda: None,
        )
    except NodeError as e:
        message = str(e)
    torch.save = write
    world.barrier()
    names = sorted(p.name for p in folder.iterdir())
    return message, names, kept == checkpoint.content_sha256(checkpoint.folder_of(folder, 1))


@pytest.mark.parametrize("how", ["full", "life"])
def test_a_failed_save_stops_every_rank_and_leaves_the_last_one(how: str, tmp_path: Path) -> None:
    results = run_world(save_into_nowhere, 2, tiny_config(), tmp_path, how)
    for message, names, kept in results:
        assert ("No space left" in message) if how == "full" else ("life 2" in message)
        assert names == ["step-00000001"]
        assert kept


def test_retention_keeps_last_best_and_every_nth(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.0, 60: 2.2, 70: 2.3}
    for step, loss in losses.items():
        folder = checkpoint.folder_of(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    keep = CheckpointConfig(keep_last=2, keep_best=True, keep_every=40)
    assert checkpoint.prune(tmp_path, keep, 70) == [10, 30, 50]
    assert checkpoint.list_steps(tmp_path) == [20, 40, 60, 70]
    keep = CheckpointConfig(keep_last=1, keep_best=False)
    assert checkpoint.prune(tmp_path, keep, 70) == [20, 40, 60]


def test_damaged_later_ones_take_no_place_of_good_ones(tmp_path: Path) -> None:
    """Steps 30 and 40 were damaged, the run went on from 20 and has just saved step 25."""
    for step, loss in {10: 2.5, 20: 3.0, 25: 2.8, 30: 1.0, 40: 0.5}.items():
        folder = checkpoint.folder_of(tmp_path, step)
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    keep = CheckpointConfig(keep_last=1, keep_best=True)
    assert checkpoint.prune(tmp_path, keep, 25) == [20]
    assert checkpoint.list_steps(tmp_path) == [10, 25, 30, 40]


def test_one_that_cannot_be_removed_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        checkpoint.folder_of(tmp_path, step).mkdir()

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert checkpoint.prune(tmp_path, CheckpointConfig(keep_last=1), 3) == [1, 2]
    assert [r.getMessage() for r in caplog.records] == [
        f"checkpoint of step {s} not removed: [Errno 39] Directory not empty" for s in (1, 2)
    ]
    assert checkpoint.list_steps(tmp_path) == [3]


def counted(config: RunConfig, folder: Path) -> Any:
    world, step = start(config)
    fragments = step.optimizer.fragments()
    own = sum(t.untyped_storage().nbytes() for t in {id(s): s for s in storages(step)}.values())
    state = state_of(config, 1)
    tensors = rng()
    with LiveBytes() as saving:
        checkpoint.save(folder, state, fragments, tensors, world, lambda: None)
    found = checkpoint.find_latest(folder, world, print)
    assert found is not None
    with LiveBytes() as loading:
        checkpoint.load(found, config.model.model_dump(), fragments, tensors)
    copied = host_copy(folder, step, world)
    largest = max(4 * p.numel() for p in step.model.parameters())
    world.shut_down()
    return own, saving.peak, loading.peak, largest, tensors["rng/cpu"].numel(), copied


def host_copy(folder: Path, step: TrainStep, world: World) -> int:
    """Bytes that an asynchronous save copies, each storage once; they are asserted to be equal."""
    saver = Saver(folder, CheckpointConfig(), world, lambda: None, lambda saved: None)
    fragments = step.optimizer.fragments()
    copies, _ = saver._copy(fragments, {})
    held = {}
    for fragment, there in zip([f for f in fragments if f.first], copies, strict=True):
        for kind, tensor in fragment.tensors.items():
            assert torch.equal(there.tensors[kind], tensor)
            storage = there.tensors[kind].untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def storages(step: TrainStep) -> list[torch.Tensor]:
    return [
        flat
        for group in step.optimizer.adamw.param_groups
        for p in group["params"]
        for flat in (p, *(step.optimizer.adamw.state[p][k] for k in ("exp_avg", "exp_avg_sq")))
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rank_holds_more_than_its_partition_and_one_tensor(ranks: int, tmp_path: Path) -> None:
    config = tiny_config(model__width=128, model__heads=4, model__mlp_width=512)
    for own, saving, loading, largest, rng_bytes, copied in run_world(
        counted, ranks, config, tmp_path
    ):
        total = 3 * 4 * sum(p.numel() for p in built(config).parameters())
        assert own == pytest.approx(total / ranks, rel=0.01), "the partition itself"
        # Beside the partition, which is there anyway: one piece of one tensor, and odds and ends.
        assert 0 < saving <= largest + rng_bytes + 4096
        assert 0 < loading <= largest + rng_bytes + 4096
        assert largest < total / 20, "or the bound would say nothing"
        assert copied == own, "an asynchronous save keeps the partition once more"


def copied_in(config: RunConfig, folder: Path) -> tuple[int, int]:
    world, step = start(config)
    fragments = step.optimizer.fragments()
    copied = host_copy(folder, step, world)
    saved = sum(t.nbytes for f in fragments if f.first for t in f.tensors.values())
    world.shut_down()
    return copied, saved


@pytest.mark.parametrize("settings", [{"stage": 2, "offload": True}, {"stage": 3}], ids=str)
def test_the_host_copy_is_what_is_saved_and_no_more(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(train__precision="bf16", parallel={"zero": settings})
    for copied, saved in run_world(copied_in, 2, config, tmp_path):
        assert copied == saved > 100_000


def built(config: RunConfig) -> torch.nn.Module:
    return TitansLM(config.model, device="meta")
