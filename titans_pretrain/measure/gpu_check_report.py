"""The verdicts of `titans-pretrain gpu-check`, and its report for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MODELS, PRECISIONS = ("transformer", "lmm", "mac"), ("fp32", "bf16")
CASES = [f"{model} {precision}" for precision in PRECISIONS for model in MODELS]

# Largest relative differences allowed. On a CPU rounding alone makes: memory 3e-6 and 4e-3; steps
# 2e-6 (rows summed in another order) and 5e-3.
TOLERANCES = {
    "memory fp32": 1e-4,
    "memory bf16": 5e-2,
    "steps fp32": 1e-3,
    "steps bf16": 3e-2,
}

Measured = dict[str, dict[str, dict[str, Any]]]  # section -> case -> what it measured, or "error"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    case: str
    verdict: str  # "PASS" | "FAIL" | "info": measured, nothing is asserted
    measured: str
    allowed: str = ""


def judge(measured: Measured, tolerances: dict[str, float]) -> list[Row]:
    """Every case's row; a case that crashed, hung or did not run is a FAIL."""
    rows = []
    for section, cases in measured.items():
        for case, result in cases.items():
            if "error" in result:
                rows.append(Row(section, case, "FAIL", result["error"]))
    good = {s: {c: r for c, r in cs.items() if "error" not in r} for s, cs in measured.items()}
    rows += _memory_rows(good["memory"], tolerances)
    rows += _step_rows(good["reference"], good["steps"], tolerances)
    rows += _run_rows(good["run"])
    for case, r in good["speed"].items():
        peak = r["peak_bytes"]
        peak = "no peak on a CPU" if peak is None else f"peak {peak / 2**30:.2f} GiB"
        words = f"{r['tokens_per_s']:,.0f} tokens/s, {r['seconds']:.4f} s, {peak} ({r['size']})"
        rows.append(Row("speed", case, "info", words))
    return rows


def _within(found: float, allowed: float) -> str:
    return "PASS" if found <= allowed else "FAIL"  # a NaN is not within


def _memory_rows(memory: dict[str, Any], tolerances: dict[str, float]) -> Iterator[Row]:
    for case, result in memory.items():
        if case == "machine":
            continue
        errors = {name: float(e) for name, e in result["errors"].items()}
        worst, allowed = max(errors, key=lambda n: errors[n]), tolerances[f"memory {case[-4:]}"]
        words = f"{errors[worst]:.1e} ({worst}; y {errors['y']:.1e}; {len(errors)} tensors)"
        yield Row("memory", case, _within(errors[worst], allowed), words, f"{allowed:.0e}")


def worst(mine: Sequence[float], reference: Sequence[float]) -> tuple[float, int]:
    """(largest relative difference, the step it is at, from 1)."""
    gaps = [abs(float(a) - b) / max(abs(b), 1e-30) for a, b in zip(mine, reference, strict=True)]
    gap = max(gaps, key=lambda x: (x != x, x))
    return gap, gaps.index(gap) + 1


def _step_rows(
    reference: dict[str, Any], steps: dict[str, Any], tolerances: dict[str, float]
) -> Iterator[Row]:
    for case, mine in steps.items():
        model, precision = case.split()
        cpu = reference.get(f"{model} fp32")
        if cpu is None:
            yield Row("steps", case, "FAIL", "nothing to compare with: the CPU's steps failed")
            continue
        allowed = tolerances[f"steps {precision}"]
        for key, what in (("losses", "loss"), ("norms", "gradient norm")):
            gap, step = worst(mine[key], cpu[key])
            words = f"{gap:.1e} (at step {step}; {mine[key][0]:.4f} .. {mine[key][-1]:.4f})"
            verdict = _within(gap, allowed)
            yield Row("steps", f"{case}, {what}", verdict, words, f"{allowed:.0e}")


def _run_rows(run: dict[str, Any]) -> Iterator[Row]:
    """Resuming must give the very state of the uninterrupted run; where two uninterrupted runs
    differ by default, then under deterministic algorithms."""
    kinds = ("straight", "again", "resumed")
    for case in CASES:
        if any(f"{kind} {case}" not in run for kind in kinds):
            continue  # the missing one's own row says why
        straight, again, resumed = (run[f"{kind} {case}"] for kind in kinds)
        steady, words, how = straight["content"] == again["content"], "bitwise equal", ""
        if not steady:
            gap = max(worst(again[k], straight[k])[0] for k in ("losses", "norms"))
            words = f"not bitwise equal; loss or gradient norm differs by {gap:.1e}"
        yield Row("run", f"{case}, the same steps twice", "info", words)
        if not steady:
            names = [f"{kind}/deterministic {case}" for kind in ("straight", "resumed")]
            if any(name not in run for name in names):
                continue
            straight, resumed = (run[name] for name in names)
            how = ", with deterministic algorithms"
            if straight["not_deterministic"]:
                how += f" (there are none for {', '.join(straight['not_deterministic'])})"
        a, b = straight["content"], resumed["content"]
        words = f"equal{how}: {b[:12]}" if a == b else f"{b[:12]}, uninterrupted {a[:12]}{how}"
        verdict = "PASS" if a == b else "FAIL"
        yield Row("run", f"{case}, 3 + 3 steps resumed = 6", verdict, words, "same sha256")


def verdict(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """One line; a dry run says in it that it is one."""
    failed = sum(row.verdict == "FAIL" for row in rows)
    passed = sum(row.verdict == "PASS" for row in rows)
    line = f"FAIL: {failed} rows failed, {passed} passed" if failed else f"PASS: all {passed} rows"
    if report["dry_run"]:
        line += ". DRY RUN on the CPU at tiny sizes: nothing ran on a GPU, this says nothing of one"
    return line


def console(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table of rows and the verdict, in plain text."""
    width = max(len(row.case) for row in rows)
    lines = [
        f"{r.verdict:4}  {r.section:9}  {r.case:{width}}  {r.measured}"
        + (f"  [{r.allowed}]" if r.allowed else "")
        for r in rows
    ]
    return "\n".join(["", *lines, "", verdict(report, rows)])


def markdown(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The report for a lab log."""
    measured: Measured = report["measured"]
    machine = measured["memory"].get("machine", {}).get("machine", {})
    lines = [f"# GPU check: {machine.get('device', 'unknown device')}, {report['time']}", ""]
    lines += [f"**{verdict(report, rows)}.**", ""]
    command = "titans-pretrain gpu-check" + (" --dry-run" if report["dry_run"] else "")
    lines += [f"`{command}`, {report['seconds']:.0f} s, source {report['commit']}", ""]
    lines += _table(["machine", ""], machine.items())
    lines += ["## Results", "", *_legend(report["dry_run"])]
    lines += _table(
        ["", "section", "case", "measured", "allowed"],
        [(r.verdict, r.section, r.case, r.measured, r.allowed) for r in rows],
    )
    lines += ["## Memory: largest relative error of each tensor, over all problems", ""]
    lines += _table(["tensor", *PRECISIONS], _tensors(measured["memory"]))
    lines += ["## Training steps: loss (nats a label) and gradient norm", ""]
    for model in MODELS:
        columns = [measured["reference"].get(f"{model} fp32", {})]
        columns += [measured["steps"].get(f"{model} {p}", {}) for p in PRECISIONS]
        where = "CPU again," if report["dry_run"] else "GPU"
        heads = ["CPU fp32", *(f"{where} {p}" for p in PRECISIONS)]
        heads = [f"{what} {h}" for what in ("loss", "norm") for h in heads]
        lines += _table([model, *heads], _side_by_side(columns))
    return "\n".join(lines)


def _legend(dry: bool) -> list[str]:
    where = "the CPU again (dry run)" if dry else "the GPU"
    text = f"""memory: the chunked memory on {where}, TF32 off, against the oracle (token by token,
autograd, float64, CPU); max |a - b| / max |b| of outputs, final state and every gradient; bf16:
q, k, v, y in bfloat16, both sides from the same rounded values. steps: the same training
steps through Megatron's schedule and DeepSpeed's ZeRO-1 against the CPU in fp32, largest relative
difference. run: sha256 over weights, moments and random numbers after saving, loading in a new
process and going on. speed: whole training steps, or forward and backward of one memory; info
rows assert nothing."""
    return [text, ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines)
    return [*(f"| {line} |" for line in cells), ""]


def _tensors(memory: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    largest: dict[str, dict[str, float]] = {}
    for case, result in memory.items():
        for name, e in result.get("errors", {}).items():
            seen = largest.setdefault(name, {})
            seen[case[-4:]] = max(seen.get(case[-4:], 0.0), float(e))
    for name, seen in largest.items():
        yield [name, *(f"{seen[p]:.1e}" if p in seen else "" for p in PRECISIONS)]


def _side_by_side(columns: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    steps = max(len(c.get("losses", [])) for c in columns)
    for s in range(steps):
        if s < 2 or (s + 1) % 5 == 0:
            values = [c.get(k) for k in ("losses", "norms") for c in columns]
            yield [f"step {s + 1}", *("" if v is None else f"{v[s]:.6f}" for v in values)]
