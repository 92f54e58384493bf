"""Prepared folders made of random token ids, quickly: no text, no tokenizer model."""

from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.config import DataConfig
from titans_pretrain.data.manifest import Manifest, Split, write_manifest
from titans_pretrain.data.pack import ShardWriter

VOCAB = 200


def made(
    folder: Path,
    tokens: int,
    seed: int = 0,
    validation: int = 300,
    tokenizer: str = "made",
    low: int = 4,
    high: int = VOCAB,
) -> Manifest:
    """Writes about `tokens` and `validation` random tokens from low..high-1 in short documents."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    splits = {}
    for name, amount in (("train", tokens), ("validation", validation)):
        writer = ShardWriter(folder, name, np.dtype("<u2"), 500, 2000)
        while amount > 0:
            length = int(draw.integers(2, 90))
            writer.add(draw.integers(low, high, length, dtype=np.uint16))
            amount -= length
        splits[name] = Split(*writer.close())
    special = {"bos": 1, "eos": 2, "pad": 3, "unk": 0, "unknown_tokens": 0}
    header: dict[str, Any] = {
        "identity": {"inputs": {"files": 0}},
        "tokenizer": {"sha256": tokenizer, "vocab_size": VOCAB, **special},
        "dtype": "<u2",
        "documents": 0,
        "text_bytes": 0,
        "skipped": {"documents": 0, "first": []},
    }
    return write_manifest(folder, header, splits)


def data(sources: dict[str, Any], **more: Any) -> DataConfig:
    """`sources`: name -> folder, or (folder, weight)."""
    tree = {
        name: {"path": str(s[0]), "weight": s[1]} if isinstance(s, tuple) else {"path": str(s)}
        for name, s in sources.items()
    }
    return DataConfig.model_validate({"sequence_length": 64, "workers": 0, **more, "sources": tree})
