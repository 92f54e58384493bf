"""First values: the table, and that they depend on the seed and the name alone."""

import math

import pytest
import torch

from tests.model.helpers import CASES, config_of, tokens_like
from titans_pretrain.config import OptimConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.memory.layer import ConvPlan
from titans_pretrain.memory.observe import observe_memory
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM, draw, initialise
from titans_pretrain.run.optim import param_groups


def built(case: str, seed: int = 0, **more: object) -> TitansLM:
    model = TitansLM(config_of(case, **more))
    initialise(model, seed)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_same_values_by_way_of_the_meta_device(case: str) -> None:
    plain = built(case)
    meta = TitansLM(config_of(case), device="meta")
    meta.to_empty(device="cpu")
    for p in meta.parameters():
        p.data.fill_(float("nan"))
    initialise(meta, 0)
    for (name, a), b in zip(plain.named_parameters(), meta.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (meta.head.weight is meta.embedding.weight) == meta.config.tied_embeddings


def test_values_depend_on_name_and_seed_not_on_order_or_depth() -> None:
    torch.manual_seed(1)
    shallow, deep = built("mac", blocks=2), built("mac", blocks=3)
    for name, p in shallow.named_parameters():
        other = deep.get_parameter(name)
        if name.endswith((".o.weight", ".out.weight", ".down.weight")):  # scaled by depth
            other = other * math.sqrt(3 / 2)
        assert torch.allclose(p, other, rtol=1e-6, atol=0), name
    constant = ("norm.weight", "gates.bias", "inner_gain", "inner_bias")
    drawn = [n for n, _ in shallow.named_parameters() if not n.endswith(constant)]
    reseeded = built("mac", seed=1)
    for name in drawn:
        assert not torch.equal(shallow.get_parameter(name), reseeded.get_parameter(name)), name
    first, second = (dict(shallow.blocks[i].named_parameters()) for i in "01")
    assert all(not torch.equal(first[n], second[n]) for n in first if not n.endswith(constant))


def test_a_pruned_stage_draws_what_the_whole_model_draws() -> None:
    whole, stage = built("mac"), TitansLM(config_of("mac"))
    del stage.blocks["0"]
    stage.embedding = None
    initialise(stage, 0)
    for name, p in stage.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name
    positions = torch.arange(9)[None]
    tokens = tokens_like(positions)
    expected, _ = whole(tokens, positions)
    whole.final_norm = whole.head = None
    del whole.blocks["1"]
    hidden, _ = whole(tokens, positions)
    actual, state = stage(hidden, positions)
    assert torch.equal(actual, expected) and list(state) == ["1"]


def test_bfloat16_holds_the_rounded_values() -> None:
    half = TitansLM(config_of("mac"), dtype=torch.bfloat16)
    initialise(half, 0)
    for (name, a), b in zip(built("mac").named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_gates_open_as_intended() -> None:
    """alpha 0.003, eta 0.6, theta a quarter of min(1/64, (1 - eta) / C): medians over tokens."""
    model = built("mac", width=96, heads=3, segment=32, memory={"chunk": 16})
    positions = torch.arange(256).expand(4, -1)
    with torch.no_grad(), observe_memory() as seen:
        model(tokens_like(positions), positions)
    for figures in seen.figures.values():
        assert figures["alpha/p50"] == pytest.approx(0.003, rel=0.1)
        assert figures["eta/p50"] == pytest.approx(0.6, rel=0.05)
        assert figures["theta/p50"] == pytest.approx(0.25 / 64, rel=0.1)
        assert figures["radius"] < 1


def test_theta_never_exceeds_its_ceiling() -> None:
    model = built("lmm", memory={"chunk": 64})
    memory = model.blocks["0"].mixer.memory
    rates = memory.rates(100 * torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0)))
    assert (rates.theta <= torch.clamp((1 - rates.eta) / 64, max=1 / 64)).all()
    assert rates.theta.dtype == torch.float32


def test_spreads_follow_the_table() -> None:
    config = config_of("mac", width=96, heads=2, blocks=8, segment=16)
    small = math.sqrt(2 / (5 * 96))
    for name, shape, std in (
        ("embedding.weight", (500, 96), small),
        ("blocks.3.mixer.attention.q.weight", (96, 96), small),
        ("blocks.3.mixer.memory.out.weight", (96, 96), small / 4),
        ("blocks.3.mixer.attention.o.weight", (96, 96), small / 4),
        ("blocks.3.mlp.down.weight", (96, 256), math.sqrt(2 / (5 * 256)) / 4),
        ("blocks.3.mixer.persistent", (64, 96), small),
        ("blocks.3.mixer.asked", (2, 64, 48), 1.0),
        ("blocks.3.mixer.memory.q_conv.weight", (96, 4), 0.5 / math.sqrt(3)),
        ("blocks.3.mixer.memory.initial.0", (2, 48, 192), math.sqrt(2 / (48 + 192))),
        ("blocks.3.mixer.memory.initial.1", (2, 192, 48), math.sqrt(2 / (48 + 192))),
    ):
        values = draw(config, name, shape, 0)
        assert values.std().item() == pytest.approx(std, rel=0.08), name
        assert abs(values.mean().item()) < 0.1 * std + 1e-4, name
    mal = config_of("mal", width=96, heads=2, blocks=8)
    for name, std in (("memory.out", small), ("attention.o", small / 4), ("memory.q", small)):
        values = draw(mal, f"blocks.3.mixer.{name}.weight", (96, 96), 0)
        assert values.std().item() == pytest.approx(std, rel=0.08), name
    one = draw(config_of("mag"), "blocks.0.mixer.attention_norm.weight", (2, 6), 0)
    assert torch.equal(one, torch.ones(2, 6))
    assert torch.equal(draw(config, "final_norm.weight", (5,), 0), torch.ones(5))
    assert torch.equal(
        draw(config, "blocks.1.mixer.memory.inner_bias", (2, 3), 0), torch.zeros(2, 3)
    )
    assert torch.equal(
        draw(config, "blocks.1.mixer.memory.read_norm.weight", (4,), 0), torch.ones(4)
    )


def test_optimizer_groups() -> None:
    named = built("mac-learned").named_parameters()
    groups = {
        g["kind"]: list(zip(g["names"], g["params"], strict=True))
        for g in param_groups(named, kind, OptimConfig())
    }
    names = {
        k: {n.removeprefix("blocks.0.").removeprefix("blocks.1.") for n, _ in members}
        for k, members in groups.items()
    }
    assert names["gate"] == {"mixer.memory.gates.weight", "mixer.memory.gates.bias"}
    assert names["fast_init"] == {f"mixer.memory.initial.{i}" for i in range(3)}
    assert names["no_decay"] == {
        "mixer_norm.weight",
        "mlp_norm.weight",
        "final_norm.weight",
        "mixer.persistent",
        "mixer.asked",
        "mixer.memory.inner_gain",
        "mixer.memory.inner_bias",
        "mixer.memory.read_norm.weight",
        *(f"mixer.memory.{n}_conv.weight" for n in "qkv"),
    }
    assert "embedding.weight" in names["decay"] and "mixer.attention.q.weight" in names["decay"]
    assert kind("blocks.0.mlp.gate.weight") == "decay"
    total = sum(len(members) for members in groups.values())
    assert total == len(list(built("mac-learned").parameters()))
    for name in ("attention_norm.weight", "persistent"):
        assert kind(f"blocks.0.mixer.{name}") == "no_decay"


# Variant -> what its mixer has beside the memory's common part.
OWN = {
    "mac": ["persistent", *(f"attention.{n}.weight" for n in "qkvo")],
    "mag": ["persistent", "attention_norm.weight", *(f"attention.{n}.weight" for n in "qkv")],
    "mal": [
        "persistent",
        "memory.output_gate.weight",
        *(f"attention.{n}.weight" for n in "qkvo"),
    ],
    "lmm": ["memory.output_gate.weight"],
}


@pytest.mark.parametrize("case", OWN)
def test_names_are_those_of_checkpoints(case: str) -> None:
    names = [n for n, _ in TitansLM(config_of(case, blocks=1), device="meta").named_parameters()]
    memory = ["q", "k", "v", "q_conv", "k_conv", "v_conv", "gates", "read_norm", "out"]
    assert sorted(names) == sorted(
        [
            "embedding.weight",
            "blocks.0.mixer_norm.weight",
            *(f"blocks.0.mixer.{n}" for n in OWN[case]),
            *(f"blocks.0.mixer.memory.{n}.weight" for n in memory),
            "blocks.0.mixer.memory.gates.bias",
            "blocks.0.mixer.memory.initial.0",
            "blocks.0.mixer.memory.initial.1",
            "blocks.0.mixer.memory.inner_gain",
            "blocks.0.mixer.memory.inner_bias",
            "blocks.0.mlp_norm.weight",
            *(f"blocks.0.mlp.{n}.weight" for n in ("gate", "up", "down")),
            "final_norm.weight",
            "head.weight",
        ]
    )


def test_a_model_needs_its_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        TitansLM(config_of("mac", vocab_size=None))


def test_convolutions_see_as_many_tokens_as_there_were() -> None:
    plan = ConvPlan.of(torch.tensor([[3, 4, -1, 0, 1, -1]]))
    seen = torch.stack([v[0, :, 0] for v in plan.visible]).sum(0)
    assert seen.tolist()[:2] == [3, 3] and seen.tolist()[3:5] == [0, 1]
    assert plan.first is None and plan.last.tolist() == [[5, 6, 7]]
