"""Prepared folders and shards in words, for `titans-pretrain inspect`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from titans_pretrain.config import ALIGNMENTS
from titans_pretrain.data.manifest import Manifest, Split, load_manifest
from titans_pretrain.data.shards import member_name, open_shard, verify_shard
from titans_pretrain.errors import DataError


def describe_manifest(path: str | Path, verify: bool = False) -> str:
    """A prepared folder in words; `verify` compares every shard with its sha256. DataError."""
    manifest = load_manifest(path)
    header, tokenizer = manifest.header, manifest.header["tokenizer"]
    train, held = manifest.splits["train"], manifest.splits["validation"]
    whole = train.tokens + held.tokens
    lines = [
        f"prepared folder {manifest.folder} (manifest {manifest.hash[:16]}...)",
        f"  {header['documents']:,} documents, {header['text_bytes'] / 1e6:,.1f} MB of text from "
        f"{header['identity']['inputs']['files']:,} file(s); "
        f"{header['skipped']['documents']:,} documents skipped",
        f"  tokenizer {tokenizer['sha256'][:16]}..., {tokenizer['vocab_size']:,} pieces, "
        f"bos {tokenizer['bos']}, eos {tokenizer['eos']}, pad {tokenizer['pad']}; "
        f"{header['text_bytes'] / max(whole, 1):.3f} bytes per token; "
        f"{tokenizer['unknown_tokens']:,} unknown tokens",
    ]
    for name, split in manifest.splits.items():
        lines.append(f"  {name}: {_describe_split(split, whole)}")
    waste = [f"{a}: {train.padded_ends(a)[-1] / train.tokens - 1:.2%}" for a in ALIGNMENTS]
    lines.append("  pads of the train split by alignment: " + ", ".join(waste))
    lines += [f"  skipped {where}: {why}" for where, why in header["skipped"]["first"][:10]]
    if verify:
        for split in manifest.splits.values():
            for shard in split.shards:
                verify_shard(manifest.folder, shard)
        manifest.tokenizer()
        lines.append("  every shard and the tokenizer have the manifest's sha256")
    return "\n".join(lines)


def _describe_split(split: Split, whole: int) -> str:
    mean = split.tokens / max(split.documents, 1)
    return (
        f"{split.documents:,} documents, {split.tokens:,} tokens ({split.tokens / whole:.2%}), "
        f"{mean:,.0f} a document; {len(split.members):,} members in {len(split.shards):,} "
        f"shard(s), {sum(s.bytes for s in split.shards) / 1e6:,.1f} MB"
    )


def describe_shard(path: str | Path) -> str:
    """One shard of a prepared folder in words: its members and its first words. DataError."""
    path = Path(path)
    manifest = load_manifest(path.parent)
    split, number = _find(manifest, path.name)
    shard = split.shards[number]
    verify_shard(manifest.folder, shard)
    file = open_shard(manifest.folder, shard)
    rows = split.members[split.first_member[number] : split.first_member[number + 1]]
    lines = [
        f"shard {path}: {shard.documents:,} documents, {shard.tokens:,} tokens, {shard.bytes:,} "
        f"bytes, {len(rows)} members; sha256 as in the manifest"
    ]
    for row in rows[:20]:
        lines.append(
            f"  {member_name(file, int(row['len']))}: {int(row['documents']):,} documents, "
            f"{int(row['tokens']):,} tokens at byte {int(row['tok']):,}"
        )
    if len(rows) > 20:
        lines.append(f"  and {len(rows) - 20} more members")

    ids = np.frombuffer(
        os.pread(file, 64 * manifest.dtype.itemsize, int(rows[0]["tok"])), manifest.dtype
    )
    os.close(file)
    lines.append(f"  begins: {manifest.tokenizer().decode(ids)!r}")
    return "\n".join(lines)


def _find(manifest: Manifest, name: str) -> tuple[Split, int]:
    for split in manifest.splits.values():
        for number, shard in enumerate(split.shards):
            if shard.file == name:
                return split, number
    raise DataError(
        f"{manifest.folder / name} is not in the folder's manifest",
        "a shard belongs to the manifest beside it",
        "give a shard that the manifest lists",
    )
