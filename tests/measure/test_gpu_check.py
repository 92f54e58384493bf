"""The GPU check, tried on the CPU: what it reports is what was computed, and wrong rows fail."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worlds import run_world
from titans_pretrain import cli
from titans_pretrain.errors import ConfigError
from titans_pretrain.measure.gpu_check import child, command, large, packages, plan, saves, small
from titans_pretrain.measure.gpu_check.judge import TOLERANCES, Row, judge, passed, worst
from titans_pretrain.measure.gpu_check.large import large_config, needed_bytes
from titans_pretrain.measure.gpu_check.plan import GROUPS, Group
from titans_pretrain.measure.gpu_check.processes import Measured, Runner, environment, last_words
from titans_pretrain.measure.gpu_check.report import markdown, verdict
from titans_pretrain.measure.made import made_batches
from titans_pretrain.memory import problems
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.model.loss import token_loss
from titans_pretrain.step import build_model

GIB = 2**30
TRY = child.Task("steps", [], "cpu", True, True, 1, "", "", "", 1)


def trained(seconds: float, peak: int, **more: Any) -> dict[str, Any]:
    return {
        "plain": False,
        "ranks": 1,
        "parameters": 2**28,
        "rows": 2,
        "tokens": 8192,
        "flops": 1e14,
        "recompute": "none",
        "predicted_bytes": peak,
        "seconds": [seconds, seconds, 9 * seconds],
        "losses": [10.0, 9.0],
        "norms": [1.0, 1.0],
        "finite": True,
        "held_bytes": {"parameters": GIB},
        "peak_bytes": peak,
        "reserved_bytes": peak,
        "took_s": 12.3,
        **more,
    }


def fine() -> Measured:
    """A measurement in which all is well."""
    steps = {"losses": [4.0, 3.0], "norms": [1.0, 2.0], "took_s": 1.0}
    contents = {"3": "a" * 64, "6": "b" * 64, "9": "c" * 64}
    long = {"losses": [4.0] * 9, "norms": [1.0] * 9, "contents": contents, "took_s": 1.0}
    short = {"losses": [4.0] * 3, "norms": [1.0] * 3, "took_s": 1.0}
    parts = ("mac bf16", "mac fp32")
    made = {
        "machine": {"names": {"machine": {"device": "NVIDIA X", "torch": "2"}, "took_s": 0.1}},
        "matmul": {
            "bf16": {
                "flop_per_s": 5e14,
                "peak_flop_per_s": 1e15,
                "wrong": 1e-3,
                "took_s": 1.0,
            }
        },
        "memory": {
            "fp32": {"errors": {"ragged": {"y": 1e-6, "d q": 2e-6}}, "took_s": 1.0},
            "bf16": {"errors": {"ragged": {"y": 4e-3, "d q": 2e-3}}, "took_s": 1.0},
        },
        "reference": {f"{v} fp32": steps for v in plan.VARIANTS},
        "steps": dict.fromkeys(plan.SMALL, steps),
        "collectives": {
            "send": {"wrong": 0.0, "ranks": 2, "bytes": GIB, "each_s": 0.1, "took_s": 1.0}
        },
        "train": {
            "170m transformer": trained(0.5, 4 * GIB),
            "170m mac": trained(2.0, 6 * GIB),
        },
        "save": {p: {**long, "same": True, "again": short} for p in parts},
        "resume": {p: {**short, "contents": contents, "from": "a" * 64} for p in parts},
        "to cpu": {p: {**short, "contents": contents, "from": "a" * 64} for p in parts},
        "back": {p: {**short, "contents": contents, "from": "b" * 64} for p in parts},
        "zero": {
            "stage 1": trained(1.0, 9 * GIB),
            "stage 1, offload": trained(1.0, 6 * GIB),
        },
        "layouts": {"tensor": {**steps, "ranks": 2, "layout": "TP 2"}},
    }
    return json.loads(json.dumps(made))  # nothing is shared


def of(rows: list[Row], verdict: str) -> list[str]:
    return [f"{r.case}: {r.what}" for r in rows if r.verdict == verdict]


def failures(measured: Measured, **tolerances: float) -> list[str]:
    named = {k.replace("_", " "): v for k, v in tolerances.items()}
    return of(judge(measured, TOLERANCES | named), "failed")


def runner(tmp_path: Path, seconds: float = 300, **settings: Any) -> Runner:
    (tmp_path / "logs").mkdir(exist_ok=True)
    given = {"device": "cpu", "dry": True, "ranks": 2, "lacking": {}, **settings}
    end = time.monotonic() + seconds
    return Runner(out=tmp_path, work=tmp_path, end=end, **given)


# What is reported


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("gpu-check") / "report"
    line = [sys.executable, "-m", "titans_pretrain", "gpu-check", "--dry-run", "--out", str(out)]
    return subprocess.run(line, capture_output=True, text=True, check=False), out


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_the_dry_run_runs_every_case_and_says_that_it_is_one(dry: Any) -> None:
    said, out = dry
    report = json.loads((out / "report.json").read_text())
    assert said.returncode == 0, said.stdout + said.stderr
    assert report["finished"] and report["dry_run"] and report["device"] == "cpu"
    text = (out / "report.md").read_text()
    for words in (said.stdout, text):
        assert "nothing ran on a GPU" in words
    assert text.startswith("# GPU check: CPU (no GPU was used)")
    assert f"| torch | {torch.__version__} |" in text
    assert sorted(p.name for p in out.iterdir()) == ["logs", "report.json", "report.md"]

    rows = report["rows"]
    assert [r["what"] for r in rows if r["verdict"] != "passed"] == [
        f"stage {stage}, offload: GPU memory saved" for stage in (1, 2, 3)
    ], "all else has run"
    told = {(r["case"].replace("repeat", "save"), r["what"]) for r in rows}
    asked = {(g.section, part) for g in GROUPS for part in g.parts if g.section != "reference"}
    assert asked <= told and len(told - asked) == 3
    ranks = [
        r["ranks"]
        for section in ("zero", "collectives", "layouts")
        for r in report["measured"][section].values()
    ]
    assert set(ranks) == {2}


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_the_dry_runs_values_are_those_computed_here(dry: Any) -> None:
    measured = json.loads((dry[1] / "report.json").read_text())["measured"]
    torch.set_num_threads(1)
    for variant in plan.VARIANTS:
        # Both sides are the CPU: equal to the last bit in fp32, close but not equal in bf16.
        reference, mine = measured["reference"][f"{variant} fp32"], measured["steps"]
        for what in ("losses", "norms"):
            assert mine[f"{variant} fp32"][what] == reference[what]
            assert worst(mine[f"{variant} bf16"][what], reference[what])[0] > 0
        config = small.run_config(TRY, variant, "fp32")
        where = {"dtype": torch.float32, "device": torch.device("cpu"), "recompute": False}
        plain = build_model(config.model, seed=0, **where)
        nats, labels = 0.0, 0
        for batch in made_batches(config, 1):
            logits, _ = plain(batch.tokens, batch.positions)
            nats += token_loss(logits, batch.labels)[batch.loss_mask].double().sum().item()
            labels += int(batch.loss_mask.sum())
        assert reference["losses"][0] == pytest.approx(nats / labels, rel=1e-6)
    for part in plan.SAVED:  # one device on both sides: all four ways are one
        save, to_cpu, back = (measured[s][part] for s in ("save", "to cpu", "back"))
        assert to_cpu["losses"] + back["losses"] == save["losses"][3:]
        assert to_cpu["contents"] | back["contents"] == save["contents"]


def test_a_broken_tolerance_or_value_turns_its_row_to_failed() -> None:
    assert failures(fine()) == []
    assert failures(fine(), memory_fp32=1e-9) == ["memory: fp32"]
    assert failures(fine(), matmul_bf16=1e-9) == ["matmul: bf16"]
    measured = fine()
    measured["steps"]["lmm fp32"]["losses"][1] *= 1.002
    assert failures(measured) == ["steps: lmm fp32"]
    assert failures(measured, steps_fp32=3e-3) == []
    measured["steps"]["mac bf16"]["norms"][0] = float("nan")
    assert failures(measured) == ["steps: lmm fp32", "steps: mac bf16"]
    measured = fine()
    measured["memory"]["bf16"]["errors"]["ragged"]["d q"] = "Infinity"
    measured["collectives"]["send"]["wrong"] = 1.0
    measured["layouts"]["tensor"]["norms"][1] = 2.1
    measured["train"]["170m mac"]["losses"] = [9.0, 10.0]
    wrong = ["memory: bf16", "collectives: send", "train: 170m mac", "layouts: tensor"]
    assert failures(measured) == wrong
    measured = fine()
    measured["reference"]["mac fp32"] = {"error": "exit code 1"}
    missing = ["steps: mac fp32", "steps: mac bf16", "layouts: tensor"]
    assert failures(measured) == ["reference: mac fp32", *missing]


def test_states_are_judged_to_the_bit_both_ways() -> None:
    for section, step in (("resume", "6"), ("resume", "3"), ("to cpu", "3"), ("back", "6")):
        measured = fine()
        measured[section]["mac bf16"]["contents"][step] = "x" * 64
        assert failures(measured) == [f"{section}: mac bf16"]
    measured = fine()
    measured["back"]["mac fp32"]["losses"][2] = 4.1
    assert failures(measured) == ["back: mac fp32"]

    # Two uninterrupted runs differ: not resume's fault. Deterministic algorithms decide.
    measured = fine()
    saved = measured["save"]["mac bf16"]
    again = {"losses": [4.0, 4.0004], "norms": [1.0, 1.0]}
    steady = {**copy.deepcopy(saved), "lacking": ["some_backward"]}
    steady["contents"]["6"] = "d" * 64
    saved |= {"same": False, "again": again, "deterministic": steady}
    assert failures(measured) == ["resume: mac bf16"]
    measured["resume"]["mac bf16"]["contents"]["6"] = "d" * 64
    assert failures(measured) == []
    (row,) = (r for r in judge(measured) if (r.case, r.what) == ("repeat", "mac bf16"))
    assert "differs by 1.0e-04; with deterministic algorithms bitwise equal" in row.figures
    steady["same"] = False
    assert failures(measured) == ["repeat: mac bf16"]

    # A save that crashed behind its first file: others have read that, and have nothing beside it.
    measured = fine()
    measured["save"]["mac bf16"] = {"error": "hang: killed after 90 s"}
    rows = [r for r in judge(measured) if r.verdict == "failed"]
    four = ("save", "resume", "to cpu", "back")
    assert [(r.case, r.what) for r in rows] == [(section, "mac bf16") for section in four]
    assert all("nothing to compare with" in r.figures for r in rows[1:])


def test_what_has_no_deterministic_algorithm_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that give other numbers each time, by an operation that has only one way to do so."""
    drawn = itertools.count()

    def train(step: Any, config: Any, first: int, last: int) -> dict[str, list[float]]:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return {"losses": [4.0 + next(drawn)] * saves.STRIDE, "norms": [1.0] * saves.STRIDE}

    monkeypatch.setattr(saves, "train", train)
    monkeypatch.setattr(saves, "_kept", lambda *_: (None, lambda number: f"{next(drawn)}"))
    task = replace(TRY, section="save", folder=str(tmp_path))
    (tmp_path / "mac-bf16").mkdir()
    try:
        saved = {**saves.save(task, "mac bf16"), "took_s": 1.0}
    finally:
        torch.use_deterministic_algorithms(False)
    measured = fine()
    measured["save"]["mac bf16"] = saved
    (row,) = (r for r in judge(measured) if (r.case, r.what) == ("repeat", "mac bf16"))
    assert row.verdict == "failed"
    assert "with deterministic algorithms too (there are none for put_)" in row.figures
    assert saves._saved_on_device(task, "mac bf16") == "first"


def test_speed_and_memory_stand_beside_the_baseline() -> None:
    rows = {(r.case, r.what): r for r in judge(fine())}
    mac = rows["train", "170m mac"].figures
    # 8192 tokens / 2 s, the median; 1e14 FLOP / 2 s / 1e15.
    assert mac.startswith("4,096 tokens/s (0.25 x baseline), MFU 5.0%, peak 6.00 GiB (1.50 x")
    saved = rows["zero", "stage 1, offload: GPU memory saved"]
    assert (saved.verdict, saved.figures) == (
        "passed",
        "3.00 GiB at the peak; the optimizer state is 3.00 GiB",
    )
    measured = fine()
    measured["zero"]["stage 1, offload"]["peak_bytes"] = 8 * GIB
    assert failures(measured) == ["zero: stage 1, offload: GPU memory saved"]
    # Of steps with fewer rows tokens/s are compared, peaks are not.
    measured["train"]["170m mac"] |= {"rows": 1, "tokens": 4096, "flops": 5e13}
    measured["matmul"]["bf16"]["peak_flop_per_s"] = None
    rows = {(r.case, r.what): r for r in judge(measured)}
    beside = "2,048 tokens/s (0.12 x baseline at 2 rows, here 1), MFU 5.0%, peak 6.00 GiB;"
    assert rows["train", "170m mac"].figures.startswith(beside)
    measured["train"]["170m mac"]["plain"] = True  # steps of another kind are not compared
    rows = {(r.case, r.what): r for r in judge(measured)}
    assert rows["train", "170m mac"].figures.startswith("2,048 tokens/s, MFU")


def test_a_check_that_shows_nothing_has_not_passed() -> None:
    measured = fine()
    assert passed(judge(measured))
    for section in ("memory", "steps", "train"):
        skipped = {part: {"skipped": "no time"} for part in measured[section]}
        some = {**measured, section: skipped}
        rows = judge(some)
        assert not passed(rows) and of(rows, "failed") == []
        told = verdict({"finished": True, "dry_run": False}, rows)
        assert told.startswith("NOT PASSED: ") and told.endswith(f"has passed of: {section}")


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_and_the_report(
    broken: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    measured = fine()
    measured["layouts"]["context"] = {"skipped": "one GPU"}
    if broken:
        measured["zero"]["stage 3"] = {"error": "exit code 1: CUDA out of memory"}
    monkeypatch.setattr(command, "require_cuda", lambda: ("cuda", 1))
    monkeypatch.setattr(command, "missing", lambda env: {"engines": "DeepSpeed is not there"})
    monkeypatch.setattr(Runner, "__call__", lambda self, group: self.measured.update(measured))
    assert command.main(["--out", str(tmp_path)]) == code
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["device"] == "cuda" and report["finished"]
    bad = [row["what"] for row in report["rows"] if row["verdict"] == "failed"]
    assert bad == (["stage 3"] if broken else [])
    assert {"case", "what", "verdict", "seconds", "figures"} <= report["rows"][0].keys()
    text, said = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    count = len(report["rows"])
    line = f"{'FAILED' if broken else 'PASSED'}: {count - 1 - broken} passed, {int(broken)} failed"
    for words in (text, said):
        assert "2.0e-06 (d q of 'ragged'; 1 problems)" in words
        assert f"{line}, 1 skipped" in words
        assert "DRY" not in words and "NOT FINISHED" not in words
        assert ("CUDA out of memory" in words) is broken
    assert "| d q | 2.0e-06 | 2.0e-03 |" in text and "DeepSpeed is not there" in text
    assert "| stage 1, offload | 1 | 8,192 | 6.00 | 3.00 |" in text
    row = "| 170m mac | 268.4M | 2 rows, 8,192 tokens, recompute none | 2.000 | 4,096 | 0.25 | 5.0%"
    assert row in text
    assert "| step 2 |" + " 3.000000 |" * 3 + " 2.000000 |" * 3 in text


def test_a_report_of_nothing_can_be_written() -> None:
    names = ("command", "time", "commit", "device")
    header = {**dict.fromkeys(names, "x"), "seconds": 1.0, "lacking": {}}
    text = markdown({**header, "finished": False, "dry_run": False}, [], {})
    assert "NOT FINISHED" in text and "Nothing was measured." in text


# Time, crashes, what is missing


def test_what_crashes_or_hangs_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runner(tmp_path)
    run(Group("matmul", ("no such", "fp32"), "torch"))
    found = run.measured["matmul"]
    assert found["no such"]["error"].startswith("exit code 1: ")
    assert found["no such"]["error"].endswith("KeyError: 'no such'")
    assert found["fp32"]["wrong"] == 0.0
    hasty = replace(run, dry=False, measured={})
    hasty(Group("matmul", ("fp32",), "torch", least_s=0, most_s=0.2))
    assert hasty.measured["matmul"] == {"fp32": {"error": "hang: killed after 0 s"}}


def test_a_rank_that_crashes_is_quoted(tmp_path: Path) -> None:
    run = runner(tmp_path)
    run(Group("collectives", ("no such",), "torch", all_ranks=True))
    assert "KeyError: 'no such'" in run.measured["collectives"]["no such"]["error"]


def test_the_last_words_name_the_error() -> None:
    log = "Traceback\n  File\ntorch.OutOfMemoryError: CUDA out of memory.\na\n\nb\nrank 0 failed\n"
    said = "torch.OutOfMemoryError: CUDA out of memory. / a / b / rank 0 failed"
    assert last_words(log) == said
    assert last_words("a\nValueError: no\n") == "a / ValueError: no"
    assert last_words("") == "no word"


def test_what_does_not_fit_in_time_is_skipped(tmp_path: Path) -> None:
    late = runner(tmp_path, seconds=20, dry=False)
    late(Group("train", ("170m mac",), least_s=30))
    (why,) = late.measured["train"].values()
    assert why["skipped"].endswith("s were left, it needs about 30")
    assert of(judge(late.measured), "skipped") == ["train: 170m mac"]

    cut = runner(tmp_path, seconds=0.5, dry=False)
    cut(Group("matmul", ("fp32",), "torch", least_s=0))
    assert cut.measured["matmul"]["fp32"]["skipped"].startswith("not finished after")


def test_needed_time_follows_what_was_measured() -> None:
    large = next(g for g in GROUPS if "340m mag" in g.parts)
    (one,) = (g for g in plan.processes([large], dry=False) if g.parts == ("340m mag",))
    assert plan.needed_s(one, {}, dry=False) == one.least_s
    measured = {"train": {"170m mag": {"seconds": [3.0, 2.0]}}}
    expected = plan.START_S + 5 * 2.0 * (4.285 * 4 / 3 / 1.415)
    assert plan.needed_s(one, measured, dry=False) == pytest.approx(expected)
    assert plan.needed_s(one, {"train": {"170m mag": {"skipped": "x"}}}, dry=False) == one.least_s


def test_the_plan_holds_each_case_in_order_of_worth() -> None:
    started = list(plan.processes(GROUPS, dry=False))
    alone = [g.parts for g in started if g.section in ("train", "zero", "layouts")]
    assert [len(parts) for parts in alone] == [5, 1, 1, 4, 1, 1, 1, 1, 1, 1]
    flat = [part for g in started for part in g.parts]
    assert flat == [part for g in GROUPS for part in g.parts]
    assert {g.section for g in GROUPS} == child.MEASURES.keys()
    trained = {f"170m {v}" for v in plan.VARIANTS} | {"340m transformer", "340m mag"}
    assert {p for g in GROUPS if g.section == "train" for p in g.parts} == trained
    dry = list(plan.processes(GROUPS, dry=True))
    assert [part for g in dry for part in g.parts] == flat and len(dry) < len(started)


TENSORS = (torch.Tensor, torch.nn.Parameter)


def on_one_rank() -> dict[str, Any]:
    """What each ZeRO row measures in one process, and the bytes of the tensors left of it."""
    found, task = {}, replace(TRY, section="zero")
    for part in plan.ZERO:
        found[part] = {**large.zero(task, part), "took_s": 1.0}
        large.let_go(task)
        left = [x.untyped_storage() for x in gc.get_objects() if type(x) in TENSORS]
        found[part]["left"] = sum({s.data_ptr(): s.nbytes() for s in left}.values())
    return found


@pytest.mark.slow
def test_one_gpu_runs_every_zero_row_and_those_of_one_process_leave_nothing() -> None:
    """Each stage with one rank, which the dry run never has; and what shares a process on a GPU
    must not fill it."""
    (found,) = run_world(on_one_rank, 1)
    assert len(found) == 6 and all(r["ranks"] == 1 for r in found.values())
    rows = judge({"zero": found})
    assert [r.verdict for r in rows].count("passed") == 6 and of(rows, "failed") == []
    assert found["stage 1"]["held_bytes"]["optimizer state"] > 400_000
    assert max(found[part]["left"] for part in plan.FREED) < 100


def test_groups_that_cannot_run_say_why(tmp_path: Path) -> None:
    lone = runner(tmp_path, ranks=1, lacking={"engines": "no DeepSpeed"})
    for group in (Group("zero", ("stage 1",)), Group("layouts", ("data",), "torch")):
        lone(group)
    lone(Group("back", ("mac bf16",), "torch", after="to cpu"))
    assert lone.measured == {
        "zero": {"stage 1": {"skipped": "no DeepSpeed"}},
        "layouts": {"data": {"skipped": "one GPU: there is nothing to divide"}},
        "back": {"mac bf16": {"skipped": "it reads what 'to cpu' saves, which saved nothing"}},
    }


ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def without(folder: Path, *names: str) -> dict[str, str]:
    """The environment of processes that cannot import these packages."""
    (folder / "sitecustomize.py").write_text(ABSENT.format(names=set(names)))
    env = environment("cpu")
    return {**env, "PYTHONPATH": f"{folder}{os.pathsep}{env['PYTHONPATH']}"}


@pytest.mark.slow
def test_missing_packages_are_named_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = without(tmp_path, "deepspeed", "megatron")
    lacking = packages.missing(env)
    assert list(lacking) == ["engines"]
    assert "Megatron-core and DeepSpeed cannot be imported: " in lacking["engines"]
    assert lacking["engines"].endswith(
        ("No module named 'megatron'", "No module named 'deepspeed'")
    )
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    run = runner(tmp_path, lacking=lacking)
    run(Group("steps", ("lmm fp32",), "models"))
    run(Group("reference", ("lmm fp32",), "models", on_cpu=True))
    run(Group("train", ("170m mac",), "models"))
    run(Group("save", ("mac bf16",), "models"))
    run(Group("resume", ("mac bf16",), after="save"))
    rows = judge(run.measured)
    assert [r.verdict for r in rows] == ["passed"] * 3 + ["skipped"]
    assert "plain steps, without Megatron-core and DeepSpeed" in rows[0].figures


@pytest.mark.slow
def test_without_pydantic_the_memory_is_still_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = without(tmp_path, "deepspeed", "megatron", "pydantic", "yaml")
    assert list(packages.missing(env)) == ["models", "engines"]
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    run = runner(tmp_path)
    run(Group("memory", ("fp32",), "torch"))
    assert failures(run.measured) == [] and "errors" in run.measured["memory"]["fp32"]


def test_an_import_without_an_end_is_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(20)\n")
    monkeypatch.setattr(packages, "NEEDS", {"torch": (("endless",), "torch")})
    monkeypatch.setattr(packages, "IMPORT_S", 0.5)
    found = packages.missing(environment("cpu", (tmp_path,)))
    assert found == {"torch": "torch cannot be imported: not done after 0.5 s"}


def test_wheels_stand_in_for_what_is_not_installed(tmp_path: Path) -> None:
    wheels, folder = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    with pytest.raises(ConfigError, match="no wheels"):
        packages.unpack(wheels, folder)
    for name in ("not_installed_here", "torch_extra", "numpy"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-cp39-cp39-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "there = 1")
    assert packages.unpack(wheels, folder) == ["not_installed_here-1.0-cp39-cp39-any.whl"]
    assert [p.name for p in folder.iterdir()] == ["not_installed_here"]
    env = environment("cpu", (folder,))
    line = [sys.executable, "-c", "import not_installed_here as n, numpy; print(n.there)"]
    assert subprocess.run(line, env=env, capture_output=True, text=True).stdout == "1\n"
    assert importlib.metadata.version("numpy")


def test_without_cuda_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "report"
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        command.main(["--out", str(out)])
    assert cli.main(["gpu-check", "--out", str(out)]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not out.exists()


# What is measured


@pytest.mark.slow
def test_plain_steps_are_those_of_the_engines(tmp_path: Path) -> None:
    engines, plain = runner(tmp_path), runner(tmp_path, lacking={"engines": "not there"})
    for run in (engines, plain):
        run(Group("steps", ("mac fp32", "mac bf16"), "models"))
    for part, limit in (("mac fp32", 1e-5), ("mac bf16", 3e-3)):
        mine, theirs = (run.measured["steps"][part] for run in (plain, engines))
        assert mine["plain"] and "plain" not in theirs
        for what in ("losses", "norms"):
            assert len(mine[what]) == 6 and worst(mine[what], theirs[what])[0] < limit


def test_what_does_not_fit_in_memory_is_known_before() -> None:
    task = replace(TRY, dry=False)
    many = large_config(task, "170m", "transformer", {"stage": 1})
    half = large_config(task, "170m", "transformer", {"stage": 1}, rows=8)
    assert many.train.micro_batch == 16 and many.data.sequence_length == 4096
    held = 24 * 134_105_856
    working = needed_bytes(many) - held
    assert needed_bytes(half) - held == pytest.approx(working / 2, rel=0.05)
    assert 1 * GIB < working < 40 * GIB


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
