"""What a run records, as TensorBoard and a reader of its folder find it."""

import json
import re
from pathlib import Path

import pytest
from tensorboard import plugin_util
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain.config import RunConfig, parse_config
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED
from titans_pretrain.evaluate.samples import Sample
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import read_lines
from titans_pretrain.run.metrics import read_records
from titans_pretrain.watch import as_markdown, panel

CUSTOM = "custom_scalars__config__"


@pytest.mark.parametrize(
    ("what", "tag"),
    [
        ("theta/p90", "memory_theta/blocks.3.p90"),
        ("drift", "memory_drift/blocks.3"),
        ("surprise", "memory_surprise/blocks.3"),
        ("surprise_untrained", "memory_surprise/blocks.3.untrained"),
    ],
)
def test_a_group_for_each_figure_and_the_layer_in_it(what: str, tag: str) -> None:
    assert panel(what, "blocks.3.mixer.memory") == tag


def test_samples_stand_in_markdown_as_they_are() -> None:
    text = as_markdown([Sample("\nCall\n\nme", " *Ishmael*, <b>\nI #1 & 'x'"), Sample("x_y", "z")])
    shown = plugin_util.markdown_to_safe_html(text)  # as TensorBoard does
    assert shown == (
        "<p><strong>Call<br><br>me</strong>  *Ishmael*, &lt;b&gt;<br>I #1 &amp; 'x'</p>\n<hr>\n"
        "<p><strong>x_y</strong> z</p>"
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


def train(tree: dict, stop_after: int | None = None) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"), stop_after=stop_after)


def observed(folder: Path, data: Path, **changes: object) -> dict:
    settings = {
        "train__steps": 8,
        "validation__every": 4,
        "checkpoint__every_steps": 3,
        "log__tensorboard": True,
        "log__memory_every": 2,
        "log__sample__tokens": 6,
    }
    return small_run(folder, data, **{**settings, **changes})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunFolder]:
    """A run of 8 steps: stopped after 5, then its checkpoint of step 5 lost: 3 is gone on from."""
    tree = observed(tmp_path_factory.mktemp("runs") / "run", data)
    assert run_world(train, 1, tree, 5) == [EXIT_SAVED]
    folder = RunFolder(tree["folder"])
    (folder.checkpoints / "step-00000005").rename(folder.path / "lost")
    assert run_world(train, 1, tree) == [EXIT_DONE]
    return parse_config(tree, "test"), folder


@pytest.fixture(scope="module")
def events(run: tuple[RunConfig, RunFolder]) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(run[1].tensorboard), size_guidance=everything)
    events.Reload()
    return events


def steps(points: list) -> list[int]:
    return [point.step for point in points]


def texts(folder: RunFolder, tag: str) -> list[tuple[int, str]]:
    """(step, text) as TensorBoard itself reads them: its EventAccumulator for others does not hide
    what a later life has done again where it is neither number nor picture."""
    events = plugin_event_accumulator.EventAccumulator(str(folder.tensorboard))
    events.Reload()
    if tag not in events.Tags()["tensors"]:
        return []
    return [
        (e.step, e.tensor_proto.string_val[0].decode("utf-8", "replace"))
        for e in events.Tensors(tag)
    ]


def test_every_curve_is_there_once_over_the_restart(events: EventAccumulator) -> None:
    each, sometimes, looked = list(range(1, 9)), [4, 8], [2, 4, 6, 8]
    promised = {
        **dict.fromkeys(("train/loss", "train/grad_norm", "train/lr", "train/perplexity"), each),
        **dict.fromkeys(("speed/tokens_per_s", "time/step_s", "time/watch_s"), each),
        **dict.fromkeys(("validation/loss", "validation/perplexity"), sometimes),
        **dict.fromkeys(("memory_gain/blocks.0", "memory_theta/blocks.1.p50"), looked),
        **dict.fromkeys(("memory_health/dead_heads", "memory_health/diverging_heads"), looked),
    }
    assert {tag: steps(events.Scalars(tag)) for tag in promised} == promised


def test_every_expression_of_the_layout_finds_a_curve(events: EventAccumulator) -> None:
    points = events.Tensors(CUSTOM)
    assert steps(points) == [0, 4]
    layout = layout_pb2.Layout.FromString(points[-1].tensor_proto.string_val[0])
    charts = [chart for category in layout.category for chart in category.chart]
    assert [category.title for category in layout.category] == ["Training", "Memory"]
    tags = events.Tags()["scalars"]
    for chart in charts:
        for expression in chart.multiline.tag:
            assert any(re.match(expression, tag) for tag in tags), expression
    shown = {tag for c in charts for e in c.multiline.tag for tag in tags if re.match(e, tag)}
    assert {"train/loss", "validation/loss", "speed/tokens_per_s", "time/watch_s"} <= shown
    assert "train/perplexity" in shown and "memory_radius/blocks.1" in shown


def test_pictures_go_on_over_the_restart(
    events: EventAccumulator, run: tuple[RunConfig, RunFolder]
) -> None:
    assert steps(events.Images("memory/condition_heads")) == [2, 4, 6, 8]
    assert steps(events.Images("memory_heads/gain")) == [2, 4, 6, 8]
    # The first life's first recording came back from the file: history begins at the second.
    assert steps(events.Images("memory_history/theta")) == [4, 6, 8]
    lines = list(read_lines(run[1].memory, ("step", "heads")))
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    scalars = {e.step: e.value for e in events.Scalars("memory_drift/blocks.1")}
    for line in lines:
        heads = line["heads"]["blocks.1.mixer.memory"]["drift"]
        assert len(heads) == 2
        assert sum(heads) / 2 == pytest.approx(scalars[line["step"]], rel=1e-4)


def test_texts_tell_what_runs_and_what_happened(run: tuple[RunConfig, RunFolder]) -> None:
    folder = run[1]
    starts = texts(folder, "events/start")
    assert [step for step, _ in starts] == [0, 4]
    assert starts[0][1].startswith("life 1 from scratch")
    again = (
        r"life 2 from `.*/step-00000003` on \S+\. life 1 ended at step 5: saved on request: --st"
    )
    assert re.match(again, starts[1][1])
    saves = texts(folder, "events/checkpoint")
    assert [step for step, _ in saves] == [3, 6, 8]
    for step, text in saves:
        assert f"step-{step:08d}` complete at 20" in text and "s behind the training" in text
    assert texts(folder, "events/stop") == [], "of a step that was done again"
    config = texts(folder, "run/config")[-1][1]
    assert "        chunk: 16\n" in config and "    folder: " in config
    model = texts(folder, "run/model")[-1][1]
    assert "| `blocks.*.mixer.memory.gates.weight` | 0 to 1 | 12 x 32 | gate | 768 |" in model
    assert re.search(r"\| fast_init \| [\d,]+ \|", model)
    assert "| memory |" in model and "forward MFLOP a token" in model
    assert "| books |" in texts(folder, "run/data")[-1][1]
    assert "| torch |" in texts(folder, "run/machine")[-1][1]


def test_a_stop_is_told(data: Path, tmp_path: Path) -> None:
    tree = observed(tmp_path / "run", data, train__steps=9, log__memory_every=0)
    tree["model"]["variant"] = "transformer"
    assert run_world(train, 1, tree, 3) == [EXIT_SAVED]
    folder = RunFolder(tmp_path / "run")
    assert texts(folder, "events/stop") == [(3, "saved at step 3 on request: --stop-after")]
    [(_, layout)] = texts(folder, CUSTOM)
    assert "Training" in layout and "memory" not in layout


def test_a_sample_at_each_validation(run: tuple[RunConfig, RunFolder]) -> None:
    folder = run[1]
    lines = list(read_lines(folder.samples, ("step", "samples")))
    assert [line["step"] for line in lines] == [4, 8]
    shown = texts(folder, "samples")
    assert [step for step, _ in shown] == [4, 8]
    for line, (_, markdown) in zip(lines, shown, strict=True):
        [sample] = line["samples"]
        assert markdown == as_markdown([Sample(**sample)])
        assert len(sample["prompt"]) > 20 and sample["text"]
    first, second = (line["samples"][0] for line in lines)
    assert first["prompt"] == second["prompt"] and first["text"] != second["text"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_watching_leaves_the_training_as_it_is(ranks: int, data: Path, tmp_path: Path) -> None:
    """Losses with samples, panels and pictures are bitwise those without."""
    watched = observed(tmp_path / "watched", data)
    watched["log"]["sample"] = {"tokens": 8, "prompts": ["Once", "It was the"], "temperature": 1.0}
    blind = small_run(tmp_path / "blind", data, train__steps=8, validation__every=4)
    losses = []
    for tree in (watched, blind):
        assert run_world(train, ranks, tree) == [EXIT_DONE] * ranks
        records = read_records(tmp_path / Path(tree["folder"]).name / "metrics.jsonl")
        losses.append([(r["step"], r["values"]["train/loss"]) for r in records])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    last = json.loads((tmp_path / "watched" / "samples.jsonl").read_text().splitlines()[-1])
    assert [sample["prompt"] for sample in last["samples"]] == ["Once", "It was the"]
    assert (tmp_path / "blind" / "samples.jsonl").read_text() == ""


LAYOUTS = {"TP2": {"tensor": 2}, "PP2": {"pipeline": 2}, "CP2": {"context": 2}}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list, list]:
    return first_step(tmp_path_factory.mktemp("alone") / "run", data, 1, {})


def first_step(folder: Path, data: Path, ranks: int, parallel: dict) -> tuple[dict, list, list]:
    """Of a run of one step: the values in TensorBoard, the heads, the samples."""
    tree = observed(folder, data, train__steps=1, validation__every=1, log__memory_every=1)
    tree["log"]["sample"] = {"tokens": 12, "temperature": 0.0}
    tree["parallel"] = parallel
    assert run_world(train, ranks, tree) == [EXIT_DONE] * ranks
    written = RunFolder(tree["folder"])
    events = EventAccumulator(str(written.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("memory")]
    [heads], [samples] = (
        list(read_lines(path, ("step",))) for path in (written.memory, written.samples)
    )
    values = {tag: events.Scalars(tag)[0].value for tag in tags}
    return values, heads["heads"], samples["samples"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_shows_what_one_process_shows(
    layout: str, alone: tuple[dict, list, list], data: Path, tmp_path: Path
) -> None:
    values, heads, samples = first_step(tmp_path / "run", data, 2, LAYOUTS[layout])
    assert values == pytest.approx(alone[0], rel=1e-5, abs=1e-6)
    assert len(values) > 30 and list(heads) == [f"blocks.{i}.mixer.memory" for i in range(2)]
    for layer, figures in alone[1].items():
        for figure, by_head in figures.items():
            assert len(by_head) == 2
            close = {"rel": 2e-5, "abs": 2e-6}  # rounded to five digits
            assert heads[layer][figure] == pytest.approx(by_head, **close), (layer, figure)
    assert samples == alone[2] and len(samples[0]["text"]) > 5
