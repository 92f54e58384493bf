"""The verdicts: what was measured, turned into rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titans_pretrain.measure.gpu_check.plan import BASELINE
from titans_pretrain.measure.gpu_check.processes import Measured

# Largest relative differences allowed. On a CPU rounding alone makes: memory 3e-6 and 4e-3; steps
# 2e-6 (rows summed in another order) and 5e-3.
TOLERANCES = {
    "matmul fp32": 0.0,
    "matmul bf16": 1e-2,
    "memory fp32": 1e-4,
    "memory bf16": 5e-2,
    "steps fp32": 1e-3,
    "steps bf16": 3e-2,
}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    case: str
    what: str
    verdict: str  # "passed" | "failed" | "skipped"
    seconds: float | None  # that it took, its process' start aside
    figures: str  # what was measured, or why not
    allowed: str = ""


def judge(measured: Measured, tolerances: Mapping[str, float] = TOLERANCES) -> list[Row]:
    """A row for every part, in the order in which they were measured."""
    rows: list[Row] = []
    for section, results in measured.items():
        for part, result in results.items():
            for why, verdict in (("error", "failed"), ("skipped", "skipped")):
                if why in result:
                    rows.append(Row(section, part, verdict, result.get("took_s"), result[why]))
                    break
            else:
                rows += _JUDGES[section](part, result, measured, tolerances)
    return rows


# Without a row of each that has passed nothing is known of the device.
ESSENTIAL = ("memory", "steps", "train")


def not_shown(rows: Sequence[Row]) -> list[str]:
    """The essential cases of which no row has passed."""
    shown = {row.case for row in rows if row.verdict == "passed"}
    return [case for case in ESSENTIAL if case not in shown]


def passed(rows: Sequence[Row]) -> bool:
    """Whether no row has failed, and one of each essential case has passed."""
    return not any(row.verdict == "failed" for row in rows) and not not_shown(rows)


def good(measured: Measured, section: str, part: str) -> dict[str, Any] | None:
    """What a part measured; None where it did not."""
    found = measured.get(section, {}).get(part)
    return None if found is None or "error" in found or "skipped" in found else found


def _row(
    case: str, what: str, passed: bool, result: dict[str, Any], figures: str, allowed: str = ""
) -> Row:
    if result.get("plain"):
        figures += "; plain steps, without Megatron-core and DeepSpeed"
    return Row(case, what, "passed" if passed else "failed", result["took_s"], figures, allowed)


Found = dict[str, Any]
Allowed = Mapping[str, float]


def _machine(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    names = r["machine"]
    yield _row("machine", part, True, r, f"{names['device']}, torch {names['torch']}")


def _matmul(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    words = f"{r['flop_per_s'] / 1e12:,.1f} TFLOP/s"
    if r["peak_flop_per_s"]:
        words += f", {r['flop_per_s'] / r['peak_flop_per_s']:.0%} of the device's peak"
    limit = allowed[f"matmul {part}"]
    words += f"; wrong by {r['wrong']:.0e}"
    yield _row("matmul", part, r["wrong"] <= limit, r, words, f"{limit:.0e}")


def _memory(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    errors = {(p, t): float(e) for p, by in r["errors"].items() for t, e in by.items()}
    problem, tensor = max(errors, key=lambda key: errors[key])
    limit, found = allowed[f"memory {part}"], errors[problem, tensor]
    words = f"{found:.1e} ({tensor} of '{problem}'; {len(r['errors'])} problems)"
    yield _row("memory", part, found <= limit, r, words, f"{limit:.0e}")


def worst(mine: Sequence[Any], reference: Sequence[Any]) -> tuple[float, int]:
    """(largest relative difference, the step it is at, from 1); of equally many steps, the first
    ones of the longer."""
    gaps = [abs(float(a) - float(b)) / max(abs(float(b)), 1e-30) for a, b in zip(mine, reference)]
    gap = max(gaps, key=lambda x: (x != x, x))
    return gap, gaps.index(gap) + 1


def _beside(mine: Found, other: Found, limit: float) -> tuple[bool, str]:
    """Whether losses and norms agree, and in words. A NaN does not."""
    (loss, at), (norm, there) = (worst(mine[k], other[k]) for k in ("losses", "norms"))
    ends = f"{float(mine['losses'][0]):.4f} .. {float(mine['losses'][-1]):.4f}"
    words = f"loss within {loss:.1e} (at step {at}; {ends}), gradient norm {norm:.1e} (at {there})"
    return loss <= limit and norm <= limit, words


_NO_CPU = "nothing to compare with: the CPU's steps are missing"


def _steps(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    variant, precision = part.split()
    reference = good(m, "reference", f"{variant} fp32")
    if reference is None:
        yield _row("steps", part, False, r, _NO_CPU)
        return
    limit = allowed[f"steps {precision}"]
    agrees, words = _beside(r, reference, limit)
    yield _row("steps", part, agrees, r, words, f"{limit:.0e}")


def _reference(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    return iter(())  # what the steps are compared with: no verdict of its own


def _collectives(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    rate = r["bytes"] / r["each_s"] / 1e9
    words = f"{r['ranks']} ranks, exact" if r["wrong"] == 0 else f"wrong by {r['wrong']:g}"
    words += (
        f"; {r['bytes'] / 2**20:,.1f} MiB a rank in {1e3 * r['each_s']:.2f} ms, {rate:.1f} GB/s"
    )
    yield _row("collectives", part, r["wrong"] == 0, r, words, "exact")


def peak_flops(m: Measured) -> tuple[float, str] | None:
    """(FLOP/s of one device in bf16, what that is): by its data sheet, else as measured."""
    found = good(m, "matmul", "bf16")
    if found is None:
        return None
    if found["peak_flop_per_s"]:
        return found["peak_flop_per_s"], "the device's peak by its data sheet"
    return found["flop_per_s"], "a matrix product measured here (no data sheet's peak known)"


def speed(r: Found, m: Measured) -> dict[str, float | None]:
    """Of a trained part: tokens/s of all ranks, MFU, peak GiB of one device."""
    seconds = statistics.median(r["seconds"])
    peak = peak_flops(m)
    mfu = r["flops"] / seconds / (r["ranks"] * peak[0]) if peak else None
    return {
        "tokens_per_s": r["tokens"] / seconds,
        "seconds": seconds,
        "mfu": mfu,
        "peak_gib": r["peak_bytes"] / GIB,
    }


def beside_baseline(part: str, r: Found, m: Measured) -> dict[str, float] | None:
    """Tokens/s and peak memory over those of the baseline of the same size, where it was measured
    in the same way; of steps with other rows tokens/s alone, and the baseline's rows."""
    base = good(m, "train", f"{part.split()[0]} {BASELINE}")
    if base is None or base["plain"] != r["plain"]:
        return None
    mine, theirs = speed(r, m), speed(base, m)
    ratios = {k: (mine[k] or 0.0) / (theirs[k] or 1.0) for k in ("tokens_per_s", "peak_gib")}
    if base["rows"] == r["rows"]:
        return ratios
    return {"tokens_per_s": ratios["tokens_per_s"], "rows": base["rows"]}


def _beside_plan(r: Found, peak_gib: float | None) -> str:
    """What `titans-pretrain plan` had said, where it knows the device."""
    plan = r.get("plan")
    if plan is None:
        return ""
    ratio = statistics.median(r["seconds"]) / plan["step_s"]
    words = f"; {ratio:.2f} x a plan's step"
    return f"{words}, {(peak_gib or 0.0) * GIB / plan['device_bytes']:.2f} x its memory"


def _learns(r: Found) -> tuple[bool, str]:
    losses = [float(x) for x in r["losses"]]
    words = f"loss {losses[0]:.3f} .. {losses[-1]:.3f}"
    return r["finite"] and losses[-1] < losses[0], words


def _train(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    passed, loss = _learns(r)
    s, ratio = speed(r, m), beside_baseline(part, r, m)
    words = f"{s['tokens_per_s']:,.0f} tokens/s"
    if ratio:
        other = f" at {ratio['rows']} rows, here {r['rows']}" if "rows" in ratio else ""
        words += f" ({ratio['tokens_per_s']:.2f} x baseline{other})"
    words += f", MFU {s['mfu']:.1%}" if s["mfu"] is not None else ""
    words += f", peak {s['peak_gib']:.2f} GiB"
    words += f" ({ratio['peak_gib']:.2f} x baseline)" if ratio and "peak_gib" in ratio else ""
    words += _beside_plan(r, s["peak_gib"])
    yield _row("train", part, passed, r, f"{words}; {loss}", "finite, falls")


def _zero(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    passed, loss = _learns(r)
    first, limit = good(m, "zero", "stage 1"), allowed["steps bf16"]
    words = f"{speed(r, m)['tokens_per_s']:,.0f} tokens/s, peak {r['peak_bytes'] / GIB:.2f} GiB"
    words += f", {r['ranks']} ranks; {loss}"
    if first is not None and part != "stage 1":
        agrees, how = _beside(r, first, limit)
        passed, words = passed and agrees, f"{words}; beside stage 1: {how.split(' (')[0]}"
    yield _row("zero", part, passed, r, words, f"{limit:.0e}")
    stage, _, offload = part.partition(", ")
    whole = good(m, "zero", stage)
    if offload and whole is not None:
        yield _saving(part, r, whole)


def saved_bytes(r: Found, whole: Found) -> tuple[int, float]:
    """(GPU memory that offload saves at the peak, what the optimizer state takes there)."""
    return whole["peak_bytes"] - r["peak_bytes"], 12 * r["parameters"] / r["ranks"]


def _saving(part: str, r: Found, whole: Found) -> Row:
    what = f"{part}: GPU memory saved"
    if r["reserved_bytes"] is None:
        return Row("zero", what, "skipped", None, "on a CPU there is no GPU memory to save")
    saved, state = saved_bytes(r, whole)
    words = f"{saved / GIB:.2f} GiB at the peak; the optimizer state is {state / GIB:.2f} GiB"
    verdict = "passed" if saved >= 0.5 * state else "failed"
    return Row("zero", what, verdict, None, words, f">= {0.5 * state / GIB:.2f} GiB")


def _layouts(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    reference, limit = good(m, "reference", "mac fp32"), allowed["steps fp32"]
    if reference is None:
        yield _row("layouts", part, False, r, _NO_CPU)
        return
    agrees, words = _beside(r, reference, limit)
    yield _row("layouts", part, agrees, r, f"{r['layout']}: {words}", f"{limit:.0e}")


def _save(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    how, passed = "bitwise equal", r["same"]
    if not passed:
        again = max(worst(r["again"][k], r[k])[0] for k in ("losses", "norms"))
        how, steady = f"differs by {again:.1e}", r["deterministic"]
        passed = steady["same"]
        how += f"; with deterministic algorithms {'bitwise equal' if passed else 'too'}"
        if steady["lacking"]:
            how += f" (there are none for {', '.join(steady['lacking'])})"
    words = f"6 steps twice: {how}, sha256 {r['contents']['6'][:12]}"
    yield _row("repeat", part, passed, r, words, "same sha256")


# A save that ended in an error may have left files before, which others have read.
_NO_SAVE = "nothing to compare with: 'save' was not finished"


def _steady(m: Measured, part: str) -> Found | None:
    saved = good(m, "save", part)
    return None if saved is None else saved.get("deterministic", saved)


def _resume(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    straight = _steady(m, part)
    if straight is None:
        yield _row("resume", part, False, r, _NO_SAVE)
        return
    equal = all(r["contents"][step] == straight["contents"][step] for step in ("3", "6"))
    mine, theirs = r["contents"]["6"][:12], straight["contents"]["6"][:12]
    words = f"3 + 3 steps {'equal' if equal else 'differ from'} 6: {mine}"
    words += "" if equal else f", uninterrupted {theirs}"
    yield _row("resume", part, equal, r, words, "same sha256")


def _across(section: str, step: str, begin: int) -> Any:
    def rows(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
        straight, limit = _steady(m, part), allowed[f"steps {part.split()[1]}"]
        if straight is None:
            yield _row(section, part, False, r, _NO_SAVE)
            return
        loaded = r["contents"][step] == r["from"]
        there = {k: straight[k][begin : begin + 3] for k in ("losses", "norms")}
        agrees, words = _beside(r, there, limit)
        how = "loaded to the bit" if loaded else "what was loaded is not what was saved"
        words = f"{how}; the 3 steps after it beside the device's: {words}"
        yield _row(section, part, loaded and agrees, r, words, f"same sha256, {limit:.0e}")

    return rows


def _memory_speed(part: str, r: Found, m: Measured, allowed: Allowed) -> Iterator[Row]:
    words = (
        f"{r['tokens_per_s']:,.0f} tokens/s, forward {r['forward_s']:.4f} s of {r['both_s']:.4f}"
    )
    if r["peak_bytes"] is not None:
        words += f", peak {r['peak_bytes'] / GIB:.2f} GiB"
    yield _row("memory speed", part, True, r, f"{words} ({r['size']})")


_JUDGES = {
    "machine": _machine,
    "matmul": _matmul,
    "memory": _memory,
    "steps": _steps,
    "reference": _reference,
    "collectives": _collectives,
    "train": _train,
    "save": _save,
    "resume": _resume,
    "to cpu": _across("to cpu", "3", 3),
    "back": _across("back", "6", 6),
    "zero": _zero,
    "layouts": _layouts,
    "memory speed": _memory_speed,
}
