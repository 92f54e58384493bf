"""Unigram and bigram losses against plain counting over the tar files."""

import json
import math
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.made import data, made
from tests.data.oracle import data_config
from titans_pretrain import cli
from titans_pretrain.data import baselines as module
from titans_pretrain.data.baselines import baselines, fit_baselines
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.data.validation import validation_batches
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


@pytest.mark.parametrize("length", [64, 4096])  # documents cut at the ends of rows, or whole
def test_losses_are_those_of_plain_counting(folder, length):
    vocabulary = load_manifest(folder).vocab_size
    documents = list(_documents(folder, "train"))
    asked = [p for d in _documents(folder, "validation") for p in pairwise(d)]
    assert len(asked) > 200

    def count(chosen):
        pair = Counter(p for d in chosen for p in pairwise(d))
        context, single = Counter(), Counter()
        for (a, b), n in pair.items():
            context[a] += n
            single[b] += n
        total = sum(pair.values())

        def parts(a, b):
            bigram = pair[a, b] / context[a] if context[a] else 0.0
            return bigram, single[b] / total, 1 / vocabulary

        return parts, single, total

    first, _, _ = count([d for n, d in enumerate(documents) if n % 20 != 19])
    held_in = [p for n, d in enumerate(documents) if n % 20 == 19 for p in pairwise(d)]
    weights = [1 / 3] * 3
    for _ in range(module.STEPS):
        gained = [0.0] * 3
        for a, b in held_in:
            shares = [w * p for w, p in zip(weights, first(a, b))]
            gained = [g + s / sum(shares) for g, s in zip(gained, shares)]
        weights = [g / len(held_in) for g in gained]

    weights = [max(w, 1e-6) for w in weights]
    weights = [w / sum(weights) for w in weights]
    parts, single, total = count(documents)
    mixed = [sum(w * p for w, p in zip(weights, parts(a, b))) for a, b in asked]
    expected = {
        "unigram": -sum(math.log((single[b] + 1) / (total + vocabulary)) for _, b in asked),
        "bigram": -sum(math.log(p) for p in mixed),
    }
    found = fit_baselines(data_config(folder, sequence_length=length))
    assert found.labels == len(asked)
    assert found.weights == pytest.approx(weights, rel=1e-9)
    assert found.unigram == pytest.approx(expected["unigram"] / len(asked), rel=1e-12)
    assert found.bigram == pytest.approx(expected["bigram"] / len(asked), rel=1e-9)
    assert found.bigram < found.unigram < math.log(vocabulary)


def test_judged_on_the_labels_that_the_validation_stream_counts(folder):
    labels = 0
    for batch in validation_batches(
        load_manifest(folder), data_config(folder), micro_batch=2, align=16, rows=3
    ):
        labels += int(batch.loss_mask.sum())
    assert fit_baselines(data_config(folder), align=16, rows=3).labels == labels > 100


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


def test_several_sources_add_their_counts_and_several_sets_their_labels(tmp_path):
    """Two sources that share no token: what one knows is no use for the other's set."""
    ranges = {"low": (4, 6), "high": (100, 104), "mixed": (4, 200)}
    for seed, (name, (low, high)) in enumerate(ranges.items()):
        made(tmp_path / name, 4000, seed, low=low, high=high)

    def fit(weights, sets, samples=10**6):
        return fit_baselines(
            data(
                {name: (tmp_path / name, w) for name, w in weights.items()},
                validation={name: {"path": str(tmp_path / name)} for name in sets},
            ),
            samples=samples,
            limit=3000,
        )

    sets = {name: fit({"low": 1.0, "high": 1.0}, [name]) for name in ("low", "high", "mixed")}
    assert sets["low"].bigram == pytest.approx(math.log(2), abs=0.02)
    assert sets["high"].bigram == pytest.approx(math.log(4), abs=0.05)
    assert sets["low"].unigram == pytest.approx(math.log(2 * 2), abs=0.1)  # half of all tokens
    pooled = fit({"low": 1.0, "high": 1.0}, sets)
    assert pooled.labels == sum(one.labels for one in sets.values())
    for kind in ("unigram", "bigram"):
        total = sum(getattr(one, kind) * one.labels for one in sets.values())
        assert getattr(pooled, kind) == pytest.approx(total / pooled.labels, rel=1e-12)
    default = fit({"low": 1.0, "high": 1.0}, [])
    assert default.labels == sets["low"].labels + sets["high"].labels
    # A share of nine tenths is read, and counted, nine times as often.
    weighted = fit({"low": 9.0, "high": 1.0}, ["low"])
    assert weighted.unigram == pytest.approx(math.log(2 / 0.9), abs=0.1)
    # A source that the run never comes to is not counted.
    late = fit({"low": 1.0, "high": [[0, 0.0], [10**7, 0.0], [10**8, 1.0]]}, ["high"])
    assert late.bigram > math.log(190)


def test_a_folder_that_is_not_prepared_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        baselines(tmp_path)
