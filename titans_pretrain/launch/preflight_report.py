"""What the job script asks after the preflight's step: a table of the nodes, and marks.

    python -m titans_pretrain.launch.preflight_report BOUNDS judge --nodes a,b --ranks N --code C

prints the table and what is wrong, leaves the marks `bad` or `unfit` (run/marks.py), and exits
with 0 if all nodes are fit, 75 if the ranks were asked to save meanwhile, else with another code.
BOUNDS, in JSON, are those of the site file (config/site.py, PreflightConfig). `limit` in place of
`judge` prints how many seconds the step may take.

Runs in the batch shell, outside of any container: any Python from 3.8 on, standard library.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titans_pretrain.errors import EXIT_DONE, EXIT_NODE, EXIT_OTHER, EXIT_SAVED
from titans_pretrain.launch.fitness import Bounds, Judgement, edges, judge, on_gpus, skews
from titans_pretrain.run.marks import Marks, here

if TYPE_CHECKING:
    from titans_pretrain.launch.fitness import Finding


def table(by_node: Mapping[str, Sequence[Finding]], judgement: Judgement) -> Iterator[str]:
    """One line a node."""
    rows = [("node", "GPUs", "matmul", "run folder", "local disk", "clock", "pairs", "verdict")]
    rows += [("", "", "TFLOP/s", "GB  MB/s", "GB  MB/s", "s", "GB/s", "")]
    clock, pairs = skews(by_node), edges(by_node, "pair")
    with_gpus = on_gpus(by_node)
    for node, found in by_node.items():
        gpus = [f["machine"]["gpus"] for f in found if "gpus" in f.get("machine", {})]
        rates = [f["matmul"]["tflops"] for f in found if "tflops" in f.get("matmul", {})]
        own = [e.gb_per_s for nodes, e in pairs.items() if node in nodes and not e.error]
        kinds = dict.fromkeys(p.kind for p in judgement.problems if p.node == node)
        verdict = ", ".join(kinds) or "fit"
        rows.append(
            (
                node,
                str(min(gpus)) if gpus and with_gpus else "-",
                f"{min(rates):.3g}" if rates else "-",
                _disk(found, "run folder"),
                _disk(found, "local disk"),
                f"{clock[node]:+.2f}" if node in clock else "-",
                " ".join(f"{rate:.3g}" for rate in own) or "-",
                verdict if verdict == "fit" or node not in judgement.bad else f"BAD: {verdict}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def _disk(found: Sequence[Finding], kind: str) -> str:
    disks = [f[kind] for f in found if "free_gb" in f.get(kind, {})]
    return f"{disks[0]['free_gb']:.0f}  {disks[0]['mb_per_s']:.0f}" if disks else "-"


def told(findings: Sequence[Finding], nodes: Sequence[str], judgement: Judgement) -> Iterator[str]:
    """All that a person reads."""
    by_node = {node: [f for f in findings if f["node"] == node] for node in nodes}
    yield from table(by_node, judgement)
    if not on_gpus(by_node):
        yield "no GPU on any node: the checks ran on CPUs (matmul by processor time, gloo)"
    for edge in edges(by_node, "all").values():
        rate = edge.error or f"{edge.gb_per_s:.3g} GB/s"
        yield f"all-reduce over all {len(edge.nodes)} nodes: {rate}"
    counts = Counter(kind for _, kind in {(p.node, p.kind) for p in judgement.problems})
    said = set()
    for p in judgement.problems:
        everywhere = counts[p.kind] == len(by_node) > 1
        if not everywhere or p.kind not in said:  # once is enough
            who = f"all {len(by_node)} nodes, e.g. {p.node}" if everywhere else p.node
            yield f"{who}: {p.value}\n  rule:   {p.rule}\n  remedy: {p.remedy}"
        said.add(p.kind)
    if judgement.reason:
        yield f"nobody is left out: {judgement.reason}"


def read_findings(folder: Path) -> list[Finding]:
    """Of all ranks. One whose writing was cut off does not count. Raises OSError."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            print(f"{path}: cut off", file=sys.stderr)
    return found


def conclude(
    marks: Marks, nodes: Sequence[str], ranks: int, bounds: Bounds, code: int
) -> tuple[int, list[str]]:
    """(exit code, lines to print) of this life; leaves its marks. Raises OSError."""
    findings = read_findings(marks.path("preflight"))
    if any(f.get("asked") for f in findings):
        marks.write("saved")  # nothing has happened since the last checkpoint
        return EXIT_SAVED, ["asked to save during the preflight: nothing to save"]
    if not any(f.get("done") for f in findings):
        return code or EXIT_OTHER, ["no rank came to its end: its step failed"]
    judgement = judge(findings, nodes, ranks, bounds)
    lines = list(told(findings, nodes, judgement))
    (marks.path("preflight") / "table.txt").write_text("\n".join(lines), encoding="utf-8")
    if judgement.reason:
        marks.write("unfit", f"{judgement.reason}\n")
    elif judgement.bad:
        marks.write("bad", "".join(f"{node}\n" for node in judgement.bad))
    return EXIT_NODE if judgement.problems else EXIT_DONE, lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="preflight_report")
    parser.add_argument("bounds", help="JSON")
    parser.add_argument("what", choices=("limit", "judge"))
    parser.add_argument("--nodes", default="", help="of the job, in Slurm's order")
    parser.add_argument("--ranks", type=int, default=1, help="of each node")
    parser.add_argument("--code", type=int, default=0, help="srun's exit code")
    args = parser.parse_args(argv)
    bounds = Bounds(**json.loads(args.bounds))
    if args.what == "limit":
        print(round(bounds.limit))
        return EXIT_DONE
    marks = here()
    if marks is None:
        parser.error("TITANS_RUN and TITANS_JOB are not set: the job script sets them")
    try:
        code, lines = conclude(marks, args.nodes.split(","), args.ranks, bounds, args.code)
    except OSError as e:
        code, lines = EXIT_NODE, [f"the run folder {marks.run} cannot be used: {e.strerror or e}"]
    print("\n".join(f"preflight: {line}" for text in lines for line in text.split("\n")))
    return code


if __name__ == "__main__":
    sys.exit(main())
