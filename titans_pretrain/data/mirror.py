"""A prepared source, wherever it lies: a folder, or a URL whose manifest is copied to this node."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from titans_pretrain.config import CacheConfig
from titans_pretrain.data.cache import Cache, locked, open_cache
from titans_pretrain.data.files import file_sha256
from titans_pretrain.data.manifest import Manifest, load_manifest, parse_header
from titans_pretrain.data.order import WINDOW
from titans_pretrain.data.remote import (
    FetchFailed,
    Wanted,
    fetch,
    is_url,
    join,
    require_scheme,
    shown,
)
from titans_pretrain.data.store import Remote
from titans_pretrain.errors import ConfigError, DataError

HEX = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a shard or split: never a path, no option


def open_source(path: str, cache: CacheConfig, known: str = "") -> Manifest:
    """The manifest of a source, checked; its shards are opened when they are read.

    `known`: the manifest's hash, where another process of the run has read it: its copy on this
    node then does. Raises DataError, NodeError, and ConfigError for a URL nothing can open or a
    cache that cannot hold two windows of shards.
    """
    if not is_url(path):
        return load_manifest(path)
    require_scheme(path)
    opened = open_cache(cache)
    mirror = opened.folder / "manifests" / known
    if not known or not (mirror / "manifest.json").exists():
        mirror = _mirror(path, opened)
    manifest = replace(load_manifest(mirror), remote=Remote(path, opened))
    _require_room(path, manifest, opened)
    return manifest


def _mirror(url: str, cache: Cache) -> Path:
    """A folder with the manifest, tables and tokenizer that lie at the URL now."""
    scratch = cache.folder / "manifests" / f".{os.getpid()}.part"
    with cache.disk():
        try:
            _bring(Wanted(join(url, "manifest.json")), scratch, cache)
            content = scratch.read_bytes()
        finally:
            scratch.unlink(missing_ok=True)
    remedy = "copy a folder written by `titans-pretrain prepare` there, whole"
    header = parse_header(content, shown(join(url, "manifest.json")), remedy)
    _require_plain(url, header)
    mirror = cache.folder / "manifests" / header["hash"]
    tables = {f"{name}.members.npy": told["members_sha256"] for name, told in _splits(header)}
    with cache.disk(), locked(cache.locks / header["hash"]):
        mirror.mkdir(exist_ok=True)
        for name, sha256 in {**tables, "tokenizer.model": header["tokenizer"]["sha256"]}.items():
            file, part = mirror / name, mirror / f".{name}.part"
            if not file.exists() or file_sha256(file) != sha256:
                _bring(Wanted(join(url, name), sha256=sha256), part, cache)
                part.replace(file)
        part = mirror / ".manifest.json.part"
        part.write_bytes(content)
        part.replace(mirror / "manifest.json")
    return mirror


def _bring(wanted: Wanted, part: Path, cache: Cache) -> None:
    try:
        fetch(wanted, part, cache.patience)
    except FetchFailed as e:
        raise DataError(
            str(e),
            "a source's URL names a folder written by `prepare`, with manifest.json, its tables "
            "and tokenizer.model in it",
            "check the URL and what lies there; a URL that needs keys takes them from its command "
            "(curl: ~/.netrc; aws, gsutil: their own set-up)",
        ) from e


def _splits(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(header["splits"].items())


def _require_plain(url: str, header: dict[str, Any]) -> None:
    """Raises DataError for names that could lead outside the folder or into a command."""
    sums = [header["hash"], header["tokenizer"]["sha256"]]
    names = []
    for name, told in _splits(header):
        names += [name, *(shard["file"] for shard in told["shards"])]
        sums += [told["members_sha256"], *(shard["sha256"] for shard in told["shards"])]
    wrong = [n for n in names if not NAME.fullmatch(n)] + [s for s in sums if not HEX.fullmatch(s)]
    if wrong:
        raise DataError(
            f"source {shown(url)}: its manifest holds {wrong[0]!r}",
            "files lie in the folder itself, under plain names and sha256 checksums",
            "prepare the folder anew",
        )


def _require_room(url: str, manifest: Manifest, cache: Cache) -> None:
    sizes = sorted(s.bytes for split in manifest.splits.values() for s in split.shards)
    need = sum(sizes[-2 * WINDOW :])
    if need > cache.limit:
        raise ConfigError(
            f"data.cache.gib={cache.limit / 2**30:g}, source {shown(url)}: two windows of "
            f"{WINDOW} shards are {need / 2**30:.3g} GiB",
            "the cache holds the window of shards in use and the next one",
            f"set data.cache.gib to {1.05 * need / 2**30:.3g} or more for this source, or prepare "
            "smaller shards",
        )
