"""The sizes of configs/titans-*.yaml: the paper's dimensions, and what their headers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.prepared import ROOT
from titans_pretrain.config import RunConfig, load_config
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.model.titans import TitansLM

# Titans, table of sizes (NeurIPS 2025 version, appendix E); the 400M is of our own choice.
SIZES = {  # blocks, width, heads, peak rate, tokens
    "170m": (12, 768, 16, 3e-3, 15e9),
    "340m": (24, 1024, 16, 1.5e-3, 15e9),
    "400m": (28, 1024, 16, 4e-4, 15e9),
    "760m": (24, 1536, 16, 1.25e-3, 30e9),
    "1.3b": (18, 2048, 8, 7e-4, 100e9),
}
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")


def path(size: str) -> Path:
    return ROOT / "configs" / f"titans-{size}.yaml"


def header(size: str) -> str:
    return path(size).read_text(encoding="utf-8").split("\nfolder:")[0]


def load(size: str, variant: str = "mac") -> RunConfig:
    return load_config(path(size), [f"model.variant={variant}"])


def training_flops(config: RunConfig) -> float:
    """Of a token: forward and twice that backward, without recompute."""
    return 3 * sum(flops_per_token(config.model, config.data.sequence_length).values())


@pytest.mark.parametrize("size", SIZES)
def test_dimensions_and_recipe_are_the_paper_s(size: str) -> None:
    config = load(size)
    m, o, t = config.model, config.optim, config.train
    blocks, width, heads, rate, tokens = SIZES[size]
    assert (m.blocks, m.width, m.heads, o.lr) == (blocks, width, heads, rate)
    batch = t.global_batch * config.data.sequence_length
    assert (batch, t.steps) == (2**19, tokens // 2**19)
    assert (m.persistent_tokens, m.segment, m.memory.chunk) == (128, 512, 16)
    windows = {v: load(size, v).model.attention_window for v in VARIANTS}
    assert (windows["mag"], windows["mal"], windows["transformer"]) == (2048, 2048, None)
    assert (o.schedule, o.weight_decay, t.precision) == ("cosine", 0.1, "bf16")
    assert o.min_lr == pytest.approx(o.lr / 10)
    tokenizer = Tokenizer.load(ROOT / "tokenizers" / "titans-32k.model")
    assert m.vocab_size == tokenizer.vocab_size == 32_000


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_header_counts_what_the_model_has(size: str, variant: str) -> None:
    config = load(size, variant)
    [row] = re.findall(rf"^#   {variant} +([\d,]+) +([\d.]+) +([\d.]+|-)$", header(size), re.M)
    parameters = int(row[0].replace(",", ""))
    model = TitansLM(config.model, device="meta")
    assert parameters == sum(p.numel() for p in model.parameters())
    assert parameters == sum(parameter_count(config.model).values())
    assert row[1] == f"{training_flops(config) / 1e9:.3f}"


@pytest.mark.parametrize("size", SIZES)
def test_the_header_s_duration_follows_from_its_arithmetic(size: str) -> None:
    config = load(size)
    told = re.search(
        r"about ([\d.]+) (hours|days) on (\d+) GPUs\. An estimate, never measured:\n"
        r"#\s+([\d.]+) GFLOP( x 4/3 \(recompute\))? x (\d+)e9 tokens / \((\d+) x 50 TFLOP/s\)",
        header(size),
    )
    assert told is not None
    time, unit, gpus, gflop, recompute, tokens, divided = told.groups()
    assert gflop == f"{training_flops(config) / 1e9:.3f}"
    assert bool(recompute) == (config.train.recompute == "blocks")
    assert (float(tokens) * 1e9, gpus) == (SIZES[size][4], divided)
    work = float(gflop) * 1e9 * (4 / 3 if recompute else 1) * float(tokens) * 1e9
    hours = work / (int(gpus) * 50e12) / 3600
    assert time == (f"{hours:.0f}" if unit == "hours" else f"{hours / 24:.1f}")
