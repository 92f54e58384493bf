"""`titans-pretrain inspect PATH`: what a config, manifest, shard, checkpoint or run holds."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from titans_pretrain.errors import ConfigError


def inspect(
    path: Path,
    verify: bool = False,
    samples: int = 3,
    sequence_length: int | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """A description in lines; `verify` reads all shards of a manifest, of which also `samples`
    documents are shown, and how rows of `sequence_length` are filled. `overrides` change a config.

    A folder of checkpoints stands for its latest. Raises ConfigError for a path that is none of
    these, DataError for a damaged one.
    """
    if path.suffix in (".yaml", ".yml"):
        from titans_pretrain.inspect_config import describe_config

        return describe_config(path, overrides)
    if overrides:
        raise ConfigError(
            f"inspect {path} {' '.join(overrides)}",
            "only the values of a config can be changed",
            "leave them out, or give the path of a config (.yaml)",
        )
    if path.name == "manifest.json" or (path / "manifest.json").exists():
        from titans_pretrain.data.inspect import describe_manifest

        folder = path if path.is_dir() else path.parent
        return describe_manifest(folder, verify, samples, sequence_length)
    if path.suffix == ".tar" and path.is_file():
        from titans_pretrain.data.inspect import describe_shard

        return describe_shard(path)
    if (path / "checksums.json").exists() or path.name.startswith("step-"):
        return "\n".join(_checkpoint(path))
    if (path / "config.yaml").exists():
        return "\n".join(_run(path))
    finished = sorted(path.glob("step-*"))
    if finished:
        return "\n".join(_checkpoint(finished[-1]))
    raise ConfigError(
        f"inspect {path}: {'no such path' if not path.exists() else 'nothing known'}",
        "a config (.yaml), a prepared folder or its manifest.json, a shard (.tar), a checkpoint "
        "(step-...), a run or its checkpoints",
        "give the path of one of these",
    )


def _checkpoint(folder: Path) -> Iterator[str]:
    from titans_pretrain.run.checkpoint import content_sha256, verify
    from titans_pretrain.run.dcp import count_parameters

    state = verify(folder)  # before a byte of it is used
    files = [p for p in folder.iterdir() if p.is_file()]
    size = sum(p.stat().st_size for p in files)
    model = state["config"]["model"]
    loss = state["validation_loss"]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state["time"]))
    facts = {
        "step": f"{state['step']:,} of {state['config']['train']['steps']:,}",
        "tokens": f"{state['tokens']:,}",
        "validation loss": "not measured at this step" if loss is None else f"{loss:.4f}",
        "model": f"{model['variant']}, {model['blocks']} blocks, width {model['width']}, "
        f"{model['heads']} heads, {model['vocab_size']:,} pieces",
        "parameters": f"{count_parameters(folder):,}",
        "files": f"{len(files)}, {size:,} bytes, all as in checksums.json",
        "content sha256": f"{content_sha256(folder)}\n  {'':<16} (of weights, optimizer, random "
        "numbers, step and data position)",
        "data position": ", ".join(f"{k} {_short(v)}" for k, v in state["data"].items()),
        "written": f"{written} by life {state['life']}, {state['ranks']} ranks of "
        f"{state['threads']} threads",
        "versions": ", ".join(f"{k} {v}" for k, v in state["versions"].items()),
    }
    yield f"checkpoint {folder}"
    for name, value in facts.items():
        yield f"  {name:<16} {value}"
    for name, difference in _differences(folder, state):
        yield f"  {name:<16} {difference}"


def _differences(folder: Path, state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is no longer as it was when the checkpoint was written: (name, old and new)."""
    from titans_pretrain.config import load_config
    from titans_pretrain.run.checkpoint import flatten

    config = folder.resolve().parent.parent / "config.yaml"
    if config.exists():
        then, now = flatten(state["config"]), flatten(load_config(config).model_dump(mode="json"))
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                yield "config differs", f"{key}: {then.get(key)} here, {now.get(key)} in {config}"
    for name, old in state["versions"].items():
        new = _installed(name)
        if new != old:
            yield "version differs", f"{name}: {old} then, {new} now"


def _installed(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


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
    return text if len(text) <= 40 else text[:16] + "..."
