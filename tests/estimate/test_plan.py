"""`titans-pretrain plan`: what it says, writes and refuses; what `submit` makes of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.config import load_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.estimate.choose import (
    arguments,
    candidates,
    cheapest_change,
    difference,
    judge,
    nearest,
    ranked,
)
from titans_pretrain.estimate.fit import require_fit
from titans_pretrain.estimate.hardware import hardware_of
from titans_pretrain.parallel.layout import plan_layout

ROOT = Path(__file__).resolve().parents[2]
SMALL, BIG = (str(ROOT / "configs" / f"titans-{size}.yaml") for size in ("340m", "1.3b"))
# A 7B of 32 blocks, which a GPU does not hold.
SEVEN = [BIG, "model.blocks=32", "model.width=4096", "model.heads=32", "parallel.tensor=1"]
H100 = hardware_of("h100")


def plan(*args: str) -> int:
    return cli.main(["plan", *args])


def test_a_plan_of_one_node_as_text_csv_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / name) for name in ("plan.csv", "plan.json", "plan.png")]
    flags = ("--csv", "--json", "--plot")
    options = [word for pair in zip(flags, files) for word in pair]
    assert plan(SMALL, "--gpu", "h100", "--tokens", "15e9", *options) == 0
    out = capsys.readouterr().out
    config = load_config(SMALL)
    found = candidates(config, 8, H100)
    fitting = ranked(found)
    assert "mac, 24 x 1024, 488,271,104 parameters, bf16" in out
    assert f"{len(fitting):,} of {len(found):,} layouts fit" in out
    assert f"{fitting[0].pace.tokens_per_s:,.0f}" in out
    rows = list(csv.DictReader(Path(files[0]).read_text().splitlines()))
    assert len(rows) == len(found)
    assert float(rows[0]["step_s"]) == pytest.approx(fitting[0].pace.seconds)
    assert sum(row["fits"] == "True" for row in rows) == len(fitting)
    tree = json.loads(Path(files[1]).read_text())
    own = judge(config, plan_layout(config, 8), H100)
    assert tree["own"]["device_bytes"] == round(own.held.device)
    assert sum(tree["own"]["seconds"].values()) == pytest.approx(own.pace.seconds)
    assert tree["hardware"]["bf16_tflops"]["value"] == 989
    assert tree["own"]["days"] == pytest.approx(15e9 / own.pace.tokens_per_s / 86400)
    reduced = [t for t in tree["own"]["collectives"] if t["what"] == "gradients"]
    assert reduced == [{"group": "data", "way": "all_reduce", "what": "gradients", "calls": 1,
                        "bytes": 4 * 488_271_104}]  # fmt: skip
    assert Path(files[2]).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_answers_for_512_gpus_without_torch() -> None:
    code = (
        "import sys; from titans_pretrain import cli; "
        f"code = cli.main(['plan', {BIG!r}, '--gpu', 'h200', '--nodes', '64']); "
        "assert code == 0 and 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert "512 x NVIDIA H200" in out.stdout
    assert "layouts fit; the fastest:" in out.stdout


def test_layouts_that_do_not_divide_the_model_s_own_width_are_passed_over() -> None:
    """12 heads on 12 GPUs: 3 and 6 divide the heads and the vocabulary, but not the MLP, whose
    width the config leaves to the model: 2048."""
    model = ["model.width=768", "model.heads=12", "model.mlp_width=null", "model.vocab_size=33000"]
    config = load_config(SMALL, [*model, "train.global_batch=96"])
    found = candidates(config, 12, H100)
    assert {c.layout.tensor for c in found} == {1, 2, 4}


def test_ranking_is_by_time_and_what_does_not_fit_is_apart() -> None:
    config = load_config(SEVEN[0], SEVEN[1:])
    found = candidates(config, 128, H100)
    fitting, unfit = ranked(found), nearest(found)
    assert len(fitting) + len(unfit) == len(found)
    assert unfit
    times = [round(c.pace.seconds, 4) for c in fitting]
    assert times == sorted(times)
    assert all(c.held.device <= c.room for c in fitting)
    over = [c.over for c in unfit]
    assert over == sorted(over)
    assert over[0] > 0


def test_the_cheapest_change_differs_in_fewest_values_and_fits() -> None:
    config = load_config(SEVEN[0], [*SEVEN[1:], "train.recompute=none"])
    own = judge(config, plan_layout(config, 128), H100)
    assert not own.fits
    fitting = ranked(candidates(config, 128, H100))
    better = cheapest_change(own, fitting)
    assert better is not None
    assert better.fits
    changes = difference(own, better)
    assert len(changes) == min(len(difference(own, c)) for c in fitting)
    # The change, given to the config itself, is that layout.
    changed = load_config(
        SEVEN[0], [*SEVEN[1:], "train.recompute=none", *arguments(changes).split()]
    )
    again = judge(changed, plan_layout(changed, 128), H100)
    assert (again.held, again.pace) == (better.held, better.pace)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([SMALL, "--gpu", "h1000"], ("--gpu h1000", "a100, b200, h100, h200", "--measure")),
        ([SMALL], ("--gpu",)),
        ([SMALL, "--gpu", "h100", "--tokens", "1000"], ("524,288", "--tokens 1000")),
        ([SMALL, "--gpu", "h100", "--nodes", "31"], ("248", "no layout")),
        (
            [SMALL, "--gpu", "h100", "data.sequence_length=4097", "--nodes", "32"],
            ("data.sequence_length",),
        ),
        (
            [SMALL, "--gpu", "h100", "model.vocab_size=null"],
            ("model.vocab_size", "model.vocab_size=32000"),
        ),
    ],
    ids=str,
)
def test_bad_input_gets_value_rule_and_remedy(
    args: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*args) == 2
    err = capsys.readouterr().err
    assert "rule:" in err
    assert "remedy:" in err
    for word in words:
        assert word in err


def test_a_hardware_file_with_an_unknown_key_or_without_a_source_is_refused(
    tmp_path: Path,
) -> None:
    text = (ROOT / "configs" / "hardware" / "h100.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("launch_us:", "lunch_us:"))
    with pytest.raises(ConfigError, match="did you mean launch_us"):
        hardware_of(str(path))
    path.write_text(text.replace('"NVIDIA H100 data sheet (SXM), dense"', '""'))
    with pytest.raises(ConfigError, match=r"bf16_tflops\.source"):
        hardware_of(str(path))


def test_what_fits_is_one_line_and_what_does_not_is_refused_with_a_change_that_helps() -> None:
    config = load_config(BIG)
    line = require_fit(config, 512, H100)
    assert "GiB of each NVIDIA H100" in line
    large = load_config(SEVEN[0], [*SEVEN[1:], "train.recompute=none"])
    with pytest.raises(ConfigError, match="too much") as refused:
        require_fit(large, 128, H100)
    assert "--force" in refused.value.remedy
    change = refused.value.remedy.split(" (")[0].split()
    better = load_config(SEVEN[0], [*SEVEN[1:], "train.recompute=none", *change])
    assert "GiB of each" in require_fit(better, 128, H100)
    assert "DOES NOT FIT" in require_fit(large, 128, H100, force=True)
