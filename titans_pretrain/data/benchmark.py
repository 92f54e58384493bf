"""`titans-pretrain bench data`: how fast shards become rows, next to stock WebDataset reading.

All figures are of one process and its CPU time ("a core"), side by side in one run, on synthetic
documents whose lengths are exponential with a mean of 500 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.manifest import MEMBER, Split, write_manifest
from titans_pretrain.data.pack import ShardWriter

MEAN, VOCAB, LENGTH, ALIGN, ROWS = 500, 32_000, 4096, 16, 8
TARGET = 20e6  # tokens/s a core
SEEK = 1.0  # seconds to the first batch at sample 10^6, or at sample 10^9 of a mix
# Of three sources: a ramp as long as the seek, one of a million samples and a constant.
WEIGHTS: list[Any] = [[[0, 0.7], [10**9, 0.1]], [[0, 0.0], [10**6, 0.5]], 0.3]


def main(argv: list[str] | None = None) -> int:
    """Prints the figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(prog="titans-pretrain bench data")
    parser.add_argument("--tokens", type=int, default=1 << 26, help="of synthetic text")
    parser.add_argument("--folder", help="keep the synthetic shards here (default: temporary)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(folder, args.tokens)
    seek = max(figures["seek_s"], figures["seek_mixed_s"])
    met = figures["stream_tokens_per_s"] >= TARGET and seek < SEEK
    if args.json:
        print(json.dumps({**figures, "met": met}))
    else:
        print(_words(figures))
    return 0 if met else 1


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Writes `tokens` synthetic tokens to `folder` in both formats and reads them."""
    three = [folder / f"source-{n}" for n in range(3)]
    for seed, (part, amount) in enumerate([(folder, tokens), *((s, tokens // 16) for s in three)]):
        if not (part / "manifest.json").exists():
            part.mkdir(exist_ok=True)
            _write(part, amount, seed)
    mixed = {s.name: {"path": str(s), "weight": w} for s, w in zip(three, WEIGHTS)}
    packed = sorted(str(p) for p in folder.glob("train-*.tar"))
    single = str(folder / "one-document-a-member.tar")
    figures = {
        "tokens": float(tokens),
        "stream_tokens_per_s": _rate(_stream(_data(folder)), tokens),
        "mixed_tokens_per_s": _rate(_stream(_of(mixed)), tokens),
        "stock_packed_tokens_per_s": _rate(lambda: _stock(packed), tokens),
        "stock_single_tokens_per_s": _rate(lambda: _stock([single]), tokens // 8),
        "seek_s": _seek(_data(folder), 10**6),
        "seek_mixed_s": _seek(_of(mixed), 10**9),
    }
    figures["ratio_to_stock_single"] = (
        figures["stream_tokens_per_s"] / figures["stock_single_tokens_per_s"]
    )
    return figures


def _documents(tokens: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    while tokens > 0:
        length = 2 + int(random.exponential(MEAN - 2))
        tokens -= length
        yield random.integers(4, VOCAB, length, dtype=np.uint16)


def _write(folder: Path, tokens: int, seed: int) -> None:
    import webdataset

    dtype = np.dtype("<u2")
    writer = ShardWriter(folder, "train", dtype, 1 << 20, 1 << 24)
    single = webdataset.TarWriter(str(folder / "one-document-a-member.tar"), encoder=False)
    for number, document in enumerate(_documents(tokens, seed)):
        writer.add(document)
        if number * MEAN < tokens // 8:
            single.write({"__key__": f"{number:09d}", "tok": document.tobytes()})
    single.close()
    shards, members = writer.close()
    special = {"bos": 1, "eos": 2, "pad": 3, "unk": 0, "unknown_tokens": 0}
    header: dict[str, Any] = {
        "identity": {"inputs": {"files": 0}},
        "tokenizer": {"sha256": "synthetic", "vocab_size": VOCAB, **special},
        "dtype": dtype.str,
        "documents": 0,
        "text_bytes": 0,
        "skipped": {"documents": 0, "first": []},
    }
    splits = {"train": Split(shards, members), "validation": Split([], np.zeros(0, MEMBER))}
    write_manifest(folder, header, splits)


def _data(folder: Path) -> DataConfig:
    return _of({"synthetic": {"path": str(folder)}})


def _of(sources: dict[str, Any]) -> DataConfig:
    return DataConfig.model_validate({"sources": sources, "sequence_length": LENGTH, "workers": 0})


def _stream(data: DataConfig) -> Callable[[], Iterator[int]]:
    from titans_pretrain.data.stream import TrainStream

    def read() -> Iterator[int]:
        stream = TrainStream(data, global_batch=ROWS, micro_batch=ROWS, align=ALIGN)
        for _ in stream.batches(stream.start()):
            yield ROWS * LENGTH

    return read


def _stock(urls: list[str]) -> Iterator[int]:
    import webdataset

    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        yield len(np.frombuffer(sample["tok"], "<u2").astype(np.int64))


def _rate(read: Callable[[], Iterator[int]], tokens: int) -> float:
    """Tokens per second of CPU time, over `tokens` tokens, opening included."""
    begun = time.process_time()
    done = 0
    for count in read():
        done += count
        if done >= tokens:
            break
    return done / (time.process_time() - begun)


def _seek(data: DataConfig, sample: int) -> float:
    """Seconds from nothing to the batch at `sample`."""
    from titans_pretrain.data.stream import TrainStream

    begun = time.perf_counter()
    stream = TrainStream(data, global_batch=ROWS, micro_batch=ROWS, align=ALIGN)
    next(stream.batches({**stream.start(), "next_sample": sample}))
    return time.perf_counter() - begun


def _words(figures: dict[str, float]) -> str:
    rate = {k: f"{v / 1e6:8.1f} M tokens/s a core" for k, v in figures.items()}
    return "\n".join(
        [
            f"rows of {LENGTH} tokens, documents of mean {MEAN} padded to {ALIGN}:",
            f"  this stream, shuffled blocks      {rate['stream_tokens_per_s']} "
            f"(target {TARGET / 1e6:.0f})",
            f"  three sources mixed               {rate['mixed_tokens_per_s']}",
            f"  stock WebDataset, same shards     {rate['stock_packed_tokens_per_s']} "
            "(in file order, no rows)",
            f"  stock WebDataset, one document a member "
            f"{rate['stock_single_tokens_per_s'].strip()}",
            f"  ratio to one document a member    {figures['ratio_to_stock_single']:8.1f}",
            f"  seek to sample 10^6               {figures['seek_s']:8.3f} s (target {SEEK})",
            f"  seek to sample 10^9 of the mix    {figures['seek_mixed_s']:8.3f} s (target {SEEK})",
        ]
    )
