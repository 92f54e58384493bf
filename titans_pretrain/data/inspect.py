"""Prepared folders and shards in words, for `titans-pretrain inspect`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titans_pretrain.config import ALIGNMENTS
from titans_pretrain.data.lengths import SHARDS, beginnings, describe_lengths, read_lengths
from titans_pretrain.data.manifest import Manifest, Split, load_manifest
from titans_pretrain.data.shards import BlockReader, member_name, open_shard, verify_shard
from titans_pretrain.errors import ConfigError, DataError


def describe_manifest(
    path: str | Path,
    verify: bool = False,
    samples: int = 3,
    sequence_length: int | None = None,
    shards: int = SHARDS,
) -> str:
    """A prepared folder in words.

    `verify` compares every shard with its sha256; `samples` documents of each split are shown;
    `sequence_length` adds how rows of that length are filled; at most `shards` shards of a split
    are opened for lengths and samples. Raises DataError.
    """
    manifest = load_manifest(path)
    lines = [*summary(manifest), "", *_padding(manifest, sequence_length)]
    for name, split in manifest.splits.items():
        if not split.documents:
            continue
        reader = BlockReader(manifest, name, 1, 1)
        found = read_lengths(reader, shards)
        lines += ["", *describe_lengths(name, found, len(split.members))]
        if sequence_length is not None:
            long = found.documents[found.documents > sequence_length]
            share = len(long) / len(found.documents), long.sum() / found.documents.sum()
            lines.append(
                f"  longer than a row of {sequence_length:,}: {share[0]:.2%} of the documents, "
                f"{share[1]:.2%} of the tokens"
            )
        lines += beginnings(manifest, reader, found, samples) if samples else []
        reader.close()
    if verify:
        for split in manifest.splits.values():
            for shard in split.shards:
                verify_shard(manifest.folder, shard)
        manifest.tokenizer()
        lines.append("  every shard and the tokenizer have the manifest's sha256")
    return "\n".join(lines)


def summary(manifest: Manifest) -> Iterator[str]:
    """What the manifest tells without a look into the shards."""
    header, tokenizer = manifest.header, manifest.header["tokenizer"]
    kind = tokenizer.get("kind", "sentencepiece")
    whole = sum(split.tokens for split in manifest.splits.values())
    size, inputs = header["text_bytes"], header["identity"]["inputs"]["files"]
    content = f"{size // 4:,} integers" if kind == "integers" else f"{size / 1e6:,.1f} MB"
    density = f"{size / max(whole, 1):.3f} bytes per token, " if kind == "sentencepiece" else ""
    yield f"prepared folder {manifest.folder} (manifest {manifest.hash[:16]}...)"
    yield (
        f"  {header['documents']:,} documents, {content} from {inputs:,} file(s); "
        f"{header['skipped']['documents']:,} documents skipped"
    )
    yield (
        f"  tokenizer: {kind} {tokenizer['sha256'][:16]}..., {tokenizer['vocab_size']:,} ids, "
        f"bos {tokenizer['bos']}, eos {tokenizer['eos']}, pad {tokenizer['pad']}"
    )
    yield f"  {density}{tokenizer['unknown_tokens']:,} unknown tokens"
    for where, why in header["skipped"]["first"][:10]:
        yield f"  skipped {where}: {why}"
    yield ""
    yield (
        f"  {'split':<12} {'documents':>13} {'tokens':>17} {'share':>7} {'a document':>11} "
        f"{'members':>9} {'shards':>7} {'MB':>11}"
    )
    for name, split in manifest.splits.items():
        share, mean = split.tokens / max(whole, 1), split.tokens / max(split.documents, 1)
        yield (
            f"  {name:<12} {split.documents:>13,} {split.tokens:>17,} {share:>7.2%} {mean:>11,.0f} "
            f"{len(split.members):>9,} {len(split.shards):>7,} "
            f"{sum(s.bytes for s in split.shards) / 1e6:>11,.1f}"
        )


def _padding(manifest: Manifest, sequence_length: int | None) -> Iterator[str]:
    """Pads by alignment; with a row's length, the rows and how much of them is tokens. Exact:
    from the table of members."""
    splits = {name: split for name, split in manifest.splits.items() if split.tokens}
    if sequence_length is not None and sequence_length < 1:
        raise ConfigError(f"--sequence-length {sequence_length}", "rows hold tokens", "e.g. 4096")
    rows = "" if sequence_length is None else f"; rows of {sequence_length:,} tokens"
    yield f"  pads, where each document is padded to a multiple of the memory's chunk{rows}"
    head = f"  {'chunk':>7}"
    for name in splits:
        head += f" {name:>14}"
        if sequence_length is not None:
            head += f" {'rows':>14} {'filled':>8}"
    yield head
    for align in ALIGNMENTS:
        if sequence_length is None or sequence_length % align == 0:
            cells = (_pads(split, align, sequence_length) for split in splits.values())
            yield f"  {align:>7,}" + "".join(cells)


def _pads(split: Split, align: int, sequence_length: int | None) -> str:
    padded = int(split.padded_ends(align)[-1])
    cell = f" {padded / split.tokens - 1:>14.2%}"
    if sequence_length is None:
        return cell
    rows = int(split.blocks(sequence_length, align).sum())
    return f"{cell} {rows:>14,} {split.tokens / (rows * sequence_length):>8.2%}"


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

    count = min(64, int(rows[0]["tokens"]))
    ids = np.frombuffer(
        os.pread(file, count * manifest.dtype.itemsize, int(rows[0]["tok"])), manifest.dtype
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
