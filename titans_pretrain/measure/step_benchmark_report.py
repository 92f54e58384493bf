"""The table of `titans-pretrain bench step`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# In the order of a step; what is not among them comes last.
PHASES = (
    "data",
    "count",
    "forward",
    "recompute",
    "backward",
    "gradient scan",
    "reduce",
    "clip",
    "optimizer",
    "gather",
    "watch",
    "other",
)


def table(figures: dict[str, Any]) -> str:
    """What `measure` found, for the console."""
    return "\n".join(_lines(figures))


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    seconds, flops = figures["seconds"], figures["flops"]
    whole, best = sum(seconds.values()), figures["matmul_flop_per_s"]
    yield figures["what"]
    yield ""
    yield f"{'':<20}{'ms':>10}{'%':>8}{'GFLOP':>10}{'GFLOP/s':>10}{'of matmul':>11}"
    by_phase: dict[str, dict[str, float]] = {}
    for key, took in seconds.items():
        name, _, part = key.partition(" / ")
        by_phase.setdefault(name, {})[part] = took
    order = {name: i for i, name in enumerate(PHASES)}
    for name in sorted(by_phase, key=lambda name: order.get(name, len(PHASES))):
        parts = by_phase[name]
        of_phase = sum(n for key, n in flops.items() if key.startswith(f"{name} / "))
        yield _row(name, sum(parts.values()), whole, of_phase, best)
        for part, took in sorted(parts.items(), key=lambda item: -item[1]):
            if part:
                yield _row(f"  {part}", took, whole, flops.get(f"{name} / {part}", 0.0), best)
    yield _row("a step, watched", whole, whole, 0.0, best)
    step = figures["step_s"]
    model = sum(n for key, n in flops.items() if not key.startswith("recompute"))
    yield _row("a step, left alone", step, whole, model, best)
    yield ""
    ranks = figures["ranks"]
    yield (
        f"{figures['tokens'] / step:,.0f} tokens/s ({figures['labels'] / step:,.0f} of them with a "
        f"label), {ranks * model / step / 1e9:,.1f} GFLOP/s in all"
    )
    yield (
        f"a rank's square matrix product ({figures['matmul_dtype']}): {best / 1e9:,.1f} GFLOP/s; "
        f"model FLOP utilisation {100 * model / step / best:.1f} %"
    )
    held = figures["memory_bytes"]
    yield "memory of a rank: " + ", ".join(f"{kind} {_size(n)}" for kind, n in held.items())
    found = figures["collectives"]
    calls = (f"{name} {c['calls']} ({_size(c['bytes'])})" for name, c in sorted(found.items()))
    yield "collectives of a step and rank: " + (", ".join(calls) or "none")
    if figures.get("plan") is not None:
        yield from _beside_plan(figures)


def _beside_plan(figures: dict[str, Any]) -> Iterator[str]:
    plan, held = figures["plan"], figures["memory_bytes"]
    ratio = figures["step_s"] / plan["step_s"]
    parts = sorted(plan["parts"].items(), key=lambda item: -item[1])
    told = ", ".join(f"{part} {1e3 * s:,.2f} ms" for part, s in parts if s >= 5e-5)
    yield ""
    yield (
        f"a plan for {plan['hardware']}: {1e3 * plan['step_s']:,.2f} ms a step, of which the one "
        f"left alone took {ratio:.2f} times: {told}"
    )
    b = plan["bytes"]
    made = b["activations"] + b["memory states"] + b["logits"] + b["working"] + b["gradients"]
    found = {"parameters": b["parameters"], "optimizer state": b["optimizer"]}
    found["made in a step, at most"] = made + b["buffers"]
    compared = (f"{k} {_size(v)} ({held[k] / v:.2f} times)" for k, v in found.items())
    yield "its memory of a rank: " + ", ".join(compared)


def _row(name: str, took: float, whole: float, flops: float, best: float) -> str:
    line = f"{name:<20}{1e3 * took:>10.2f}{100 * took / whole:>8.1f}"
    if flops and took:
        rate = flops / took
        line += f"{flops / 1e9:>10.3f}{rate / 1e9:>10.2f}{100 * rate / best:>10.1f}%"
    return line


def _size(count: float) -> str:
    for unit, of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= of:
            return f"{count / of:,.1f} {unit}"
    return f"{count:.0f} bytes"
