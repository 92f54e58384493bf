"""Checkpoint folders: written aside, fsynced, checksummed, renamed; found, verified, pruned.

    checkpoints/step-00000037/
        .metadata  __0_0.distcp ...   tensors, torch.distributed.checkpoint
        state.json                    everything else
        checksums.json                sha256 of each file above; written last

A folder without a valid checksums.json is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from titans_pretrain.errors import ConfigError, DataError, NodeError, TitansError
from titans_pretrain.parallel.layout import Fragment
from titans_pretrain.run import dcp
from titans_pretrain.run.folder import CHECKPOINT_FORMAT as FORMAT

if TYPE_CHECKING:
    from titans_pretrain.config import CheckpointConfig
    from titans_pretrain.parallel.world import World

log = logging.getLogger("titans_pretrain.checkpoint")

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the finished checkpoints, ascending; verified or not."""
    names = [p.name for p in checkpoints.glob("step-*") if p.name[5:].isdigit()]
    return sorted(int(n[5:]) for n in names)


def save(
    checkpoints: Path,
    state: dict[str, Any],
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    world: World,
    still_mine: Callable[[], None],
    go_on: Callable[[], None] = lambda: None,
) -> Path:
    """Collective. Saves a checkpoint of `state["step"]`; earlier ones stay until it is complete.

    Args:
        state: JSON values, equal on all ranks; "step" and "life" among them.
        fragments: what this rank owns of weights and moments.
        tensors: replicated tensors, e.g. the random-number state.
        still_mine: raises if a newer life has taken the run folder.
        go_on: called before each piece of a tensor is written; raises OSError to end it.
    Raises:
        NodeError on every rank, if any rank could not write.
    """
    put = partial(write, fragments, tensors, world, go_on)
    return assemble(checkpoints, state, put, world, still_mine)


def write(
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    world: World,
    go_on: Callable[[], None],
    folder: Path,
) -> dict[str, str]:
    """Collective. Writes this rank's tensors into `folder`: the sha256 of each of its files."""
    write_files(fragments, tensors, world, go_on, folder)
    return {path.name: _sha256(path) for path in files_of(folder, world.rank)}


def write_files(
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    world: World,
    go_on: Callable[[], None],
    folder: Path,
    node: str = "",
) -> None:
    """`write` without reading the files again. `node`: this one, where `folder` lies on its own
    disk."""
    try:
        dcp.save_tensors(folder, fragments, tensors, world.group, go_on)
    except CheckpointException as e:
        raise _not_written(_first_cause(e), node if world.rank in e.failures else "") from e


def files_of(folder: Path, rank: int) -> list[Path]:
    """Those that `rank` has written; rank 0 also writes the table of all tensors."""
    table = [folder / dcp.METADATA_FILE] if rank == 0 else []
    return [path for path in (*folder.glob(f"__{rank}_*"), *table) if path.exists()]


def assemble(
    checkpoints: Path,
    state: dict[str, Any],
    put: Callable[[Path], dict[str, str]],
    world: World,
    still_mine: Callable[[], None],
) -> Path:
    """`save`, where `put` brings this rank's files into a folder: the sha256 of each by name."""
    final = folder_of(checkpoints, state["step"])
    aside = checkpoints / f".writing-{final.name}-life-{state['life']}"

    def prepare() -> None:
        still_mine()
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def publish() -> None:
        checksums = {name: digest for part in digests for name, digest in part.items()}
        text = json.dumps({"format": FORMAT, **state}, indent=1)
        checksums["state.json"] = hashlib.sha256(text.encode()).hexdigest()
        _write(aside / "state.json", text)
        _write(aside / "checksums.json", json.dumps(checksums, indent=1))
        _sync_folder(aside)
        still_mine()
        if final.exists():  # a damaged one of the same step: kept, out of the way
            final.rename(checkpoints / f"damaged-{final.name}-life-{state['life']}")
        aside.rename(final)
        _sync_folder(checkpoints)

    try:
        world.only_first(told(prepare, world))
        digests = world.gather_objects(world.agree(told(partial(put, aside), world)))
        world.only_first(told(publish, world))
    except TitansError:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def told(act: Callable[[], T], world: World, node: str = "") -> Callable[[], T]:
    """`act`, with a disk's refusal told as a NodeError; `node`: this one, if it is its own disk."""

    def run() -> T:
        try:
            return act()
        except OSError as e:
            raise _not_written(f"rank {world.rank}: {e}", node) from e

    return run


def _not_written(why: str, node: str) -> NodeError:
    return NodeError(
        f"checkpoint not written: {why}",
        "every rank writes its part of a checkpoint, else none counts",
        "free disk space or mend the folder, then start again: earlier checkpoints are untouched",
        node,
    )


def _first_cause(e: CheckpointException) -> str:
    return "; ".join(
        f"rank {rank}: {type(cause).__name__} {cause}" for rank, (cause, _) in e.failures.items()
    )


def verify(folder: Path, world: World | None = None) -> dict[str, Any]:
    """Checks every file against checksums.json (shared out over the ranks); returns state.json.

    Raises DataError naming the damaged file, on every rank.
    """
    problem = ""
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        needed = {dcp.METADATA_FILE, "state.json"} | {p.name for p in folder.glob("*.distcp")}
        unlisted = needed - set(checksums)
        if unlisted or not isinstance(checksums, dict):
            raise ValueError(f"checksums.json does not list {', '.join(sorted(unlisted))}")
        rank, size = (world.rank, world.size) if world else (0, 1)
        for name in sorted(checksums)[rank::size]:
            if _sha256(folder / name) != checksums[name]:
                problem = f"{folder / name}: its sha256 is not that of checksums.json"
    except (OSError, ValueError, TypeError) as e:
        problem = f"{folder}: {e}"
    problems = [p for p in (world.gather_objects(problem) if world else [problem]) if p]
    if problems:
        raise DataError(
            "damaged checkpoint " + "; ".join(problems),
            "every file of a checkpoint is as it was written",
            "use an earlier checkpoint; one is a folder RUN/checkpoints/step-NNNNNNNN",
        )
    state = json.loads((folder / "state.json").read_text())
    _require_format(folder, state)
    return state


class FormatError(DataError):
    """A checkpoint, undamaged, of another version of this code: none older takes its place."""


def _require_format(folder: Path, state: dict[str, Any]) -> None:
    if state.get("format") != FORMAT:
        raise FormatError(
            f"checkpoint {folder}: format {state.get('format')}",
            f"this version of the code reads format {FORMAT}",
            "use the version of titans_pretrain that wrote it (RUN/jobs/*/env.txt names its "
            "commit), or set another folder=",
        )


def require_format(checkpoints: Path) -> None:
    """Raises DataError if the newest checkpoint is of another version. A first look: what is
    damaged, `verify` finds."""
    for step in list_steps(checkpoints)[-1:]:
        folder = folder_of(checkpoints, step)
        with contextlib.suppress(OSError, ValueError):
            _require_format(folder, json.loads((folder / "state.json").read_text()))


def find_latest(
    checkpoints: Path,
    world: World,
    warn: Callable[[str], None],
    order: Callable[[list[int]], list[int]] = sorted,
) -> Found | None:
    """Collective. The newest undamaged checkpoint; each damaged one on the way is told to `warn`.

    `order`: which of their steps come into question, the best last. Raises DataError if there are
    such checkpoints and all are damaged.
    """
    steps = world.broadcast_object(list_steps(checkpoints) if world.rank == 0 else None)
    steps = order(steps)
    for step in reversed(steps):
        folder = folder_of(checkpoints, step)
        try:
            return Found(folder, verify(folder, world))
        except FormatError:
            raise
        except DataError as e:
            warn(f"{e.value}; going back to the checkpoint before it")
    if steps:
        raise DataError(
            f"{checkpoints}: all {len(steps)} checkpoints are damaged",
            "a run resumes from an undamaged checkpoint",
            "remove the folder to start afresh, or restore it from a copy",
        )
    return None


def load(
    found: Found,
    model: dict[str, Any],
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Collective. Reads weights, moments and `tensors` into their own memory.

    Raises ConfigError if the checkpoint is of another model.
    """
    _same_model(found, model)
    _load_tensors(found.folder, fragments, tensors, None)


def load_weights(found: Found, model: dict[str, Any], fragments: Sequence[Fragment]) -> None:
    """Collective. Reads weights alone (`train --init-from`)."""
    _same_model(found, model)
    _load_tensors(found.folder, fragments, {}, ("weight",))


def _load_tensors(
    folder: Path,
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    kinds: Sequence[str] | None,
) -> None:
    try:
        dcp.load_tensors(folder, fragments, tensors, kinds)
    except CheckpointException as e:  # on every rank
        raise DataError(
            f"checkpoint {folder} cannot be loaded: {_first_cause(e).splitlines()[0]}",
            "a checkpoint holds this model's tensors and nothing else, in files that can be read",
            "check the disk; use an earlier checkpoint, or one from a source that you trust",
        ) from e


def _same_model(found: Found, model: dict[str, Any]) -> None:
    saved = flatten(found.state["config"]["model"])
    ours = flatten(model)
    different = [
        f"model.{k}: {saved.get(k)!r} in the checkpoint, {ours.get(k)!r} here"
        for k in sorted(saved.keys() | ours.keys())
        if saved.get(k) != ours.get(k)
    ]
    if different:
        raise ConfigError(
            f"checkpoint {found.folder} is of another model: " + "; ".join(different),
            "weights fit the model that they were trained in",
            "set these keys as in the checkpoint, or give this run another folder",
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": c}} -> {"a.b": c}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def prune(checkpoints: Path, keep: CheckpointConfig, newest: int) -> list[int]:
    """Removes what `keep` does not name; returns the steps removed. Rank 0 alone calls it.

    `newest`: the step just saved. Later ones are damaged, or the run would have gone on from them:
    they count for nothing and stay until the run gets there. What cannot be removed is told.
    """
    steps = [s for s in list_steps(checkpoints) if s <= newest]
    stay = set(steps[-keep.keep_last :])
    if keep.keep_every:
        stay |= {s for s in steps if s % keep.keep_every == 0}
    if keep.keep_best:
        losses = {s: _validation_loss(folder_of(checkpoints, s)) for s in steps}
        known = {s: loss for s, loss in losses.items() if loss is not None}
        if known:
            stay.add(min(known, key=lambda s: (known[s], s)))
    gone = [s for s in steps if s not in stay]
    _remove(checkpoints, gone)
    return gone


def remove_after(checkpoints: Path, step: int) -> list[int]:
    """Removes the checkpoints of steps after `step`, to which a run has gone back: they lie on a
    path that it left. Returns their steps. Rank 0 alone calls it."""
    gone = [s for s in list_steps(checkpoints) if s > step]
    _remove(checkpoints, gone)
    return gone


def _remove(checkpoints: Path, steps: Sequence[int]) -> None:
    for step in steps:
        # Renamed first: a removal cut short leaves nothing that looks like a checkpoint.
        trash = checkpoints / f".removing-step-{step:08d}"
        try:
            folder_of(checkpoints, step).rename(trash)
            shutil.rmtree(trash)
        except OSError as e:
            log.warning("checkpoint of step %d not removed: %s", step, e)


def _validation_loss(folder: Path) -> float | None:
    try:
        return json.loads((folder / "state.json").read_text()).get("validation_loss")
    except (OSError, ValueError):
        return None


def clean(checkpoints: Path) -> None:
    """Removes what an earlier life left half-written or half-removed. Rank 0, holding the lock."""
    for pattern in (".writing-*", ".removing-*"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def content_sha256(folder: Path) -> str:
    """sha256 of the training state: weights, moments, random numbers, step, data position, and what
    spikes are judged by, where they are.

    Equal exactly when the state is; independent of ranks, files, times and the life number.
    """
    state = json.loads((folder / "state.json").read_text())
    kept = {k: state[k] for k in ("step", "data", "divergence") if k in state}
    position = json.dumps(kept, sort_keys=True)
    return hashlib.sha256((dcp.hash_tensors(folder) + position).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
