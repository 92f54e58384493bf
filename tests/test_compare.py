"""Studies: what may be compared, the table's arithmetic, and a study stopped and gone on with."""

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prepared import ROOT, small_dataset, small_run
from titans_pretrain.compare import load_study, merge
from titans_pretrain.errors import ConfigError
from titans_pretrain.run.comparison import Outcome, draw, report, table
from titans_pretrain.run.metrics import read_records

STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def _study(folder: Path, **changes: Any) -> Path:
    base = small_run(folder / "unused", folder / "data")
    base = merge(base, {"train": {"steps": 6, "threads": 1}, "validation": {"every": 3}})
    tree = {
        "folder": str(folder / "study"),
        "seeds": [3, 4],
        "base": {k: v for k, v in base.items() if k != "folder"},
        "entries": {"mac": None, "plain": {"model": {"variant": "transformer", "mlp_width": 64}}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(merge(tree, changes), sort_keys=False))
    return path


def test_members_come_seed_by_seed_with_their_differences(tmp_path: Path) -> None:
    members = load_study(_study(tmp_path), ["optim.lr=0.5", f"folder={tmp_path / 'other'}"])
    assert [m.name for m in members] == ["mac-seed3", "plain-seed3", "mac-seed4", "plain-seed4"]
    plain = members[3].config
    assert (plain.train.seed, plain.data.seed, plain.optim.lr) == (4, 4, 0.5)
    assert (plain.model.variant, plain.model.mlp_width, plain.model.width) == (
        "transformer",
        64,
        32,
    )
    assert plain.folder == str(tmp_path / "other" / "plain-seed4")
    assert members[0].config.model.mlp_width == 48  # what one entry changes is its own


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": [1, 1]}, r"seeds \[1, 1\]"),
        ({"seeds": []}, "different integers"),
        ({"seeds": [True]}, "different integers"),
        ({"entries": []}, r"entries \[\]"),
        ({"more": 1}, "has the keys base, entries, folder, seeds"),
        ({"entries": {"plain": {"model": {"with": 1}}}}, "entry plain.*did you mean model.width"),
        ({"entries": {"plain": {"train": {"steps": 7}}}}, "tokens of plain is .* of mac"),
        ({"entries": {"plain": {"validation": {"rows": 1}}}}, "validation of plain"),
        ({"entries": {"plain": {"data": {"sequence_length": 128}}}}, "tokens of plain"),
    ],
)
def test_what_is_no_study_is_refused(changes: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.compile(told, re.DOTALL)):
        load_study(_study(tmp_path, **changes))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_shipped_studies_are_valid_and_open_with_their_command(path: Path) -> None:
    assert load_study(path)
    opening = path.read_text().split("\nfolder:")[0]
    for word in (f"titans-pretrain compare configs/studies/{path.name}", "Duration", "Expect"):
        assert word in opening


def _outcome(entry: str, seed: int, losses: list[float]) -> Outcome:
    records = [
        {"step": i, "tokens": 10 * i, "values": {"train/loss": x, "validation/loss": x + 1}}
        for i, x in enumerate(losses, 1)
    ]
    return Outcome(entry, seed, 1000, 2.5e6, records)


def test_the_table_s_arithmetic(tmp_path: Path) -> None:
    outcomes = [
        _outcome("a", 0, [3.0, 1.0]),
        _outcome("b", 0, [3.0, 0.5]),
        _outcome("a", 1, [3.0, 2.0]),
        _outcome("b", 1, [3.0, 1.0]),
    ]
    a, b = table(outcomes).splitlines()[2:]
    # a: losses 2 and 3; b: 1.5 and 2, so that b - a is -0.5 and -1
    assert a == "| a | 1,000 | 2.5 | 2 | 2.5000 ± 0.7071 | 12.18 |  |"
    assert b == "| b | 1,000 | 2.5 | 2 | 1.7500 ± 0.3536 | 5.75 | -0.7500 ± 0.3536 |"
    lines = draw(outcomes).axes[1].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[4.0, 2.5], [4.0, 1.75]]
    assert list(lines[0].get_xdata()) == [10, 20]
    report(outcomes, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written[1]["validation"] == [[10, 4.0], [20, 1.5]]
    assert (tmp_path / "table.md").read_text() == table(outcomes) + "\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def _compare(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "titans_pretrain", "compare", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_study_is_stopped_and_gone_on_with(tmp_path: Path) -> None:
    small_dataset(tmp_path)
    study = str(_study(tmp_path, base={"train": {"steps": 40}, "validation": {"every": 20}}))
    folder = tmp_path / "study"
    first = _compare(study, "--jobs", "2")
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    while not any(p.stat().st_size for p in folder.glob("*/metrics.jsonl")):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 75, out + err
    assert "goes on from here" in out
    begun = {p.parent.name for p in folder.glob("*/metrics.jsonl")}
    assert begun <= {"mac-seed3", "plain-seed3"}  # nothing was started after the request

    second = _compare(study)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, out + err
    losses: dict[str, list[float]] = {"mac": [], "plain": []}
    for run in sorted(folder.glob("*-seed*")):
        records = list(read_records(run / "metrics.jsonl"))
        assert [r["step"] for r in records] == list(range(1, 41))
        losses[run.name.split("-")[0]].append(records[-1]["values"]["validation/loss"])
    for entry, values in losses.items():
        assert len(values) == 2 and values[0] != values[1]
        told = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert f"| {entry} " in out and told in out

    third = _compare(study)  # nothing left: the report alone, and quickly
    again, err = third.communicate(timeout=120)
    assert third.returncode == 0 and told in again and "to go" not in again, err

    fourth = _compare(study, "optim.lr=0.1")
    out, err = fourth.communicate(timeout=120)
    assert fourth.returncode == 2 and "another configuration" in err, out + err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_failing_run_ends_the_study_with_its_code(tmp_path: Path) -> None:
    process = _compare(str(_study(tmp_path)))  # there is no data
    _, err = process.communicate(timeout=110)
    assert process.returncode == 3
    assert "its last lines" in err and "manifest.json" in err
    assert not (tmp_path / "study" / "table.md").exists()
