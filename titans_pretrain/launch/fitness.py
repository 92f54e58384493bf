"""Which of a job's nodes are fit, by what a preflight's ranks have found (launch/preflight.py).

`judge` is a function of the findings. A node is bad where its own finding breaks a rule, where it
differs from most others, or where it left none. Two things are not believed, and end the job with
the reason instead of leaving anybody out: a fault that all nodes show (then it is not theirs, e.g.
a full shared disk), and more bad nodes than half.

Runs in the batch shell, outside of any container: any Python from 3.8 on, standard library.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    Finding = Mapping[str, Any]  # of one rank: launch/preflight.py says what it holds

LATE = 5.0  # seconds that a rank may be behind another at the end of a check
GPU_FREE = 0.8  # of a GPU's memory, before anything of the run is there
_SHARED = ("run folder",)  # kinds that are not the only node's fault
# What a rank says that has only waited for another.
_WAITED = ("timed out", "timeout", "by peer", "refused", "remote process exited")


class Bounds(NamedTuple):
    """See config/site.py, PreflightConfig. GB is 10^9 bytes."""

    seconds: float
    start_seconds: float
    matmul_tflops: float | None
    matmul_of_median: float
    all_reduce_gb_per_s: float | None
    disk_free_gb: float
    disk_mb_per_s: float | None
    clock_seconds: float

    @property
    def limit(self) -> float:
        """Seconds after which a rank ends itself, wherever it stands."""
        return self.start_seconds + 12 * (self.seconds + LATE)


class Problem(NamedTuple):
    """What is wrong with one node."""

    node: str
    kind: str  # problems of all nodes in one kind are no node's
    value: str
    rule: str
    remedy: str


class Judgement(NamedTuple):
    problems: tuple[Problem, ...]
    bad: tuple[str, ...]  # nodes to leave out
    reason: str  # why no node is left out though there are problems, or ""


def judge(
    findings: Sequence[Finding], nodes: Sequence[str], ranks: int, bounds: Bounds
) -> Judgement:
    """Args: nodes: of the job, in Slurm's order; ranks: that were started on each."""
    by_node = {node: [f for f in findings if f["node"] == node] for node in nodes}
    found = [
        *_absent(by_node, ranks),
        *_meeting(by_node),
        *_gpus(by_node, ranks),
        *_equal(by_node),
        *_clocks(by_node, bounds),
        *_disks(by_node, bounds),
        *_matmuls(by_node, bounds),
    ]
    found += _network(by_node, bounds, bool(found))
    bad = tuple(node for node in nodes if any(p.node == node for p in found))
    return Judgement(tuple(found), *_believed(found, bad, len(nodes)))


def _believed(
    found: Sequence[Problem], bad: tuple[str, ...], count: int
) -> tuple[tuple[str, ...], str]:
    """(nodes to leave out, reason for leaving out none)."""
    for kind in dict.fromkeys(p.kind for p in found):
        theirs = [p for p in found if p.kind == kind]
        if len({p.node for p in theirs}) == count and (count > 1 or kind in _SHARED):
            first = theirs[0]
            who = f"all {count} nodes" if count > 1 else first.node
            return (), f"{kind} on {who}: {first.value}; this is not a node's fault"
    if len(bad) > max(1, count // 2):
        return (), f"{len(bad)} of {count} nodes seem bad ({', '.join(bad)}): not believable"
    return bad, ""


def _absent(by_node: Mapping[str, Sequence[Finding]], ranks: int) -> Iterator[Problem]:
    for node, found in by_node.items():
        if len(found) < ranks:
            yield Problem(
                node,
                "findings",
                f"{ranks - len(found)} of {ranks} ranks left no findings",
                "each rank starts, and writes to the run folder",
                "srun's words in this log, or logs/rank-*.err, tell why: e.g. no run folder there",
            )
        for f in found:
            if not f.get("done"):
                yield Problem(
                    node,
                    "ended",
                    f"rank {f['rank']} ended during: {f['at']}",
                    "each rank comes to the end of the preflight",
                    f"logs/rank-{f['rank']:05d}.err tells what it said",
                )


def _meeting(by_node: Mapping[str, Sequence[Finding]]) -> Iterator[Problem]:
    """Nodes that do not reach the first; the first itself where none of the others does."""
    first, *others = by_node
    lost = {n: f["meeting"] for n, found in by_node.items() for f in found if f.get("meeting")}
    if len(others) > 1 and all(node in lost for node in others):
        lost = {first: f"none of the {len(others)} others reaches it"}
    for node, why in lost.items():
        yield Problem(
            node,
            "meeting",
            why,
            f"ranks meet at {first}, at MASTER_PORT",
            "look at its network, its firewall, its name",
        )


def _gpus(by_node: Mapping[str, Sequence[Finding]], ranks: int) -> Iterator[Problem]:
    wanted = on_gpus(by_node)
    for node, found in by_node.items():
        for f in found:
            at = f"rank {f['rank']}"
            if why := f.get("machine", {}).get("error"):
                yield Problem(
                    node, "machine", f"{at}: {why}", "torch loads and sees its GPUs", "nvidia-smi"
                )
        gpus = [f["machine"]["gpus"] for f in found if "gpus" in f.get("machine", {})]
        if wanted and gpus and min(gpus) < ranks:
            yield Problem(
                node,
                "GPUs",
                f"{min(gpus)} GPUs for {ranks} ranks",
                "each rank has a GPU of its own",
                "nvidia-smi and dmesg tell of one that is lost",
            )
        for f in found:
            for gpu, errors in enumerate(f.get("machine", {}).get("ecc", ())):
                if errors:
                    yield Problem(
                        node,
                        "ECC",
                        f"GPU {gpu}: {errors} uncorrected ECC errors since its driver was loaded",
                        "there are none",
                        "reset the GPU, or have it replaced",
                    )


def on_gpus(by_node: Mapping[str, Sequence[Finding]]) -> bool:
    all_of_them = [f for found in by_node.values() for f in found]
    return any(f.get("device") == "cuda" or f.get("machine", {}).get("gpus") for f in all_of_them)


def _equal(by_node: Mapping[str, Sequence[Finding]]) -> Iterator[Problem]:
    """Versions and code, against what most nodes have."""
    told: dict[str, dict[str, set[str]]] = {}  # what -> node -> values
    for node, found in by_node.items():
        for f in found:
            own = {"code": f["code"]} if "code" in f else {}
            for what, value in [*f.get("machine", {}).get("versions", {}).items(), *own.items()]:
                told.setdefault(what, {}).setdefault(node, set()).add(value)
    for what, by in told.items():
        values = {node: " and ".join(sorted(several)) for node, several in by.items()}
        counts = Counter(values.values()).most_common()
        most, count = counts[0]
        agreed = 2 * count > len(values)
        each = ", ".join(f"{value} on {number} nodes" for value, number in counts)
        for node, value in values.items():
            if len(counts) > 1 and (not agreed or value != most):
                yield Problem(
                    node,
                    f"version of {what}",
                    f"{what} {value}, {most} on {count} others" if agreed else f"{what}: {each}",
                    "all nodes run the same code with the same libraries",
                    "install the same on all, or use one container image",
                )


def _clocks(by_node: Mapping[str, Sequence[Finding]], bounds: Bounds) -> Iterator[Problem]:
    for node, skew in skews(by_node).items():
        if abs(skew) > bounds.clock_seconds:
            yield Problem(
                node,
                "clock",
                f"its clock is {skew:+.1f} s from the others'",
                f"clocks differ by at most clock_seconds={bounds.clock_seconds:g}",
                "look at its time service (chronyc tracking)",
            )


def skews(by_node: Mapping[str, Sequence[Finding]]) -> dict[str, float]:
    """Seconds of each node's clock from the median of all, where it was read."""
    read = {n: min(f["clock"] for f in found if "clock" in f)
            for n, found in by_node.items() if any("clock" in f for f in found)}  # fmt: skip
    middle = statistics.median(read.values()) if read else 0.0
    return {node: clock - middle for node, clock in read.items()}


def _disks(by_node: Mapping[str, Sequence[Finding]], bounds: Bounds) -> Iterator[Problem]:
    free, speed = bounds.disk_free_gb, bounds.disk_mb_per_s
    for node, found in by_node.items():
        for f in found:
            if f.get("unseen") or f.get("sees") is False:
                yield Problem(
                    node,
                    "same folder",
                    f"{f['folder']} is another folder here than on the first node",
                    "the run folder lies on a disk that all nodes see",
                    "set folder= to a shared disk, or mount it there",
                )
            for kind in ("run folder", "local disk"):
                disk = f.get(kind, {})
                where = disk.get("path", kind)
                if "error" in disk:
                    yield Problem(
                        node,
                        kind,
                        f"{where}: {disk['error']}",
                        f"the {kind} can be written within seconds={bounds.seconds:g}",
                        "mend its permission, its room or its mount",
                    )
                    continue
                if disk and disk["free_gb"] < free:
                    yield Problem(
                        node,
                        kind,
                        f"{where}: {disk['free_gb']:.1f} GB free",
                        f"disk_free_gb={free:g}",
                        "free space",
                    )
                if disk and speed is not None and disk["mb_per_s"] < speed:
                    yield Problem(
                        node,
                        kind,
                        f"{where}: {disk['mb_per_s']:.0f} MB/s written",
                        f"disk_mb_per_s={speed:g}",
                        "look for who else uses it, or lower the bound",
                    )


def _matmuls(by_node: Mapping[str, Sequence[Finding]], bounds: Bounds) -> Iterator[Problem]:
    everywhere = [f["matmul"] for found in by_node.values() for f in found if "matmul" in f]
    rates = [m["tflops"] for m in everywhere if "tflops" in m]
    middle = statistics.median(rates) if rates else 0.0
    floor = max(bounds.matmul_tflops or 0.0, bounds.matmul_of_median * middle)
    for node, found in by_node.items():
        for f in found:
            m, at = f.get("matmul", {}), f"rank {f['rank']}, device {f['local_rank']}"
            if "error" in m:
                why, rule = m["error"], f"a product ends within seconds={bounds.seconds:g}"
            elif m.get("wrong"):
                why, rule = f"{m['wrong']} wrong numbers in a product", "it is exact"
            elif m and m["tflops"] < floor:
                why = f"matmul {m['tflops']:.3g} TFLOP/s, the median is {middle:.3g}"
                rule = (
                    f"at least {floor:.3g}: matmul_tflops={bounds.matmul_tflops}, "
                    f"matmul_of_median={bounds.matmul_of_median:g}"
                )
            elif m.get("free_of_total", 1.0) < GPU_FREE:
                why = f"{1 - m['free_of_total']:.0%} of its memory is in use already"
                rule = f"at least {GPU_FREE:.0%} is free before the run"
            else:
                continue
            remedy = "nvidia-smi tells of throttling, other processes and errors"
            yield Problem(node, "matmul", f"{at}: {why}", rule, remedy)


class Edge(NamedTuple):
    """An all-reduce of the ranks of some nodes, as the slowest or unluckiest of them saw it."""

    nodes: tuple[str, ...]
    gb_per_s: float
    error: str
    blamed: tuple[str, ...] = ()  # of the nodes, if it failed: those that did not only wait


def edges(by_node: Mapping[str, Sequence[Finding]], what: str) -> dict[tuple[str, ...], Edge]:
    """Of kind `what`: node (its own ranks), pair, or all."""
    told: dict[tuple[str, ...], list[tuple[str, float, str]]] = {}
    for node, found in by_node.items():
        for one in (e for f in found for e in f.get("network", ()) if e["what"] == what):
            rank = (node, one.get("gb_per_s", 0.0), one.get("error", ""))
            told.setdefault(tuple(one["nodes"]), []).append(rank)
    return {nodes: _edge(nodes, ranks) for nodes, ranks in told.items()}


def _edge(nodes: tuple[str, ...], ranks: Sequence[tuple[str, float, str]]) -> Edge:
    rate = min(rate for _, rate, _ in ranks)
    errors = [(node, error) for node, _, error in ranks if error]
    own = [(node, e) for node, e in errors if not any(w in e.lower() for w in _WAITED)]
    blamed = tuple(node for node in nodes if node in dict(own)) or nodes
    _, first = next(iter(own or errors), ("", ""))
    return Edge(nodes, rate, first, blamed)


def _network(
    by_node: Mapping[str, Sequence[Finding]], bounds: Bounds, known: bool
) -> Iterator[Problem]:
    """`known`: another check has found a bad node already, which may be why all together fail."""
    floor = bounds.all_reduce_gb_per_s or 0.0

    def wrong(edge: Edge) -> str:
        names = " and ".join(edge.nodes)
        if edge.error:
            return f"{names}: {edge.error}"
        slow = len(edge.nodes) > 1 and edge.gb_per_s < floor
        return f"{names}: {edge.gb_per_s:.3g} GB/s" if slow else ""

    def problem(node: str, why: str) -> Problem:
        rule = f"an all-reduce ends within seconds={bounds.seconds:g}"
        if floor:
            rule += f", all_reduce_gb_per_s={floor:g} between two nodes"
        return Problem(
            node, "network", why, rule, "look at its links (ibstat, ethtool, nvidia-smi)"
        )

    pairs = edges(by_node, "pair")
    faulty = {nodes: why for nodes, edge in pairs.items() if (why := wrong(edge))}
    named = set()
    for node in by_node:
        alone = edges(by_node, "node").get((node,))
        if alone is not None and alone.error:
            named.add(node)
            yield problem(node, f"its own ranks: {alone.error}")
            continue
        mine = [nodes for nodes in pairs if node in nodes]
        if mine and all(nodes in faulty and node in pairs[nodes].blamed for nodes in mine):
            named.add(node)
            yield problem(node, "; ".join(faulty[nodes] for nodes in mine))
    together = [edge for edge in edges(by_node, "all").values() if edge.error]
    if not together or named or known:
        return
    # All together fail, and no node fails in all of its pairs: those that did not only wait; else
    # both of a pair that fails, since nothing tells which of the two; else nobody can be named.
    blamed = together[0].blamed
    in_pair = [node for node in by_node if any(node in nodes for nodes in faulty)]
    suspects = blamed if len(blamed) < len(together[0].nodes) else in_pair or list(by_node)
    for node in suspects:
        yield problem(node, f"all nodes together: {together[0].error}")
