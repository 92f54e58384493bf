"""`titans-pretrain inspect PATH`: what a manifest, shard, checkpoint or run folder holds."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_pretrain.errors import ConfigError, DataError

_SHOWN = 8  # members of a shard


def inspect(path: Path) -> str:
    """A description in lines. Raises ConfigError for a path that is none of these, DataError for a
    damaged one (files are compared with their checksums)."""
    if path.name == "manifest.json" or (path / "manifest.json").exists():
        return "\n".join(_manifest(path if path.is_dir() else path.parent))
    if path.suffix == ".tar" and path.is_file():
        return "\n".join(_shard(path))
    if (path / "checksums.json").exists() or path.name.startswith("step-"):
        return "\n".join(_checkpoint(path))
    if (path / "config.yaml").exists():
        return "\n".join(_run(path))
    raise ConfigError(
        f"inspect {path}: {'no such path' if not path.exists() else 'nothing known'}",
        "a prepared folder or its manifest.json, a shard (.tar), a checkpoint (step-...) or a run",
        "give the path of one of these",
    )


def _manifest(folder: Path) -> Iterator[str]:
    from titans_pretrain.data.manifest import load_manifest

    manifest = load_manifest(folder)
    yield f"prepared folder {folder}"
    yield f"  hash       {manifest.hash}"
    yield f"  tokenizer  {manifest.tokenizer_hash[:16]}..., {manifest.vocab_size} ids"
    yield f"  dtype      {manifest.dtype.name}"
    for name, split in manifest.splits.items():
        size = sum(s.bytes for s in split.shards)
        yield (
            f"  {name:<10} {split.tokens:,} tokens, {split.documents:,} documents, "
            f"{len(split.shards)} shards ({size:,} bytes), {len(split.members)} members"
        )
    known = {"version", "hash", "tokenizer", "dtype", "splits", "alignments"}
    for key, value in manifest.header.items():
        if key not in known:
            yield f"  {key:<10} {json.dumps(value, ensure_ascii=False)}"


def _shard(path: Path) -> Iterator[str]:
    yield f"shard {path}"
    try:
        with tarfile.open(path) as tar:
            members = [(m.name, m.size) for m in tar if m.isfile()]
    except (tarfile.TarError, OSError) as e:
        raise DataError(
            f"shard {path}: {e}", "a shard is a whole tar file", "fetch or prepare it again"
        ) from e
    yield f"  {len(members)} files, {sum(size for _, size in members):,} bytes of content"
    for name, size in members[:_SHOWN]:
        yield f"  {name:<24} {size:>12,} bytes"
    if len(members) > _SHOWN:
        yield f"  ... {len(members) - _SHOWN} more"
    if not (path.parent / "manifest.json").exists():
        yield "  no manifest.json beside it: neither tokens nor checksum are known"
        return
    from titans_pretrain.data.files import file_sha256
    from titans_pretrain.data.manifest import load_manifest

    manifest = load_manifest(path.parent)
    for split, held in manifest.splits.items():
        for shard in held.shards:
            if shard.file != path.name:
                continue
            found = file_sha256(path)
            if found != shard.sha256:
                raise DataError(
                    f"shard {path}: sha256 {found[:16]}..., manifest {shard.sha256[:16]}...",
                    "a shard is as `prepare` wrote it",
                    "fetch it again, or prepare the folder anew",
                )
            yield f"  split {split}: {shard.tokens:,} tokens, {shard.documents:,} documents"
            yield f"  sha256 as in the manifest: {found}"
            return
    yield "  the manifest beside it does not name this shard"


def _checkpoint(folder: Path) -> Iterator[str]:
    from titans_pretrain.run.checkpoint import verify

    state = verify(folder)
    files = [p for p in folder.iterdir() if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    yield f"checkpoint {folder}"
    yield f"  {len(files)} files, {size:,} bytes, all as in checksums.json"
    for key, value in state.items():
        if key != "config":
            yield f"  {key:<16} {_short(value)}"
    model = state.get("config", {}).get("model", {})
    yield f"  {'model':<16} {', '.join(f'{k}={v}' for k, v in _flat(model))}"


def _run(folder: Path) -> Iterator[str]:
    from titans_pretrain.run.folder import RunFolder
    from titans_pretrain.run.lock import newest_claim
    from titans_pretrain.run.metrics import read_records

    run = RunFolder(folder)
    claim = newest_claim(folder)
    yield f"run {folder}"
    if claim is not None:
        state = "ended" if claim.released else f"held by pid {claim.pid} on {claim.host}, or dead"
        yield f"  life {claim.life}: {state}"
    checkpoints = sorted(p.name for p in run.checkpoints.glob("step-*"))
    yield f"  checkpoints: {', '.join(checkpoints) or 'none'}"
    records = list(read_records(run.metrics)) if run.metrics.exists() else []
    if records:
        last = records[-1]
        yield f"  last record: step {last['step']}, {last['tokens']:,} tokens"
        for name, value in last["values"].items():
            yield f"    {name:<24} {value:.6g}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
