"""The report: for people, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titans_pretrain.measure.gpu_check.judge import (
    GIB,
    Row,
    beside_baseline,
    good,
    not_shown,
    passed,
    peak_flops,
    speed,
)
from titans_pretrain.measure.gpu_check.plan import LARGER, PRECISIONS, TRAINED, VARIANTS, ZERO
from titans_pretrain.measure.gpu_check.processes import Measured


def verdict(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """One line; a dry run says in it that it is one."""
    count = Counter(row.verdict for row in rows)
    word = "PASSED" if passed(rows) else "FAILED" if count["failed"] else "NOT PASSED"
    line = f"{word}: " + ", ".join(
        f"{count[name]} {name}" for name in ("passed", "failed", "skipped")
    )
    if missing := not_shown(rows):
        line += f". Nothing has passed of: {', '.join(missing)}"
    if not report["finished"]:
        line += ". NOT FINISHED: it was cut short"
    if report["dry_run"]:
        line += ". DRY RUN on the CPU at tiny sizes: nothing ran on a GPU, this says nothing of one"
    return line


def console(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table of rows and the verdict, in plain text."""
    width = max((len(row.what) for row in rows), default=0)
    lines = [
        f"{r.verdict:7}  {r.case:12}  {r.what:{width}}  {_seconds(r):>6}  {r.figures}"
        + (f"  [{r.allowed}]" if r.allowed else "")
        for r in rows
    ]
    return "\n".join(["", *lines, "", verdict(report, rows)])


def _seconds(row: Row) -> str:
    return "" if row.seconds is None else f"{row.seconds:.1f}"


def write(out: Path, report: dict[str, Any], rows: Sequence[Row], measured: Measured) -> None:
    """Writes report.json and report.md."""
    whole = {**report, "rows": [asdict(row) for row in rows], "measured": measured}
    # Infinity is no JSON; a report that cannot be read elsewhere would be no report.
    text = json.dumps(json.loads(json.dumps(whole), parse_constant=str), indent=1)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report, rows, measured), encoding="utf-8")


def markdown(report: dict[str, Any], rows: Sequence[Row], measured: Measured) -> str:
    """The report for a lab log."""
    found = good(measured, "machine", "names")
    machine = {} if found is None else found["machine"]
    lines = [f"# GPU check: {machine.get('device', 'unknown device')}, {report['time']}", ""]
    lines += [f"**{verdict(report, rows)}.**", ""]
    lines += [f"`{report['command']}`, {report['seconds']:.0f} s, source {report['commit']}", ""]
    lines += ["## Machine", "", *_table(["machine", ""], machine.items())]
    if report["lacking"]:
        lines += ["What is missing, and so was not checked or done in plain torch:", ""]
        lines += [*(f"- {why}" for why in report["lacking"].values()), ""]
    lines += _training(measured)
    lines += _zero(measured)
    lines += ["## Results", "", _LEGEND, ""]
    lines += _table(
        ["verdict", "case", "what", "seconds", "figures", "allowed"],
        [(r.verdict, r.case, r.what, _seconds(r), r.figures, r.allowed) for r in rows],
    )
    lines += ["## Memory: largest relative error of each tensor, over all problems", ""]
    lines += _table(["tensor", *PRECISIONS], _tensors(measured))
    lines += ["## Training steps: loss (nats a label) and gradient norm", ""]
    for variant in VARIANTS:
        columns = [good(measured, "reference", f"{variant} fp32") or {}]
        columns += [good(measured, "steps", f"{variant} {p}") or {} for p in PRECISIONS]
        heads = ["CPU fp32", *(f"{report['device']} {p}" for p in PRECISIONS)]
        heads = [f"{what} {h}" for what in ("loss", "norm") for h in heads]
        lines += _table([variant, *heads], _side_by_side(columns))
    return "\n".join(lines)


_LEGEND = """memory: the chunked memory on the device, TF32 off, against the oracle (token by token,
autograd, float64, CPU): max |a - b| / max |b| of outputs, final state and every gradient; bf16: q,
k, v, y in bfloat16, both sides from the same rounded values. steps: a small model's steps through
Megatron's schedule and DeepSpeed's ZeRO-1 against the CPU's in fp32. train: the paper's sizes, one
repeated micro-batch. repeat, resume, to cpu, back: sha256 over weights, moments and random numbers;
the last two carry a state from the device to the CPU and back. layouts: a small model divided over
the ranks, against one CPU process. A skipped row says why.""".replace("\n", " ")


def _training(m: Measured) -> Iterator[str]:
    peak = peak_flops(m)
    rows = []
    for part in (*TRAINED, *LARGER):
        r = good(m, "train", part)
        if r is None:
            continue
        s, ratio = speed(r, m), beside_baseline(part, r, m) or {}
        held = ", ".join(f"{n} {b / GIB:.2f}" for n, b in r["held_bytes"].items())
        rows.append(
            (
                part,
                f"{r['parameters'] / 1e6:.1f}M",
                f"{r['rows']} rows, {r['tokens']:,} tokens, recompute {r['recompute']}",
                f"{s['seconds']:.3f}",
                f"{s['tokens_per_s']:,.0f}",
                _ratio(ratio.get("tokens_per_s")),
                "" if s["mfu"] is None else f"{s['mfu']:.1%}",
                f"{s['peak_gib']:.2f}",
                _ratio(ratio.get("peak_gib")),
                f"{r['predicted_bytes'] / GIB:.2f}",
                held,
            )
        )
    yield from ("## Training", "")
    if not rows:
        yield from ("Nothing was measured.", "")
        return
    yield "Median of three steps after two. MFU: model FLOPs of the forward, times three, over "
    yield f"{peak[1]}, {peak[0] / 1e12:,.1f} TFLOP/s." if peak else "a peak that was not measured."
    yield from ("", *_table(_TRAINING, rows))


_TRAINING = (
    "model",
    "parameters",
    "step",
    "s a step",
    "tokens/s",
    "x baseline",
    "MFU",
    "peak GiB",
    "x baseline",
    "predicted GiB",
    "held GiB",
)


def _ratio(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _zero(m: Measured) -> Iterator[str]:
    rows = []
    for part in ZERO:
        if (r := good(m, "zero", part)) is not None:
            whole = good(m, "zero", part.partition(",")[0])
            saves = "," in part and whole is not None and r["reserved_bytes"] is not None
            saved = (
                f"{(whole['peak_bytes'] - r['peak_bytes']) / GIB:.2f}" if saves and whole else ""
            )
            s = speed(r, m)
            tokens = f"{s['tokens_per_s']:,.0f}"
            rows.append((part, str(r["ranks"]), tokens, f"{s['peak_gib']:.2f}", saved))
    if rows:
        head = ["ZeRO (170m mac)", "ranks", "tokens/s", "peak GiB", "GiB saved by offload"]
        yield from ("## ZeRO", "", *_table(head, rows))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    cells = (" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in lines)
    return [*(f"| {line} |" for line in cells), ""]


def _tensors(m: Measured) -> Iterator[list[str]]:
    largest: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        for errors in (good(m, "memory", precision) or {"errors": {}})["errors"].values():
            for name, e in errors.items():
                seen = largest.setdefault(name, {})
                seen[precision] = max(seen.get(precision, 0.0), float(e))
    for name, seen in largest.items():
        yield [name, *(f"{seen[p]:.1e}" if p in seen else "" for p in PRECISIONS)]


def _side_by_side(columns: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    steps = max(len(c.get("losses", [])) for c in columns)
    for s in range(steps):
        if s < 2 or (s + 1) % 5 == 0:
            values = [c.get(k) for k in ("losses", "norms") for c in columns]
            yield [f"step {s + 1}", *("" if v is None else f"{float(v[s]):.6f}" for v in values)]
