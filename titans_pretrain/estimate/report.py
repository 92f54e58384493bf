"""A plan as people and programs read it: tables, CSV, JSON, a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titans_pretrain.config import HardwareConfig, RunConfig
from titans_pretrain.estimate.choose import (
    GIB,
    Candidate,
    arguments,
    cheapest_change,
    difference,
)
from titans_pretrain.estimate.portion import portion_of
from titans_pretrain.estimate.traffic import Transfer, transfers
from titans_pretrain.model.counts import flops_per_token, parameter_count


def lines(
    config: RunConfig,
    hardware: HardwareConfig,
    own: Candidate | None,
    fitting: Sequence[Candidate],
    unfit: Sequence[Candidate],
    *,
    tokens: float,
    top: int,
    why_not: str = "",
) -> Iterator[str]:
    """The whole plan as text. why_not: why the config's own layout is not legal here."""
    gpus = (fitting or unfit)[0].layout.world_size
    yield from _head(config, hardware, gpus, tokens)
    yield ""
    if own is None:
        yield f"as the config has it: not legal on {gpus} GPUs: {why_not}"
    else:
        yield "as the config has it: " + one_line(own, tokens)
        yield from ("  " + line for line in details(own))
        if not own.fits:
            yield "  " + remedy(own, fitting)
    yield ""
    yield f"{len(fitting):,} of {len(fitting) + len(unfit):,} layouts fit; the fastest:"
    yield from table(fitting[:top], tokens)
    if fitting:
        best = difference(own, fitting[0]) if own is not None else fitting[0].choice
        yield f"the first: {arguments(best) or 'as the config has it'}"
    if unfit:
        yield ""
        yield "nearest to fitting:"
        for candidate in unfit[:3]:
            yield f"  {name(candidate)}: {remedy(candidate, fitting)}"


def _head(config: RunConfig, hardware: HardwareConfig, gpus: int, tokens: float) -> Iterator[str]:
    m, t = config.model, config.train
    parameters = sum(parameter_count(m).values())
    useful = flops_per_token(m, config.data.sequence_length, useful=True)
    flops = 3 * sum(useful.values())
    step = t.global_batch * config.data.sequence_length
    yield (
        f"{m.variant}, {m.blocks} x {m.width}, {parameters:,} parameters, {t.precision}; "
        f"{flops / 1e9:.2f} GFLOP a token; {step:,} tokens a step, {tokens:.3g} in all"
    )
    told = (f"{part.replace('_', ' ')} {n / 1e6:,.1f}" for part, n in useful.items() if n)
    yield f"MFLOP of a token's forward: {', '.join(told)}"
    usable = hardware.memory_gib.value - hardware.reserved_gib.value
    nodes = -(-gpus // hardware.gpus_per_node)
    yield (
        f"{gpus} x {hardware.name} in {nodes} node{'s' * (nodes > 1)}, {usable:.1f} GiB of each "
        "for tensors. Times are estimates: the hardware file says what they rest on"
    )


def name(c: Candidate) -> str:
    """Layout, rows and recompute, in short."""
    rows = c.config.train.micro_batch
    order = c.config.parallel.order
    return (
        c.layout.describe()
        + (f", {order}" if order != "FB" else "")
        + f", {rows} row{'s' * (rows > 1)}"
        + (", recompute" if c.config.train.recompute == "blocks" else "")
    )


def one_line(c: Candidate, tokens: float) -> str:
    verdict = "fits" if c.fits else f"DOES NOT FIT, {c.over / GIB:.1f} GiB too much"
    return (
        f"{name(c)}: {c.held.device / GIB:.1f} GiB, {verdict}; {c.pace.seconds:.2f} s a step, "
        f"{c.pace.tokens_per_s:,.0f} tokens/s, MFU {c.pace.mfu:.1%}, {c.days(tokens):.1f} days, "
        f"{c.gpu_hours(tokens):,.0f} GPU-hours"
    )


def details(c: Candidate) -> Iterator[str]:
    """Memory by kind, seconds by part, collectives."""
    kinds = {k: v / GIB for k, v in c.held.by_kind().items()}
    yield "GiB of a GPU: " + ", ".join(f"{k} {v:.2f}" for k, v in kinds.items() if v >= 0.005)
    if c.held.host:
        yield f"GiB of the host's memory a GPU: optimizer {c.held.host / GIB:.2f}"
    parts = c.pace.parts
    yield "seconds of a step: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items() if v >= 5e-4)
    for line in _collectives(c):
        yield f"a rank's step: {line}"


def _collectives(c: Candidate) -> Iterator[str]:
    found: dict[tuple[str, str, str], list[float]] = {}
    for t in moved(c):
        entry = found.setdefault((t.group, t.what, t.way), [0, 0.0])
        entry[0] += t.calls
        entry[1] += t.bytes
    for (group, what, way), (calls, size) in found.items():
        if size >= 2**20 and way != "recv":
            yield f"{calls:,.0f} x {way} among {group}: {what}, {size / 2**20:,.1f} MiB"


def moved(c: Candidate) -> list[Transfer]:
    """Collectives of a step of the last stage, amid its context ranks."""
    portion = portion_of(c.config, c.layout, c.layout.pipeline - 1)
    return list(transfers(portion, min(1, c.layout.context - 1)))


def remedy(c: Candidate, fitting: Sequence[Candidate]) -> str:
    """How much is too much, and the change that helps and costs least."""
    lacks = f"{c.held.device / GIB:.1f} GiB, {c.over / GIB:.1f} too much"
    better = cheapest_change(c, fitting)
    if better is None:
        return f"{lacks}; no layout of these GPUs fits: more GPUs, or a smaller model"
    slower = better.pace.seconds / c.pace.seconds - 1
    return (
        f"{lacks}; cheapest change: {arguments(difference(c, better))} "
        f"({better.held.device / GIB:.1f} GiB, {slower:+.0%} time)"
    )


def table(found: Sequence[Candidate], tokens: float) -> Iterator[str]:
    """One line a layout."""
    rows = [("GiB", "s/step", "tokens/s", "MFU", "bubble", "wave", "days", "GPU-hours", "layout")]
    for c in found:
        idle = c.pace.idle
        rows.append(
            (
                f"{c.held.device / GIB:.1f}",
                f"{c.pace.seconds:.2f}",
                f"{c.pace.tokens_per_s:,.0f}",
                f"{c.pace.mfu:.1%}",
                f"{idle.get('bubble', 0):.0%}",
                f"{idle.get('wave', 0):.0%}",
                f"{c.days(tokens):.1f}",
                f"{c.gpu_hours(tokens):,.0f}",
                name(c),
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        yield "  " + "  ".join([*cells, row[-1]])


def record(c: Candidate, tokens: float) -> dict[str, Any]:
    """A candidate as a row of the CSV, an object of the JSON. Bytes, seconds."""
    return {
        "layout": name(c),
        "fits": c.fits,
        "over_bytes": round(c.over),
        **c.choice,
        "data_parallel": c.layout.data_parallel,
        "micro_batches": c.layout.micro_batches,
        "device_bytes": round(c.held.device),
        "host_bytes": c.held.host,
        **{f"bytes_{k.replace(' ', '_')}": round(v) for k, v in c.held.by_kind().items()},
        "step_s": c.pace.seconds,
        "tokens_per_s": c.pace.tokens_per_s,
        "mfu": c.pace.mfu,
        "bubble": c.pace.idle.get("bubble", 0.0),
        "wave": c.pace.idle.get("wave", 0.0),
        "days": c.days(tokens),
        "gpu_hours": c.gpu_hours(tokens),
    }


def write_csv(path: Path, found: Sequence[Candidate], tokens: float) -> None:
    rows = [record(c, tokens) for c in found]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(
    path: Path,
    config: RunConfig,
    hardware: HardwareConfig,
    own: Candidate | None,
    found: Sequence[Candidate],
    tokens: float,
) -> None:
    """FLOPs by part, all layouts, and of the config's own one seconds and collectives."""
    T = config.data.sequence_length
    tree: dict[str, Any] = {
        "hardware": hardware.model_dump(),
        "tokens": tokens,
        "parameters": parameter_count(config.model),
        "forward_flops_per_token": flops_per_token(config.model, T),
        "layouts": [record(c, tokens) for c in found],
    }
    if own is not None:
        tree["own"] = {
            **record(own, tokens),
            "seconds": own.pace.parts,
            "collectives": [
                {"group": t.group, "way": t.way, "what": t.what, "calls": t.calls}
                | {"bytes": round(t.bytes)}
                for t in moved(own)
            ],
        }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
