"""Which rank is in which layer when: spans of all ranks on one clock, as a picture and as a trace.

The spans are those of a profiled run (its traces tell the time since 1970 by each host's clock), of
ranks that slept, or simulated.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from titans_pretrain.errors import DataError

_RANGE = re.compile(r"blocks\.(\d+) (forward|backward|recompute|waits for (gradient of )?\w+)")
_TRACE = re.compile(r"rank-(\d+)\.trace\.json\.gz")
WIDTH, LANE, GAP, LEFT, TOP = 1600, 30, 6, 60, 40  # pixels


@dataclass(frozen=True)
class Span:
    """A rank's time in a layer, or its wait there; seconds, from any moment that all share."""

    rank: int
    layer: int
    name: str  # forward, backward, recompute, or waits for ...
    begin: float
    end: float

    @property
    def waits(self) -> bool:
        return self.name.startswith("waits")


def read_traces(folder: Path) -> list[Span]:
    """The blocks and waits of all ranks that left a trace in a run's profile folder, by their
    beginning. Raises DataError if there is none, or none of a block."""
    found: list[Span] = []
    for path in sorted(folder.glob("rank-*.trace.json.gz")):
        match = _TRACE.fullmatch(path.name)
        if match is not None:
            found += _spans(int(match[1]), json.loads(gzip.decompress(path.read_bytes())))
    if not found:
        raise DataError(
            f"{folder}: no trace of a rank with ranges of blocks",
            "a run with profile.steps leaves rank-R.trace.json.gz in RUN/profile/step-A-B",
            "name that folder; train with profile.steps=[a,b] and profile.ranks=[0,1,..]",
        )
    return sorted(found, key=lambda span: (span.begin, span.rank, -span.end))


def _spans(rank: int, trace: dict[str, Any]) -> list[Span]:
    """The device's ranges, where there are any: a host only launches."""
    found: dict[str, list[Span]] = {"gpu_user_annotation": [], "user_annotation": []}
    start = trace.get("baseTimeNanoseconds", 0) / 1e9
    for event in trace["traceEvents"]:
        match = _RANGE.fullmatch(event.get("name", ""))
        if match is not None and event.get("cat") in found:
            begin = start + event["ts"] / 1e6
            span = Span(rank, int(match[1]), match[2], begin, begin + event["dur"] / 1e6)
            found[event["cat"]].append(span)
    return found["gpu_user_annotation"] or found["user_annotation"]


def merged_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """A trace for Perfetto with a process a rank."""
    first = min(span.begin for span in spans)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({span.rank for span in spans})
    ]
    for s in spans:
        name, ts, dur = f"blocks.{s.layer} {s.name}", (s.begin - first) * 1e6, s.end - s.begin
        events.append(
            {"ph": "X", "name": name, "pid": s.rank, "tid": 0, "ts": ts, "dur": dur * 1e6}
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def idle_shares(spans: Sequence[Span]) -> dict[int, float]:
    """Rank -> the share of the time from its first block to its last in which it waits."""
    shares = {}
    for rank in sorted({span.rank for span in spans}):
        mine = [s for s in spans if s.rank == rank]
        whole = max(s.end for s in mine) - min(s.begin for s in mine)
        shares[rank] = sum(s.end - s.begin for s in mine if s.waits) / whole
    return shares


def draw(lanes: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """An SVG picture: titled groups of spans, each from its own first moment on, in one scale."""
    whole = max(max(s.end for s in spans) - min(s.begin for s in spans) for _, spans in lanes)
    layers = 1 + max(s.layer for _, spans in lanes for s in spans)
    scale = (WIDTH - LEFT - 10) / whole
    out, y = [], TOP
    for title, spans in lanes:
        first, ranks = min(s.begin for s in spans), sorted({s.rank for s in spans})
        out.append(f'<text x="4" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 8
        rows = {rank: y + i * (LANE + GAP) for i, rank in enumerate(ranks)}
        out += [f'<text x="4" y="{top + 20}">rank {rank}</text>' for rank, top in rows.items()]
        # What lies inside another comes after it, and on top.
        for s in sorted(spans, key=lambda s: (s.waits, s.name == "recompute", s.begin)):
            out.append(_box(s, LEFT + (s.begin - first) * scale, rows[s.rank], scale, layers))
        y += len(ranks) * (LANE + GAP) + 28
        out += _axis(whole, scale, y - 24)
        y += 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        '<text x="4" y="16">a number is a layer, its colour too; pale: forward; dark: backward; '
        "white: waits for a neighbour</text>"
    )
    return "\n".join([head, *out, "</svg>"]) + "\n"


def _box(s: Span, x: float, y: float, scale: float, layers: int) -> str:
    width = max(0.5, (s.end - s.begin) * scale)
    light = {"forward": 78, "recompute": 65}.get(s.name, 48)
    fill = "white" if s.waits else f"hsl({300 * s.layer // layers},65%,{light}%)"
    inset = 5 if s.waits else 0
    told = f"rank {s.rank}, layer {s.layer} {s.name}, {1e3 * (s.end - s.begin):.2f} ms"
    label = "" if s.waits or width < 16 else f"{s.layer}"
    return (
        f'<g><title>{escape(told)}</title><rect x="{x:.1f}" y="{y + inset:.0f}" '
        f'width="{width:.1f}" height="{LANE - 2 * inset}" fill="{fill}" stroke="#444" '
        f'stroke-width="0.5"/><text x="{x + 3:.1f}" y="{y + 20:.0f}">{label}</text></g>'
    )


def _axis(whole: float, scale: float, y: float) -> list[str]:
    return [
        f'<text x="{LEFT + whole * scale * i / 10:.0f}" y="{y + 10:.0f}" fill="#666">'
        f"{1e3 * whole * i / 10:.0f}{' ms' if i == 0 else ''}</text>"
        for i in range(10)
    ]


def write_lanes(folder: Path) -> str:
    """Writes lanes.svg and lanes.trace.json.gz of a profile folder into it; in words what they
    show."""
    spans = read_traces(folder)
    (folder / "lanes.svg").write_text(draw([(folder.name, spans)]), encoding="utf-8")
    content = json.dumps(merged_trace(spans)).encode()
    (folder / "lanes.trace.json.gz").write_bytes(gzip.compress(content, mtime=0))
    lines = [
        f"rank {rank}: waits for its neighbours {share:.1%} of the time"
        for rank, share in idle_shares(spans).items()
    ]
    where = f"{folder / 'lanes.svg'} and lanes.trace.json.gz (ui.perfetto.dev)"
    return "\n".join([*lines, f"all ranks on one clock: {where}"])
