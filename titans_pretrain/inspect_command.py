"""`titans-pretrain inspect PATH`: what a manifest, shard, checkpoint or run folder holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titans_pretrain.errors import ConfigError


def inspect(path: Path, verify: bool = False) -> str:
    """A description in lines; `verify` reads all shards of a manifest.

    Raises ConfigError for a path that is none of these, DataError for a damaged one.
    """
    if path.name == "manifest.json" or (path / "manifest.json").exists():
        from titans_pretrain.data.inspect import describe_manifest

        return describe_manifest(path if path.is_dir() else path.parent, verify)
    if path.suffix == ".tar" and path.is_file():
        from titans_pretrain.data.inspect import describe_shard

        return describe_shard(path)
    if (path / "checksums.json").exists() or path.name.startswith("step-"):
        return "\n".join(_checkpoint(path))
    if (path / "config.yaml").exists():
        return "\n".join(_run(path))
    raise ConfigError(
        f"inspect {path}: {'no such path' if not path.exists() else 'nothing known'}",
        "a prepared folder or its manifest.json, a shard (.tar), a checkpoint (step-...) or a run",
        "give the path of one of these",
    )


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
