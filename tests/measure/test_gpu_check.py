"""The GPU check, tried on the CPU: what it reports is what was computed, and wrong rows fail."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from titans_pretrain import cli
from titans_pretrain.errors import ConfigError
from titans_pretrain.measure import gpu_check, gpu_check_cases, gpu_check_report
from titans_pretrain.measure.gpu_check_report import TOLERANCES, judge
from titans_pretrain.memory import problems
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.model.loss import token_loss
from titans_pretrain.step import build_model

TRY = gpu_check_cases.Task("steps", [], "cpu", True, "", "", 1)


def fine() -> gpu_check_report.Measured:
    """A measurement in which all is well."""
    steps = {"losses": [4.0, 3.0], "norms": [1.0, 2.0]}
    run = {**steps, "content": "a" * 64, "not_deterministic": []}
    speed = {"tokens_per_s": 1e5, "seconds": 0.5, "peak_bytes": 3 * 2**30, "size": "so large"}
    cases = gpu_check_report.CASES
    return {
        "memory": {
            "machine": {"machine": {"device": "NVIDIA X", "driver": "1.2"}},
            "ragged fp32": {"errors": {"y": 1e-6, "d q": 2e-6}},
            "ragged bf16": {"errors": {"y": 4e-3, "d q": 2e-3}},
        },
        "reference": {f"{m} fp32": copy.deepcopy(steps) for m in gpu_check_report.MODELS},
        "steps": {case: copy.deepcopy(steps) for case in cases},
        "run": {
            f"{kind} {case}": copy.deepcopy(run)
            for kind in ("straight", "again", "resumed")
            for case in cases
        },
        "speed": {"mac bf16": speed},
    }


def failures(measured: gpu_check_report.Measured, **tolerances: float) -> list[str]:
    named = {k.replace("_", " "): v for k, v in tolerances.items()}
    rows = judge(measured, TOLERANCES | named)
    return [f"{r.section}: {r.case}" for r in rows if r.verdict == "FAIL"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("gpu-check") / "report"
    command = [sys.executable, "-m", "titans_pretrain", "gpu-check", "--dry-run", "--out", str(out)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    return said, out


@pytest.mark.slow
def test_the_dry_run_passes_and_says_that_it_is_one(dry: Any) -> None:
    said, out = dry
    report = json.loads((out / "report.json").read_text())
    assert said.returncode == 0, said.stdout + said.stderr
    assert report["passed"] and report["dry_run"] and report["device"] == "cpu"
    text = (out / "report.md").read_text()
    for words in (said.stdout, text):
        assert "nothing ran on a GPU" in words
    assert text.startswith("# GPU check: CPU (no GPU was used)")
    assert f"| torch | {torch.__version__} |" in text
    assert sorted(p.name for p in out.iterdir()) == ["logs", "report.json", "report.md"]

    counts = Counter(f"{row['section']} {row['verdict']}" for row in report["rows"])
    memories = 2 * len(problems.PROBLEMS)
    assert counts == {
        "memory PASS": memories,
        "steps PASS": 12,
        "run PASS": 6,
        "run info": 6,
        "speed info": 10,
    }
    console = [line for line in said.stdout.splitlines() if line.startswith(("PASS ", "info "))]
    assert len(console) == len(report["rows"])


@pytest.mark.slow
def test_the_dry_runs_values_are_those_computed_here(dry: Any) -> None:
    measured = json.loads((dry[1] / "report.json").read_text())["measured"]
    torch.set_num_threads(1)
    for model in gpu_check_report.MODELS:
        # Both sides are the CPU: equal to the last bit in fp32, close but not equal in bf16.
        reference, mine = measured["reference"][f"{model} fp32"], measured["steps"]
        assert len(reference["losses"]) == gpu_check_cases.STEPS == 20
        for what in ("losses", "norms"):
            assert mine[f"{model} fp32"][what] == reference[what]
            assert gpu_check_report.worst(mine[f"{model} bf16"][what], reference[what])[0] > 0
        assert reference["losses"][-1] < reference["losses"][0] - 0.5, "there is something to learn"
        assert len({measured["run"][f"{k} {model} fp32"]["content"] for k in KINDS}) == 1
        assert measured["run"][f"resumed {model} fp32"]["losses"] == reference["losses"][3:6]

        config = gpu_check_cases.run_config(TRY, model, "fp32")
        where = {"dtype": torch.float32, "device": torch.device("cpu"), "recompute": False}
        plain = build_model(config.model, seed=0, **where)
        nats, labels = 0.0, 0
        for batch in gpu_check_cases.made_batches(config, 1):
            logits, _ = plain(batch.tokens, batch.positions)
            nats += token_loss(logits, batch.labels)[batch.loss_mask].double().sum().item()
            labels += int(batch.loss_mask.sum())
        assert reference["losses"][0] == pytest.approx(nats / labels, rel=1e-6)
    for case, result in measured["memory"].items():
        if case != "machine":
            exact = 3e-6 if case.endswith("fp32") else 5e-3
            assert max(result["errors"].values()) < exact, case
            assert {"y", "d q", "d w_init.0", "final momentum.0"} <= result["errors"].keys()


KINDS = ("straight", "again", "resumed")


def test_a_broken_tolerance_or_value_turns_its_row_to_fail() -> None:
    assert failures(fine()) == []
    assert failures(fine(), memory_fp32=1e-9) == ["memory: ragged fp32"]
    assert failures(fine(), memory_bf16=1e-9) == ["memory: ragged bf16"]
    measured = fine()
    measured["steps"]["lmm fp32"]["losses"][1] *= 1.002
    assert failures(measured) == ["steps: lmm fp32, loss"]
    assert failures(measured, steps_fp32=3e-3) == []
    measured["steps"]["mac bf16"]["norms"][0] = float("nan")
    assert failures(measured) == ["steps: lmm fp32, loss", "steps: mac bf16, gradient norm"]
    measured = fine()
    measured["memory"]["ragged bf16"]["errors"]["d q"] = "Infinity"
    assert failures(measured) == ["memory: ragged bf16"]
    measured["reference"]["mac fp32"] = {"error": "exit code 1"}
    wrong = ["reference: mac fp32", "memory: ragged bf16", "steps: mac fp32", "steps: mac bf16"]
    assert failures(measured) == wrong


def test_resume_is_judged_bitwise_where_a_repeated_run_is() -> None:
    measured = fine()
    measured["run"]["resumed mac bf16"]["content"] = "b" * 64
    assert failures(measured) == ["run: mac bf16, 3 + 3 steps resumed = 6"]

    # Two uninterrupted runs differ: not resume's fault. Deterministic algorithms decide.
    measured["run"]["again mac bf16"] |= {"content": "c" * 64, "losses": [4.0, 3.0003]}
    for kind in ("straight", "resumed"):
        measured["run"][f"{kind}/deterministic mac bf16"] = {
            "content": "d" * 64,
            "not_deterministic": ["some_backward"],
        }
    assert failures(measured) == []
    twice, resumed = (r for r in judge(measured, TOLERANCES)[-3:-1])
    assert twice.verdict == "info" and "differs by 1.0e-04" in twice.measured
    assert resumed.measured == (
        "equal, with deterministic algorithms (there are none for some_backward): dddddddddddd"
    )
    measured["run"]["resumed/deterministic mac bf16"]["content"] = "e" * 64
    assert failures(measured) == ["run: mac bf16, 3 + 3 steps resumed = 6"]


def test_unequal_repeats_are_run_again_with_deterministic_algorithms() -> None:
    asked: list[tuple[str, list[str], str]] = []

    def sections(section: str, cases: list[str], *, device: str = "") -> dict[str, Any]:
        asked.append((section, list(cases), device))
        return {c: {"content": "x" if c == "again lmm bf16" else "a"} for c in cases}

    measured = gpu_check.measure(sections)  # type: ignore[arg-type]
    special = [cases for _, cases, _ in asked if any("/" in case for case in cases)]
    assert special == [["straight/deterministic lmm bf16"], ["resumed/deterministic lmm bf16"]]
    assert [(s, d) for s, _, d in asked if d] == [("steps", "cpu")]
    assert len(measured["run"]) == 6 * 3 + 2


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_and_the_report(
    broken: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_check, "require_cuda", lambda: "cuda")
    monkeypatch.setattr(gpu_check, "measure", lambda sections: fine())
    if broken:
        monkeypatch.setitem(TOLERANCES, "memory fp32", 1e-6)
    assert gpu_check.main(["--out", str(tmp_path)]) == code
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is not broken and report["device"] == "cuda"
    bad = [row for row in report["rows"] if row["verdict"] == "FAIL"]
    assert [row["case"] for row in bad] == (["ragged fp32"] if broken else [])
    text, said = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    for words in (text, said):
        assert "2.0e-06 (d q; y 1.0e-06; 2 tensors)" in words
        assert ("FAIL: 1 rows failed, 19 passed" if broken else "PASS: all 20 rows") in words
        assert "100,000 tokens/s, 0.5000 s, peak 3.00 GiB (so large)" in words
        assert "DRY" not in words
    assert "| d q | 2.0e-06 | 2.0e-03 |" in text and "| driver | 1.2 |" in text
    assert "| step 2 |" + " 3.000000 |" * 3 + " 2.000000 |" * 3 in text


def test_what_crashes_or_hangs_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    sections = gpu_check.Sections("cpu", True, tmp_path, tmp_path, time.monotonic() + 200)
    found = sections("memory", ["no such fp32", "ragged fp32"])
    assert re.match(
        r"exit code 1: ValueError: 'no such' is not in list", found["no such fp32"]["error"]
    )
    assert found["ragged fp32"]["errors"]["y"] < 1e-5

    monkeypatch.setattr(gpu_check, "CASE_LIMIT_S", 0.2)
    assert "hang: killed" in sections("memory", ["ragged fp32"])["ragged fp32"]["error"]
    late = gpu_check.Sections("cpu", True, tmp_path, tmp_path, time.monotonic() - 1)
    assert "time was over" in late("memory", ["ragged fp32"])["ragged fp32"]["error"]


def test_without_cuda_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "report"
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        gpu_check.main(["--out", str(out)])
    assert cli.main(["gpu-check", "--out", str(out)]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("tiny", [False, True])
def test_the_problems_are_what_their_names_say(tiny: bool) -> None:
    for seed, (name, p) in enumerate(problems.PROBLEMS.items()):
        p = problems.made_tiny(p) if tiny else p
        at = problems.memory_positions(p, seed)
        assert p.packed == ("packed" in name or "depth 3" in name)
        if at is None:
            assert name in ("whole rows", "ragged")
            assert (p.tokens % p.spec.chunk == 0) == (name == "whole rows"), name
            continue
        firsts = torch.tensor([row[row >= 0][0] for row in at])
        inside = (firsts % p.spec.chunk > 0).sum()
        assert inside == (p.rows - 1 if p.carried else 0) and (firsts > 0).sum() == inside
        assert bool((at < 0).any()) == p.packed == bool((at[:, 1:] == 0).any()), name


def test_a_memory_that_is_a_little_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps a thousandth too large are far outside the tolerance."""

    def wrong(q: Any, k: Any, v: Any, theta: Any, *rest: Any, **named: Any) -> Any:
        return chunked_memory(q, k, v, 1.001 * theta, *rest, **named)

    p = problems.PROBLEMS["packed and carried"]
    right = problems.differences(p, "cpu", bf16=False, tiny=True, seed=3)
    monkeypatch.setattr(problems, "chunked_memory", wrong)
    found = problems.differences(p, "cpu", bf16=False, tiny=True, seed=3)
    assert max(right.values()) < 3e-6 and found["y"] > TOLERANCES["memory fp32"]
    assert found["d theta"] > TOLERANCES["memory fp32"]
