"""The sizes of configs/titans-*.yaml: the paper's dimensions, and what their headers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.prepared import ROOT
from titans_pretrain.config import RunConfig, load_config
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.estimate.choose import GIB, judge
from titans_pretrain.estimate.hardware import hardware_of
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.layout import plan_layout

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
def test_the_header_s_duration_is_the_plan_s(size: str) -> None:
    told = " ".join(line.lstrip("# ") for line in header(size).splitlines())
    [parts] = re.findall(r"Duration: mac about (.*?)\.? By `titans-pretrain plan`", told)
    found = re.findall(r"(\d+) hours on (\d+)(?: H100s)?(?: with ([\w.=]+))?,? ?(\d+) GiB", parts)
    assert len(found) == parts.count("hours")
    for hours, gpus, override, gib in found:
        config = load_config(path(size), override.split())
        plan = judge(config, plan_layout(config, int(gpus)), hardware_of("h100"))
        assert plan.fits
        assert f"{plan.held.device / GIB:.0f}" == gib
        tokens = config.train.all_rows() * config.data.sequence_length
        assert f"{24 * plan.days(tokens):.0f}" == hours


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_variant_fits_into_80_gib(size: str, variant: str) -> None:
    config = load(size, variant)
    gpus = 512 if size == "1.3b" else 8
    for gpu in ("a100", "h100"):
        assert judge(config, plan_layout(config, gpus), hardware_of(gpu)).fits
