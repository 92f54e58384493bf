"""Unigram and bigram losses against plain counting over the tar files."""

import json
import math
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from titans_pretrain import cli
from titans_pretrain.data import baselines as module
from titans_pretrain.data.baselines import baselines
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.errors import DataError
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics

TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "demo.model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("baselines")
    sentence = "the whale swam past the old ship and the captain said nothing of it"
    words = sentence.split()
    texts = [
        " ".join(words[(n * k) % len(words)] for k in range(1, 5 + n)) + "." for n in range(60)
    ]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    prepare = ["prepare", str(root / "text.jsonl"), "--tokenizer", str(TOKENIZER)]
    out = root / "out"
    assert cli.main([*prepare, "--out", str(out), "--workers", "1", "--validation", "0.2"]) == 0
    return out


def _documents(folder, split):
    dtype = load_manifest(folder).dtype
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar}
        for name in sorted(n for n in content if n.endswith(".tok")):
            tokens = np.frombuffer(content[name], dtype).tolist()
            for length in np.frombuffer(content[name[:-4] + ".len"], "<u4").tolist():
                yield tokens[:length]
                tokens = tokens[length:]


def test_losses_are_those_of_plain_counting(folder, monkeypatch):
    monkeypatch.setattr(module, "_ROW", 64)  # documents cut at the ends of rows too
    vocabulary = load_manifest(folder).vocab_size
    single, pair, context = Counter(), Counter(), Counter()
    for document in _documents(folder, "train"):
        for a, b in pairwise(document):
            single[b] += 1
            pair[a, b] += 1
            context[a] += 1
    total = sum(single.values()) + vocabulary
    asked = [p for d in _documents(folder, "validation") for p in pairwise(d)]
    assert len(asked) > 200

    def one(b):
        return (single[b] + 1) / total

    def loss(m):
        terms = [math.log((pair[a, b] + m * one(b)) / (context[a] + m)) for a, b in asked]
        return -sum(terms) / len(terms)

    expected = {
        "unigram": -sum(math.log(one(b)) for _, b in asked) / len(asked),
        "bigram": min(loss(m) for m in module.STRENGTHS),
    }
    found = baselines(folder)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found["bigram"] < found["unigram"] < math.log(vocabulary)


def test_the_limit_bounds_what_is_counted(folder):
    full, cut = baselines(folder), baselines(folder, limit=100)
    assert cut["unigram"] > full["unigram"]


def test_plot_draws_the_baselines_of_the_runs_data(folder, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        f"folder: {tmp_path}\ndata:\n  sources: {{it: {{path: {folder}}}}}\n"
    )
    with Metrics(RunFolder(tmp_path), 0, False) as metrics:
        metrics.write(1, 10, {"train/loss": 3.5, "validation/loss": 3.25})
    assert cli.main(["plot", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for name, loss in baselines(folder).items():
        side = "above" if loss > 3.25 else "below"
        assert f"{name} baseline: {loss:.4f} ({abs(loss - 3.25):.4f} {side} the run)" in told


def test_a_folder_that_is_not_prepared_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        baselines(tmp_path)
