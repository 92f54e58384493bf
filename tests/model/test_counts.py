"""Parameters and FLOPs by formula against the modules and torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.model.helpers import CASES, config_of, hot_model, tokens_like
from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.packing import plan_documents
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.model.variants import VARIANTS

LENGTH = 24  # whole segments and chunks in every case


def part_of(name: str) -> str:
    for part in ("embedding", "head", "mlp"):
        if name.startswith(part + ".") or f".{part}." in name:
            return part
    if name == "final_norm.weight" or name.endswith(("mixer_norm.weight", "mlp_norm.weight")):
        return "norms"
    if ".attention" in name:
        return "attention"
    return "fast_init" if ".initial." in name else "memory"


@pytest.mark.parametrize("case", CASES)
def test_parameters_by_part(case: str) -> None:
    config = config_of(case, mlp_width=40)
    counted = dict.fromkeys(parameter_count(config), 0)
    for name, p in TitansLM(config, device="meta").named_parameters():
        counted[part_of(name)] += p.numel()
    assert parameter_count(config) == counted


def _matmul(_c, a, b, *_, out_shape=None, **__):
    return 2 * out_shape[0] * out_shape[1] * out_shape[2] * a[2]


def _attention(q, k, v, *_, out_shape=None, **__):
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def left_out(config: ModelConfig) -> float:
    """Of one block: [[b, c], [0, h]] times (W, S), and Q = L E and c = L h, for each chunk."""
    if config.variant == "transformer":
        return 0
    chunk, m = config.memory.chunk, config.memory.expansion
    d, layers = config.head_width, config.memory.depth
    weights = d * d if layers == 1 else 2 * m * d * d + (layers - 2) * (m * d) ** 2
    each = 2 * 2 * 2 * weights + layers * (2 * chunk**3 + 2 * chunk**2)
    return config.heads * (LENGTH // chunk + prefix_chunks(config)) * each


def prefix_chunks(config: ModelConfig) -> int:
    """Chunks of persistent tokens that the memory runs over."""
    rows = config.persistent_tokens if config.variant in ("mag", "mal") else 0
    return -(-rows // config.memory.chunk)


COUNTED = {
    torch.ops.aten.baddbmm_: _matmul,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


@pytest.mark.parametrize("case", CASES)
def test_flops_equal_the_counter(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(tokens_like(positions), positions, carry=False)
    expected = flops_per_token(config, LENGTH)
    total = sum(expected.values()) * LENGTH + config.blocks * left_out(config)
    assert counter.get_total_flops() == pytest.approx(total, rel=1e-12)
    by_module = {
        "mlp": sum(
            sum(counter.get_flop_counts()[f"TitansLM.blocks.{i}.mlp"].values()) for i in (0, 1)
        ),
        "head": sum(counter.get_flop_counts()["TitansLM.head"].values()),
    }
    for part, flops in by_module.items():
        assert flops == expected[part] * LENGTH


@pytest.mark.parametrize("case", CASES)
def test_useful_flops_count_the_pairs_that_masks_let_through(case: str) -> None:
    config = config_of(case)
    positions = torch.arange(LENGTH)[None]
    plan = VARIANTS[config.variant].plan(config, positions, None, torch.zeros(1))
    executed = flops_per_token(config, LENGTH)
    useful = flops_per_token(config, LENGTH, useful=True)
    per_pair = 4 * config.width * config.blocks
    if config.variant == "transformer":
        mask = torch.ones(LENGTH, LENGTH).tril() if plan.mask is None else plan.mask == 0
        assert useful["attention"] * LENGTH == per_pair * int(mask.sum())
    if config.variant in ("mag", "mal"):
        mask = torch.ones(LENGTH, LENGTH).tril()
        if plan.attention.mask is not None:
            mask = plan.attention.mask.expand(-1, 1, LENGTH, -1) == 0
        assert useful["attention"] * LENGTH == pytest.approx(per_pair * int(mask.sum()))
    if config.variant == "mac":
        pairs = sum(int((step.mask == 0).sum()) for step in plan.steps)
        assert useful["attention"] * LENGTH == pytest.approx(per_pair * pairs)
    if config.variant != "transformer":
        chunk = config.memory.chunk
        memory = plan_documents(positions, chunk)
        chunks = memory.offsets[-1] + prefix_chunks(config)
        shapes = [tuple(w.shape[1:]) for w in hot_model(config).blocks["0"].mixer.memory.initial]
        masked = chunks * chunk * (chunk - 1) // 2 * 2 * sum(a + o for a, o in shapes)
        saved = config.blocks * config.heads * masked
        assert (executed["memory"] - useful["memory"]) * LENGTH == pytest.approx(saved)


def test_the_memory_of_the_paper_costs_what_the_specification_says() -> None:
    """22 C d h + 4 C^2 (d + h) a chunk and head (decay to zero)."""
    config = ModelConfig(variant="lmm", blocks=1, width=64, heads=1, vocab_size=2)
    config = config.model_copy(
        update={"memory": config.memory.model_copy(update={"decay_to": "zero"})}
    )
    c, d, h = 16, 64, 256
    per_chunk = flops_per_token(config, 64)["memory"] * c
    assert per_chunk == 22 * c * d * h + 4 * c * c * (d + h)
