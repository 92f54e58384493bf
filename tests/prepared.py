"""A small prepared dataset from the shipped corpus: several members and shards, long documents."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.cli import main

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "configs" / "corpus" / "books.jsonl.xz"
TOKENIZER = ROOT / "tokenizers" / "demo.model"


def short_text(text: Path, documents: int = 40) -> Path:
    """Writes chapters cut to a few hundred characters each (one is kept whole) as JSON lines."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as source, text.open("w") as out:
        for i, line in zip(range(documents), source):
            whole = json.loads(line)["text"]
            cut = whole if i == 3 else whole[: 200 + 37 * i]
            out.write(json.dumps({"text": cut}) + "\n")
    return text


def small_dataset(folder: Path, documents: int = 40) -> Path:
    """Prepares `short_text`."""
    text = short_text(folder / "text.jsonl", documents)
    prepared = folder / "data"
    tokens = ["--member-tokens", "2000", "--shard-tokens", "6000", "--validation", "0.05"]
    arguments = ["prepare", str(text), "--out", str(prepared), "--tokenizer", str(TOKENIZER)]
    assert main([*arguments, *tokens, "--workers", "1"]) == 0
    return prepared


def small_run(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """The tree of a tiny run on `data`; `section__key=value` changes a leaf."""
    tree: dict[str, Any] = {
        "folder": str(folder),
        "model": {
            "variant": "mac",
            "blocks": 2,
            "width": 32,
            "heads": 2,
            "mlp_width": 48,
            "segment": 32,
            "persistent_tokens": 2,
            "memory": {"chunk": 16, "expansion": 2},
        },
        "data": {
            "sources": {"books": {"path": str(data)}},
            "sequence_length": 64,
            "workers": 0,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 5},
        "train": {
            "steps": 100,
            "global_batch": 8,
            "micro_batch": 2,
            "device": "cpu",
            "threads": 1,
        },
        "validation": {"every": 50, "rows": 8},
        "checkpoint": {"every_steps": 0},
        "log": {"memory_every": 0, "tensorboard": False, "sample": {"tokens": 0}},
    }
    for path, value in changes.items():
        *sections, leaf = path.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path
