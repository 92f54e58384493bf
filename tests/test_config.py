"""Bad configuration: each mistake gets its value, the rule and the remedy."""

from pathlib import Path
from typing import Any

import pytest

from titans_pretrain.config import dump_config, load_config, parse_config, weight_at
from titans_pretrain.errors import ConfigError

BASE = "folder: runs/x\ndata: {sources: {a: {path: d}}, sequence_length: 512}\n"

BAD = {
    "model.headz=3": ("model.headz=3", "did you mean model.heads?"),
    "optim.learning_rate=3": ("optim.learning_rate=3", "remove optim.learning_rate"),
    "chunk=3": ("chunk=3", "did you mean model.memory.chunk?"),
    "model.heads=7 model.width=100": ("model.width=100, model.heads=7", "try model.heads=5"),
    "model.width=30 model.heads=10": (
        "model.width/model.heads=3",
        "change model.width or model.heads",
    ),
    "model.kv_heads=5": ("model.heads=16, model.kv_heads=5", "try model.kv_heads=4"),
    "model.segment=100": ("model.segment=100, model.memory.chunk=16", "try model.segment=96"),
    "data.sequence_length=500": ("data.sequence_length=500", "data.sequence_length=496"),
    "model.memory.chunk=0": ("model.memory.chunk=0", "change model.memory.chunk"),
    "model.memory.chunk=24 data.sequence_length=480 model.segment=48": (
        "model.memory.chunk=24",
        "use one of these chunks",
    ),
    "model.dropout=0.1": ("model.dropout=0.1", "remove model.dropout"),
    "train.ramp.start=3 train.ramp.steps=9": ("train.ramp.start=3", "divides global_batch"),
    "train.ramp.start=4 train.ramp.steps=9": (
        "train.micro_batch=8",
        "micro_batch divides",
    ),
    "train.ramp.start=8": ("train.ramp.steps: missing", "set train.ramp.steps"),
    "train.z_loss=-1e-4": ("train.z_loss=", "change train.z_loss"),
    "train.steps=-1": ("train.steps=-1", "change train.steps"),
    "model.memory.depth=4": ("model.memory.depth=4", "change model.memory.depth"),
    "optim.lr=fast": ("optim.lr='fast'", "change optim.lr"),
    "model.variant=gpt": ("model.variant='gpt'", "change model.variant"),
    "train.global_batch=9": ("train.global_batch=9", "micro_batch that divides it"),
    "optim.schedule=wsd": ("optim.decay_steps=0", "optim.schedule=constant"),
    "optim.schedule=wsd optim.decay_steps=2000": ("optim.decay_steps=2000", "shorten them"),
    "optim.min_lr=1": ("optim.min_lr=1.0", "lower optim.min_lr"),
    "data.sources={}": ("data.sources={}", "change data.sources"),
    "data.sources.a.weight=-1": ("data.sources.a.weight=-1: -1", "change data.sources.a.weight"),
    "data.sources.a.weight=.nan": ("weight=nan: nan", "change data.sources.a.weight"),
    "data.sources.a.weight=much": ("weight='much': 'much'", "change data.sources.a.weight"),
    "data.sources.a.weight=[]": ("data.sources.a.weight=[]", "[1000000, 0.5]"),
    "data.sources.a.weight=[[0,1],[5]]": ("weight=[[0, 1], [5]]", "[1000000, 0.5]"),
    "data.sources.a.weight=[[0.5,1]]": ("[[0.5, 1]]: 0.5", "change data.sources.a.weight"),
    "data.sources.a.weight=[[9,1],[5,1]]": ("[[9, 1], [5, 1]]", "put them in order"),
    "data.sources.a.weight=[[5,1],[5,2]]": ("[[5, 1], [5, 2]]", "each once"),
    "data.sources.a.weight=0": ("at sample 0 every weight is 0", "a weight above 0"),
    "data.sources.b.path=e data.sources.a.weight=[[0,1],[7,0]] data.sources.b.weight=0": (
        "at sample 7 every weight is 0",
        "a weight above 0",
    ),
    "data.sources.b.path=./d": ("data.sources.a and data.sources.b are one folder", "both weights"),
    "data.sources.b.weight=1": ("data.sources.b.path: missing", "set data.sources.b.path"),
    "data.sources.b/c.path=e": ("the name 'b/c'", "choose another name"),
    "data.validation.v.path=e data.validation.w.path=e": ("are one folder, e", "leave one out"),
    "data.sources.a.wieght=1": ("data.sources.a.wieght=1", "did you mean data.sources.a.weight?"),
    "optim.lr=.inf": ("optim.lr=inf", "change optim.lr"),
    "model.memory.rule=titan": ("model.memory.rule='titan'", "change model.memory.rule"),
    "nonsense": ("'nonsense'", "optim.lr=3e-4"),
    "train.steps.more=1": ("steps is a value, not a section", "resolved config"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(BASE + "train: {steps: 1000}\n")
    return file


@pytest.mark.parametrize("overrides", BAD)
def test_each_mistake_is_told(overrides: str, path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides.split(" "))
    value, remedy = BAD[overrides]
    assert value in caught.value.value
    assert remedy in caught.value.remedy
    assert caught.value.rule
    assert caught.value.exit_code == 2


def test_several_mistakes_are_told_at_once(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["model.width=-3", "model.heads=-2", "optim.lrr=1"])
    assert str(caught.value).splitlines() == [
        f"config {path}: model.width=-3; model.heads=-2; optim.lrr=1: no such key",
        "  rule:   input should be greater than 0; every key is known",
        "  remedy: change model.width; change model.heads; did you mean optim.lr?",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [("[1, 2]", "holds list"), ("a: [", "YAML"), (BASE.replace("runs/x", ""), "folder")],
)
def test_a_file_that_is_no_config(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_weights_of_sources(path: Path) -> None:
    """A number, also one that YAML takes for text, or points; sources are kept by name."""
    given = ["data.sources.0.path=e", "data.sources.0.weight=[[0, 1e-3], [2, 1]]"]
    config = load_config(path, [*given, "data.sources.a.weight=1e-3"])
    assert list(config.data.sources) == ["0", "a"]
    assert config.data.sources["a"].points == [(0, 0.001)]
    assert config.data.sources["0"].points == [(0, 0.001), (2, 1.0)]
    path.write_text(dump_config(config))
    assert load_config(path) == config
    points = config.data.sources["0"].points
    assert [weight_at(points, n) for n in (0, 1, 2, 9)] == [0.001, 0.5005, 1.0, 1.0]
    assert weight_at([(4, 2.0), (6, 0.0)], 3) == 2.0


def test_overrides_win_and_the_dump_is_the_same_config(path: Path) -> None:
    config = load_config(path, ["optim.lr=1e-3", "model.memory.chunk=64", "data.workers=0"])
    assert (config.optim.lr, config.model.memory.chunk, config.data.workers) == (1e-3, 64, 0)
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_no_dropout_may_be_said_and_leaves_no_trace(path: Path) -> None:
    """Models of checkpoints are compared key by key: this one is not among them."""
    config = load_config(path, ["model.dropout=0"])
    assert config == load_config(path) and "dropout" not in dump_config(config)


def test_nothing_changes_a_config(path: Path) -> None:
    config = load_config(path)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_every_shipped_config_is_valid_and_opens_with_its_command() -> None:
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert configs
    for config in configs:
        load_config(config)
        opening = config.read_text().split("\nfolder:")[0]
        for word in (
            f"#   titans-pretrain train configs/{config.name}",
            "\n# Duration: ",
            "\n# Expect:   ",
            "\n# Ran:      ",
        ):
            assert word in opening, f"{config.name} does not open with {word!r}"


def test_defaults_are_the_paper_s() -> None:
    model: Any = parse_config({"folder": "x", "data": {"sources": {"a": {"path": "d"}}}}, "t").model
    memory = model.memory
    assert (memory.depth, memory.expansion, memory.activation, memory.chunk) == (2, 4, "gelu", 16)
    assert (model.segment, model.persistent_tokens, memory.residual_norm) == (512, 128, True)
