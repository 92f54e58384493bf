"""The preflight: what its ranks find, each fault on a node of its own; and who is judged bad."""

import errno
import json
import os
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.worlds import run_world
from titans_pretrain.config import PreflightConfig
from titans_pretrain.launch import preflight, preflight_report, probes
from titans_pretrain.launch.fitness import Bounds, judge
from titans_pretrain.run.marks import Marks

BOUNDS = Bounds(**PreflightConfig(all_reduce_gb_per_s=5.0, disk_mb_per_s=50.0).model_dump())
NODES = ("tn1", "tn2", "tn3", "tn4")


def _edge(what: str, nodes: tuple[str, ...], **changes) -> dict:
    return {"what": what, "nodes": list(nodes), "gb_per_s": 20.0, **changes}


def healthy(nodes: tuple[str, ...] = NODES, ranks: int = 2) -> dict[tuple[str, int], dict]:
    """What the ranks of good nodes find: (node, local rank) -> finding."""
    found = {}
    pairs = [pair for each in preflight.rounds(nodes) for pair in each]
    for rank in range(len(nodes) * ranks):
        node, local = nodes[rank // ranks], rank % ranks
        network = [_edge("node", (node,))]
        network += [_edge("pair", pair) for pair in pairs if node in pair]
        network += [_edge("all", nodes)] if len(nodes) > 1 else []
        found[node, local] = {
            "rank": rank,
            "node": node,
            "local_rank": local,
            "device": "auto",
            "folder": "/runs/a/jobs/preflight.7.0",
            "at": "the end",
            "done": True,
            "machine": {"gpus": ranks, "versions": {"torch": "2.13.0"}, "ecc": [0] * ranks},
            "matmul": {"tflops": 600.0 + rank, "wrong": 0, "free_of_total": 0.99},
            "clock": 1e9 + 0.01 * rank,
            "network": network,
        }
        if local == 0:
            disk = {"path": "/runs/a", "free_gb": 900.0, "mb_per_s": 800.0}
            found[node, local] |= {"run folder": disk, "code": "abc", "sees": True}
    return found


def _lacks(node: str, *locals_: int):
    def change(found):
        for local in locals_:
            del found[node, local]

    return change


def _has(node: str, local: int = 0, **changes):
    def change(found):
        found[node, local] |= changes

    return change


def _all_have(**changes):
    def change(found):
        for (_, local), finding in found.items():
            if local == 0:
                finding |= changes

    return change


def _edges_fail(what: str, *groups: tuple[str, ...], **how):
    def change(found):
        for finding in found.values():
            for edge in finding["network"]:
                if edge["what"] == what and tuple(edge["nodes"]) in groups:
                    edge |= how or {"error": "no answer within 30 s"}

    return change


def _one_fails(node: str, error: str, what: str = "pair"):
    def change(found):
        for (name, _), finding in found.items():
            for edge in finding["network"]:
                if name == node and edge["what"] == what:
                    edge["error"] = error

    return change


def _both(*changes):
    def change(found):
        for each in changes:
            each(found)

    return change


_OLD = {"gpus": 2, "versions": {"torch": "2.9.0"}}
_FULL = {"path": "/runs/a", "error": "OSError: [Errno 28] No space left on device"}
_SLOW_DISK = {"path": "/runs/a", "free_gb": 900.0, "mb_per_s": 8.0}
_LITTLE = {"path": "/scratch", "free_gb": 0.2, "mb_per_s": 800.0}
_ROUND_2 = (("tn1", "tn2"), ("tn2", "tn3"))
JUDGED = {
    # name: change, nodes -> bad nodes, words that are said, words of the reason
    "all fit": (lambda found: None, NODES, "", "", ""),
    "one node, fit": (lambda found: None, ("tn1",), "", "", ""),
    "a rank left nothing": (_lacks("tn3", 1), NODES, "tn3", "1 of 2 ranks left no findings", ""),
    "a node left nothing": (_lacks("tn4", 0, 1), NODES, "tn4", "2 of 2 ranks left no", ""),
    "a rank was killed": (
        _has("tn2", 1, done=False, at="matmul"),
        *(NODES, "tn2", "rank 3 ended during: matmul", ""),
    ),
    "a slow GPU": (
        _has("tn2", 1, matmul={"tflops": 400.0, "wrong": 0}),
        *(NODES, "tn2", "rank 3, device 1: matmul 400 TFLOP/s, the median is 60", ""),
    ),
    "a GPU slow enough": (_has("tn2", 1, matmul={"tflops": 430.0, "wrong": 0}), NODES, "", "", ""),
    "a GPU that multiplies wrong": (
        _has("tn2", 1, matmul={"tflops": 600.0, "wrong": 3}),
        *(NODES, "tn2", "3 wrong numbers in a product", ""),
    ),
    "a GPU that does not answer": (
        _has("tn1", 0, matmul={"error": "no answer within 30 s"}),
        *(NODES, "tn1", "rank 0, device 0: no answer within 30 s", ""),
    ),
    "a GPU in use": (
        _has("tn1", 0, matmul={"tflops": 600.0, "free_of_total": 0.5}),
        *(NODES, "tn1", "50% of its memory is in use", ""),
    ),
    "a GPU less": (
        _has("tn1", 0, machine={"gpus": 1, "versions": {"torch": "2.13.0"}}),
        *(NODES, "tn1", "1 GPUs for 2 ranks", ""),
    ),
    "no GPU where others have one": (
        _has("tn1", 0, machine={"gpus": 0, "versions": {"torch": "2.13.0"}}),
        *(NODES, "tn1", "0 GPUs for 2 ranks", ""),
    ),
    "ECC": (
        _has("tn4", 1, machine={"gpus": 2, "versions": {}, "ecc": [0, 2]}),
        *(NODES, "tn4", "GPU 1: 2 uncorrected ECC errors", ""),
    ),
    "no torch": (
        _has("tn4", 0, machine={"error": "ImportError: libcuda.so"}),
        *(NODES, "tn4", "rank 6: ImportError: libcuda.so", ""),
    ),
    "another torch": (
        _both(*(_has("tn3", i, machine=_OLD) for i in (0, 1))),
        *(NODES, "tn3", "torch 2.9.0, 2.13.0 on 3 others", ""),
    ),
    "two of each": (
        _both(_has("tn3", code="b"), _has("tn4", code="b")),
        *(NODES, "", "code: abc on 2 nodes, b on 2", "version of code on all 4 nodes: code: abc"),
    ),
    "other code": (_has("tn2", code="xyz"), NODES, "tn2", "code xyz, abc on 3 others", ""),
    "another clock": (_has("tn2", clock=1e9 + 7, **{}), NODES, "", "", ""),  # its other rank's
    "another clock on all its ranks": (
        _both(_has("tn2", 0, clock=1e9 - 7), _has("tn2", 1, clock=1e9 - 7)),
        *(NODES, "tn2", "its clock is -7.0 s from", ""),
    ),
    "a slow way to the disk": (
        _has("tn2", **{"run folder": _SLOW_DISK}),
        *(NODES, "tn2", "/runs/a: 8 MB/s written", ""),
    ),
    "a full disk of one node": (
        _has("tn2", **{"local disk": _LITTLE}),
        *(NODES, "tn2", "/scratch: 0.2 GB free", ""),
    ),
    "a full shared disk": (
        _all_have(**{"run folder": _FULL}),
        *(NODES, "", "No space left", "run folder on all 4 nodes: /runs/a: OSError"),
    ),
    "a full shared disk, one node": (
        _all_have(**{"run folder": _FULL}),
        *(("tn1",), "", "No space left", "run folder on tn1: "),
    ),
    "a slow GPU, one node": (
        _has("tn1", 0, matmul={"error": "no answer within 30 s"}),
        *(("tn1",), "tn1", "no answer", ""),
    ),
    "another folder": (_has("tn3", sees=False), NODES, "tn3", "is another folder here", ""),
    "what it writes is not seen": (_has("tn3", unseen=True), NODES, "tn3", "another folder", ""),
    "one that does not reach the first": (
        _has("tn3", meeting="tn1:15007: timed out"),
        *(NODES, "tn3", "tn1:15007: timed out", ""),
    ),
    "none reaches the first": (
        _both(*(_has(n, meeting="tn1:15007: timed out") for n in NODES[1:])),
        *(NODES, "tn1", "none of the 3 others reaches it", ""),
    ),
    "both pairs of a node fail": (
        _edges_fail("pair", *_ROUND_2),
        *(NODES, "tn2", "tn1 and tn2: no answer within 30 s; tn2 and tn3: no answer", ""),
    ),
    "both pairs of a node are slow": (
        _edges_fail("pair", *_ROUND_2, gb_per_s=1.5),
        *(NODES, "tn2", "tn1 and tn2: 1.5 GB/s; tn2 and tn3: 1.5 GB/s", ""),
    ),
    "one pair fails, and all together": (
        _both(_edges_fail("pair", ("tn1", "tn2")), _edges_fail("all", NODES)),
        *(NODES, "tn1 tn2", "all nodes together: no answer", ""),
    ),
    "one pair fails, all together do not": (
        _edges_fail("pair", ("tn1", "tn2")),
        *(NODES, "", "", ""),
    ),
    "only all together fail": (
        _edges_fail("all", NODES),
        *(NODES, "", "all nodes together", "network on all 4 nodes"),
    ),
    "all together fail after a node was lost": (
        _both(_edges_fail("all", NODES), _has("tn2", 1, done=False, at="all-reduce of all")),
        *(NODES, "tn2", "rank 3 ended during: all-reduce of all", ""),
    ),
    "the pair of two nodes fails": (
        _edges_fail("pair", ("tn1", "tn2")),
        *(("tn1", "tn2"), "", "tn1 and tn2: no answer", "network on all 2 nodes"),
    ),
    "the pair of two nodes fails, one by itself": (
        _both(
            _one_fails("tn2", "RuntimeError: Unable to find address"),
            _one_fails("tn1", "DistStoreError: wait timeout after 16000ms"),
        ),
        *(("tn1", "tn2"), "tn2", "tn2: tn1 and tn2: RuntimeError: Unable to find address", ""),
    ),
    "all together fail, one by itself": (
        _both(
            _edges_fail("all", NODES, error="RuntimeError: Connection closed by peer"),
            _one_fails("tn3", "RuntimeError: 5 of 9 sums are wrong on rank 4", "all"),
        ),
        *(NODES, "tn3", "all nodes together: RuntimeError: 5 of 9 sums", ""),
    ),
    "of three nodes one is cut off": (
        _edges_fail("pair", ("tn1", "tn2"), ("tn2", "tn3")),
        *(("tn1", "tn2", "tn3"), "tn2", "tn1 and tn2", ""),
    ),
    "a node whose own ranks fail": (
        _edges_fail("node", ("tn4",)),
        *(NODES, "tn4", "its own ranks: no answer within 30 s", ""),
    ),
    "three of four": (
        _both(_lacks("tn1", 0), _has("tn2", 0, code="b"), _has("tn3", 0, sees=False)),
        *(NODES, "", "", "3 of 4 nodes seem bad (tn1, tn2, tn3): not believable"),
    ),
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_judgement(name):
    change, nodes, bad, said, reason = JUDGED[name]
    findings = healthy(nodes)
    change(findings)
    judgement = judge(list(findings.values()), nodes, 2, BOUNDS)
    assert judgement.bad == tuple(bad.split())
    assert reason in judgement.reason
    assert bool(reason) == bool(judgement.reason)
    assert bool(judgement.problems) == bool(bad or reason)
    lines = "\n".join(preflight_report.told(list(findings.values()), nodes, judgement))
    assert said in lines


def test_without_gpus_none_is_asked_for_unless_the_config_does():
    findings = healthy()
    for finding in findings.values():
        finding["machine"] = {"gpus": 0, "versions": {}}
    judgement = judge(list(findings.values()), NODES, 2, BOUNDS)
    assert judgement.problems == ()
    said = list(preflight_report.told(list(findings.values()), NODES, judgement))
    assert sum("no GPU on any node" in line for line in said) == 1
    for finding in findings.values():
        finding["device"] = "cuda"
    judgement = judge(list(findings.values()), NODES, 2, BOUNDS)
    assert judgement.reason.startswith("GPUs on all 4 nodes: 0 GPUs for 2 ranks")


def test_what_all_nodes_show_is_said_once():
    findings = healthy()
    _all_have(**{"run folder": _FULL})(findings)
    judgement = judge(list(findings.values()), NODES, 2, BOUNDS)
    said = list(preflight_report.told(list(findings.values()), NODES, judgement))
    assert [line.split(":")[0] for line in said if "rule:" in line] == ["all 4 nodes, e.g. tn1"]


def test_the_table_of_four_nodes():
    findings = healthy()
    _edges_fail("pair", *_ROUND_2)(findings)
    judgement = judge(list(findings.values()), NODES, 2, BOUNDS)
    lines = list(preflight_report.told(list(findings.values()), NODES, judgement))
    assert lines[:6] == [
        "node  GPUs  matmul   run folder  local disk  clock  pairs  verdict",
        "            TFLOP/s  GB  MB/s    GB  MB/s    s      GB/s",
        "tn1   2     600      900  800    -           -0.03  20     fit",
        "tn2   2     602      900  800    -           -0.01  -      BAD: network",
        "tn3   2     604      900  800    -           +0.01  20     fit",
        "tn4   2     606      900  800    -           +0.03  20 20  fit",
    ]
    assert lines[6] == "all-reduce over all 4 nodes: 20 GB/s"


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_are_a_ring_with_each_node_in_one_pair_at_a_time(count):
    nodes = [f"n{i}" for i in range(count)]
    rounds = preflight.rounds(nodes)
    assert len(rounds) == {1: 0, 2: 1}.get(count, 2 + count % 2)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members))
    ring = (
        {frozenset((nodes[i], nodes[(i + 1) % count])) for i in range(count)}
        if count > 1
        else set()
    )
    found = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert (set(found), len(found)) == (ring, len(ring))


def test_a_check_is_bounded():
    began = time.monotonic()
    assert preflight.bounded(lambda: {"a": 1}, 20.0) == {"a": 1}
    hung = preflight.bounded(lambda: time.sleep(60) or {}, 0.5)
    assert hung == {"error": "no answer within 0.5 s"}
    died = preflight.bounded(lambda: os._exit(9), 20.0)
    assert died == {"error": "its process ended without an answer (exit code 9)"}

    def refuses():
        raise OSError(errno.EIO, "Input/output error", "/dev/x")

    assert "Input/output error" in preflight.bounded(refuses, 20.0)["error"]
    assert time.monotonic() - began < 20


def _life(tmp_path, findings) -> Marks:
    mine = Marks(tmp_path, "7", 0)
    folder = mine.path("preflight")
    folder.mkdir(parents=True)
    for finding in findings:
        (folder / f"rank-{finding['rank']:05d}.json").write_text(json.dumps(finding))
    return mine


@pytest.mark.parametrize(
    ("change", "code", "bad", "unfit", "saved"),
    [
        (lambda found: None, 0, [], "", False),
        (_lacks("tn3", 0, 1), 76, ["tn3"], "", False),
        (_all_have(**{"run folder": _FULL}), 76, [], "run folder on all 4 nodes", False),
        (_has("tn2", 1, asked=True), 75, [], "", True),
        (_both(*(_has(n, i, done=False) for n in NODES for i in (0, 1))), 143, [], "", False),
        (_both(*(_lacks(n, 0, 1) for n in NODES)), 143, [], "", False),
    ],
    ids=["fit", "bad", "unfit", "asked", "all killed", "none began"],
)
def test_what_the_job_script_is_told(
    tmp_path, monkeypatch, capsys, change, code, bad, unfit, saved
):
    findings = healthy()
    change(findings)
    mine = _life(tmp_path, findings.values())
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    monkeypatch.setenv("TITANS_JOB", "7.0")
    arguments = ["judge", "--nodes", ",".join(NODES), "--ranks", "2", "--code", "143"]
    text = PreflightConfig().model_dump_json()
    assert preflight_report.main([text, *arguments]) == code
    assert mine.lines("bad") == bad
    assert unfit in " ".join(mine.lines("unfit"))
    assert (mine.has("bad"), mine.has("unfit"), mine.has("saved")) == (
        bool(bad),
        bool(unfit),
        saved,
    )
    assert all(line.startswith("preflight: ") for line in capsys.readouterr().out.splitlines())


def test_a_finding_that_was_cut_off_counts_as_none(tmp_path, capsys):
    mine = _life(tmp_path, healthy().values())
    (mine.path("preflight") / "rank-00002.json").write_text('{"rank": 2, "no')
    assert preflight_report.conclude(mine, NODES, 2, BOUNDS, 0)[0] == 76
    assert mine.lines("bad") == ["tn2"]


# Ranks, each a node of its own. Faults are put in the place of what is measured.

# Rates on the cores that all ranks share say nothing: no bound on them that a good one could miss.
QUICK = BOUNDS._replace(
    seconds=20.0,
    start_seconds=40.0,
    matmul_of_median=0.01,
    all_reduce_gb_per_s=None,
    disk_mb_per_s=None,
    disk_free_gb=0.0,
)


def _slow(cuda, local_rank):
    return {"tflops": 1e-6, "wrong": 0}


def _another_torch(device):
    return {"gpus": 0, "versions": {"torch": "1.0"}}


def _full(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


_all_reduce, _now = probes.all_reduce, time.time


def _a_minute_ahead():
    return _now() + 60.0


def _deaf(master, name, ranks, *rest):
    if len(ranks) > 1:
        time.sleep(600)
    return _all_reduce(master, name, ranks, *rest)


FAULTS = {
    "tn2": ("titans_pretrain.launch.probes.matmul", _slow),
    "tn4": ("titans_pretrain.launch.probes.machine", _another_torch),
    "tn5": ("titans_pretrain.launch.probes.disk", _full),
    "tn7": ("time.time", _a_minute_ahead),
}


def _rank(folder: str, bounds: tuple, faults: dict, absent: str = "", lonely: str = "") -> None:
    env = os.environ
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    node = f"tn{rank + 1}"
    place = preflight.Place(rank, size, 0, node, (env["MASTER_ADDR"], int(env["MASTER_PORT"])))
    where = Path(folder) / (node if node == lonely else "shared")
    where.mkdir(parents=True, exist_ok=True)
    target, fault = faults.get(node, ("", None))
    if node != absent:
        with mock.patch(target, fault) if target else mock.MagicMock():
            preflight.check(where, Bounds(*bounds), "cpu", place)


def _judged(folder: Path, count: int):
    nodes = [f"tn{i + 1}" for i in range(count)]
    findings = preflight_report.read_findings(folder / "shared")
    judgement = judge(findings, nodes, 1, QUICK)
    print("\n".join(preflight_report.told(findings, nodes, judgement)))
    return findings, judgement


def test_three_good_nodes(tmp_path):
    run_world(_rank, 3, str(tmp_path), tuple(QUICK), {})
    findings, judgement = _judged(tmp_path, 3)
    assert judgement.problems == ()
    assert [f["rank"] for f in findings] == [0, 1, 2]
    assert all(f["done"] and f["sees"] and f["code"] == probes.code() for f in findings)
    told = {tuple(e["nodes"]): e["what"] for f in findings for e in f["network"]}
    assert told == {
        ("tn1",): "node",
        ("tn2",): "node",
        ("tn3",): "node",
        ("tn1", "tn2"): "pair",
        ("tn2", "tn3"): "pair",
        ("tn3", "tn1"): "pair",
        ("tn1", "tn2", "tn3"): "all",
    }
    assert all(e["gb_per_s"] > 0 for f in findings for e in f["network"] if len(e["nodes"]) > 1)
    assert (tmp_path / "shared" / "over").exists()


@pytest.mark.slow
def test_each_fault_is_named_with_its_node(tmp_path):
    run_world(_rank, 8, str(tmp_path), tuple(QUICK), FAULTS, "tn8", "tn3")
    findings, judgement = _judged(tmp_path, 8)
    assert {(p.node, p.kind) for p in judgement.problems} == {
        ("tn2", "matmul"),
        ("tn3", "same folder"),
        ("tn4", "version of torch"),
        ("tn5", "run folder"),
        ("tn7", "clock"),
        ("tn8", "findings"),
    }
    assert judgement.reason.startswith("6 of 8 nodes seem bad")
    assert next(f for f in findings if f["node"] == "tn3")["unseen"]
    together = [e["nodes"] for e in findings[0]["network"] if e["what"] == "all"]
    assert together == [["tn1", "tn2", "tn3", "tn4", "tn5", "tn6", "tn7"]]


@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named_by_its_pairs(tmp_path):
    deaf = {"tn2": ("titans_pretrain.launch.probes.all_reduce", _deaf)}
    run_world(_rank, 4, str(tmp_path), tuple(QUICK), deaf)
    findings, judgement = _judged(tmp_path, 4)
    assert judgement.bad == ("tn2",)
    assert [p.kind for p in judgement.problems] == ["network"]
    whole = [e for e in findings[3]["network"] if e["nodes"] == ["tn3", "tn4"]]
    assert whole and "error" not in whole[0]
    assert not [e for f in findings for e in f["network"] if e["what"] == "all"]  # no use
