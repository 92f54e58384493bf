from pathlib import Path

import pytest

from tests.data.oracle import write_corpus
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.tokens import Tokenizer

ROOT = Path(__file__).parents[2]


def quiet(_line):
    pass


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(ROOT / "tokenizers" / "demo.model")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """120 documents in one JSONL file, and their texts."""
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    return path, write_corpus(path, 120)


SETTINGS = Settings(unit_bytes=30_000, member_tokens=4_000, shard_tokens=16_000)


@pytest.fixture(scope="session")
def prepared(corpus, tokenizer, tmp_path_factory):
    """The corpus in several shards of several members."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    manifest = prepare([str(corpus[0])], folder, tokenizer, SETTINGS, say=quiet)
    assert len(manifest.splits["train"].shards) >= 4
    return folder
