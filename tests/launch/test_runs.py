"""`titans-pretrain runs`: the lines and stories of made-up folders, and of a run's two lives."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain import cli
from titans_pretrain.config import parse_config
from titans_pretrain.errors import EXIT_CONFIG, EXIT_DONE, EXIT_SAVED, DataError
from titans_pretrain.launch.runs import ago, pace
from titans_pretrain.launch.story import events_after, read_story
from titans_pretrain.run.lines import read_tail
from titans_pretrain.run.lives import LifeRecord, read_lives
from titans_pretrain.run.lock import Claim

NOW = time.time()
HOST = socket.gethostname()


def record(step: int, at: float, **values: float) -> dict:
    return {
        "step": step,
        "tokens": step * 1000,
        "time": at,
        "values": {"train/loss": 8 - step / 100, **values},
    }


def jsonl(path: Path, lines: list) -> None:
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    path.write_text(text)


def made(
    folder: Path,
    *,
    steps: int = 1000,
    lives: list | None = None,
    records: list | None = None,
    checkpoints: dict[int, float] | None = None,
    claim: dict | None = None,
    restarts: list[str] = (),
    files: dict[str, str] | None = None,
) -> Path:
    """A run's folder. `checkpoints`: step -> age; `claim`: what it has otherwise than one of
    another host that beat just now, and "age"."""
    for name in ("checkpoints", "logs", "jobs"):
        (folder / name).mkdir(parents=True)
    model = {"variant": "mac", "blocks": 2, "width": 32}
    train = {"steps": steps, "precision": "fp32", "global_batch": 8, "seed": 0}
    data = {"sources": {"books": {"path": "data"}}, "sequence_length": 64}
    optim = {"lr": 0.003, "schedule": "cosine"}
    tree = {"model": model, "train": train, "data": data, "optim": optim}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    # Two seconds a step, a thousand tokens each.
    jsonl(folder / "metrics.jsonl", records or [record(s, NOW - 2 * (123 - s)) for s in (121, 123)])
    jsonl(folder / "lives.jsonl", lives or [])
    for step, age in ({100: 300.0} if checkpoints is None else checkpoints).items():
        state = folder / "checkpoints" / f"step-{step:08d}" / "state.json"
        state.parent.mkdir()
        state.write_text(json.dumps({"format": 1, "step": step}))
        os.utime(state, (NOW - age, NOW - age))
    if claim is not None:
        life = claim.get("life", 1)
        known = {"host": "tn1", "boot": "b", "namespace": "n", "pid": 7, "started": "1"}
        fields = {**known, "life": life, "heartbeat": NOW, **claim}
        age = fields.pop("age", 1.0)
        lock = folder / f"lock.{life:06d}"
        lock.write_text(json.dumps(Claim(**fields).__dict__))
        os.utime(lock, (NOW - age, NOW - age))
    if restarts:
        (folder / "restarts.tsv").write_text("".join(f"{line}\n" for line in restarts))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def begun(life: int, age: float = 1000.0, **more: object) -> dict:
    return {"life": life, "began": NOW - age, "from": 0, "hosts": ["tn1"], "ranks": 2, **more}


def of_job(job: int, queued: int = 0) -> dict:
    return {"job": str(job), "queued": queued}


JOB = {"jobs/0001/id": "12\n", "jobs/begun.12.0": "0\n"}
END = {"ended": NOW - 500, "step": 123}
ASKED = "2026-11-22T12:00:51Z\t12\t0\t100\tasked\t"
LOST_NODE = "2026-11-22T12:00:51Z\t12\t0\t100\tnode failure\ttn1"
DEAD = {"age": 7200.0}
DIVERGED = {**END, "code": 4, "why": "DivergedError: step 11: loss nan"}

# What the folder holds -> the state's words, from the files and from what squeue says.
STATES = {
    "a process beats": ({"claim": {}}, None, "running on tn1"),
    "asked to stop": ({"claim": {}, "files": {"stop": ""}}, None, "stopping on tn1"),
    "its job runs": (
        {"claim": {}, "files": JOB},
        "12|RUNNING|None|tn[1-2]",
        "running on tn[1-2], job 12",
    ),
    "no rank yet": ({"files": JOB}, "12|RUNNING|None|tn1", "starting on tn1, job 12"),
    "stays for a dead node": (
        {
            "claim": DEAD,
            "files": JOB,
            "lives": [begun(1, **of_job(12))],
            "restarts": [LOST_NODE],
        },
        "12|RUNNING|None|tn[1-2]",
        "waiting until Slurm sees that tn1 is gone, job 12",
    ),
    "goes on elsewhere": (
        {
            "claim": DEAD,
            "files": {**JOB, "jobs/begun.12.1": "0\n"},
            "lives": [begun(1, **of_job(12))],
            "restarts": [LOST_NODE],
        },
        "12|RUNNING|None|tn[1-3]",
        "starting on tn[1-3], job 12",
    ),
    "its ranks have left": (
        {
            "claim": {"released": True},
            "files": JOB,
            "lives": [begun(1, **of_job(12), **END, code=76, why="LostPeerError: gone")],
        },
        "12|RUNNING|None|tn1",
        "waiting for its job script to say what follows, job 12",
    ),
    "submitted": (
        {"files": JOB, "records": [], "checkpoints": {}},
        "12|PENDING|Resources|",
        "pending job 12 (Resources)",
    ),
    "submitted, no Slurm": (
        {"files": JOB, "checkpoints": {}},
        None,
        "pending job 12, as submitted",
    ),
    "queued again": (
        {
            "claim": {"released": True},
            "files": JOB,
            "restarts": [ASKED],
            "lives": [begun(1, **of_job(12), **END, code=75, why="saved on request: SIGUSR1")],
        },
        "12|PENDING|BeginTime|",
        "requeued job 12 (BeginTime), after: asked: saved on request: SIGUSR1",
    ),
    "queued again, no Slurm": (
        {
            "claim": DEAD,
            "files": JOB,
            "restarts": [LOST_NODE],
            "lives": [begun(1, **of_job(12))],
        },
        None,
        "requeued job 12, after: node failure; without tn1 from then on",
    ),
    "its job is gone": (
        {"claim": DEAD, "files": JOB, "restarts": [ASKED], "lives": [begun(1, **of_job(12))]},
        "",
        "dead no sign of life from tn1 for 2:00:00",
    ),
    "saved on request": (
        {"claim": {"released": True}, "lives": [begun(1, **END, code=75, why="saved: SIGINT")]},
        None,
        "waiting to be started again, after: saved: SIGINT",
    ),
    "all steps": ({"claim": {"released": True}, "checkpoints": {1000: 1.0}}, None, "done"),
    "stopped": ({"claim": {"released": True}, "files": {"stop": ""}}, None, "stopped"),
    "diverged": (
        {"claim": {"released": True}, "lives": [begun(1, **DIVERGED)]},
        None,
        "failed DivergedError: step 11: loss nan",
    ),
    "another rank failed first": (
        {
            "claim": {"released": True},
            "lives": [begun(1, **of_job(12), **END, code=76, why="lost another rank")],
            "files": {
                **JOB,
                "jobs/failure.12.0": json.dumps(
                    {"code": 1, "kind": "KeyError", "rank": 3, "host": "tn2", "what": "'x'"}
                ),
            },
        },
        "",
        "failed rank 3 on tn2: KeyError: 'x'",
    ),
    "no rank ever": (
        {"files": JOB, "checkpoints": {}},
        "",
        "failed no rank began; see logs/job-12.out",
    ),
    "its nodes are unfit": (
        {"files": {**JOB, "jobs/unfit.12.0": "the shared disk is full\n"}, "checkpoints": {}},
        "",
        "failed the shared disk is full",
    ),
    "refused before a rank could claim it": (
        {
            "claim": {"released": True},
            "lives": [begun(1, **of_job(11), **END, code=75, why="saved on request: SIGUSR1")],
            "files": {
                **JOB,
                "jobs/failure.12.0": json.dumps(
                    {"code": 3, "kind": "DataError", "rank": 0, "host": "tn1", "what": "no shard"}
                ),
            },
        },
        "",
        "failed rank 0 on tn1: DataError: no shard",
    ),
    "killed": (
        {"claim": DEAD, "lives": [begun(1)]},
        None,
        "dead no sign of life from tn1 for 2:00:00",
    ),
    "killed here": (
        {"claim": {"host": HOST, "boot": "another boot", "age": 200.0}},
        None,
        f"dead no sign of life from {HOST} for 0:03:20",
    ),
    "hung": (
        {
            "claim": DEAD,
            "lives": [begun(1)],
            "files": {
                time.strftime("failure-%Y%m%dT%H%M%SZ-rank-00001.txt", time.gmtime(NOW - 9)): (
                    "rank 1 of 2\nwhy:        rank 1 has made no progress\n"
                )
            },
        },
        None,
        "failed hang: rank 1 has made no progress (failure-",
    ),
}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The command's clock stands still; the folders are made by it."""
    stands = SimpleNamespace(time=lambda: NOW, sleep=time.sleep)
    monkeypatch.setattr("titans_pretrain.launch.runs_command.time", stands)


@pytest.fixture
def squeue(tmp_path_factory, monkeypatch):
    """Puts a squeue on the PATH that says so much; it counts its calls. None: there is none."""
    bin = tmp_path_factory.mktemp("bin")
    calls = bin / "calls"

    def put(said: str | None) -> Path:
        if said is not None:
            program = bin / "squeue"
            program.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\ncat <<'E'\n{said}\nE\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin" if said is not None else str(bin))
        return calls

    return put


def listed(capsys, *arguments: str) -> list[dict]:
    capsys.readouterr()  # what was said before
    assert cli.main(["runs", *arguments, "--json"]) == EXIT_DONE
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", STATES)
def test_each_state(case, tmp_path, squeue, capsys):
    facts, said, expected = STATES[case]
    squeue(said)
    made(tmp_path / "runs" / "a", **facts)
    [found] = listed(capsys, str(tmp_path / "runs"))
    told = f"{found['state']} {found['why']}".strip()
    assert told.startswith(expected) if expected.endswith("-") else told == expected


def test_the_lines(tmp_path, squeue, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = squeue("12|RUNNING|None|tn[1-2]\n14|PENDING|Priority|")
    made(tmp_path / "runs" / "a", claim={"life": 3}, files=JOB)
    second = {"jobs/0001/id": "14\n"}
    made(tmp_path / "runs" / "sweep" / "lr=1", records=["\n"], checkpoints={}, files=second)
    (tmp_path / "runs" / "sweep" / "lr=1" / "metrics.jsonl").unlink()
    made(tmp_path / "runs" / "z", checkpoints={1000: 7300.0}, claim={"released": True})
    assert cli.main(["runs"]) == EXIT_DONE
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "run              step   tokens    loss  tokens/s      checkpoint  restarts      eta  "
        "state",
        "a           123/1,000  123,000  6.7700       500  100, 5 min ago         2  0:29:14  "
        "running on tn[1-2], job 12",
        "sweep/lr=1    0/1,000        0       -         -            none         0        -  "
        "pending job 14 (Priority)",
        "z           123/1,000  123,000  6.7700       500  1,000, 2 h ago         0        -  done",
    ]
    assert calls.read_text().splitlines() == ["--noheader --jobs=12,14 --format=%A|%T|%r|%N"]


def test_a_story(tmp_path, squeue, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    squeue(None)
    lives = [
        begun(1, 9000.0, **of_job(12), layout="data 2"),
        {"life": 1, "ended": NOW - 8000, "step": 120, "code": 75, "why": "saved on request: USR1"},
        begun(2, 7900.0, **of_job(12, 2), layout="data 2", reached=120, seen=NOW - 8000.0),
        {"life": 2, "from": 120, "source": "checkpoints/step-00000120", "hosts": ["tn1", "tn2"]},
    ]
    restarts = [ASKED, ASKED.replace("\t0\t100\tasked\t", "\t1\t120\tno rank started\t")]
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW - 7950))
    restarts[1] = restarts[1].replace("2026-11-22T12:00:51Z", at)
    skipped = {"step": 90, "tokens": 5, "tag": "events/divergence", "event": "8 to 15 are skipped"}
    made(
        tmp_path / "runs" / "a",
        claim={"life": 2, **DEAD},
        lives=lives,
        restarts=restarts,
        records=[skipped, *(record(s, NOW - 2 * (123 - s)) for s in (122, 123))],
        files={
            **JOB,
            "jobs/begun.12.1": "120\n",
            "jobs/0001/env.txt": "time     2026-11-22 11:00:00 UTC\ncommand  titans-pretrain "
            "submit c.yaml --nodes 2\ncommit   0123456789abcdef\n",
            "jobs/0001/pretrain.sbatch": "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n",
        },
    )
    os.utime(tmp_path / "runs/a/jobs/begun.12.1", (NOW - 7960, NOW - 7960))
    assert cli.main(["runs", "show", "a"]) == EXIT_DONE
    out, err = capsys.readouterr()

    def when(age: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(NOW - age))

    assert out.splitlines() == [
        "a: dead no sign of life from tn1 for 2:00:00",
        "  model     mac, 2 blocks of width 32, fp32",
        "  data      books; rows of 64 tokens, 8 a step",
        "  training  1000 steps, lr 0.003 cosine, seed 0",
        "  layout    2 ranks, data 2",
        "  progress  step 123 of 1,000, 123,000 tokens, 500 tokens/s, 0:29:14 left once it runs",
        "submissions",
        "  0001 job 12 2026-11-22 11:00:00 UTC 2 nodes x 1 commit 0123456789ab titans-pretrain "
        "submit c.yaml --nodes 2",
        "lives",
        f"  life 1: {when(9000)} to {when(8000)} on tn1, job 12 (start 1), steps 0 to 120",
        "    asked: saved on request: USR1",
        f"  job 12, start 2: {when(7960)} to {when(7950)}",
        "    no rank started",
        f"  life 2: {when(7900)} to ? on tn1, tn2, job 12 (start 3), from step 120",
        "skipped",
        "  before step 90: 8 to 15 are skipped",
        "checkpoints",
        "  step 100, 5 min ago, 0.0 MiB",
        "losses",
        "  training    122: 6.7800, 123: 6.7700",
        "what to type",
        "  watch   tail -F runs/a/logs/rank-00000.log",
        "          titans-pretrain board runs/a",
        "  resume  titans-pretrain submit c.yaml --nodes 2",
    ]
    assert err == (
        "titans-pretrain runs: states are from the run folders alone: no squeue on this machine\n"
    )
    assert events_after(tmp_path / "runs" / "a", 120)["events/start"] == (
        "- job 12, start 2: no rank claimed the run. life 1 ended at step 120: asked: saved on "
        "request: USR1\n"
        "- life 2 from `checkpoints/step-00000120` on tn1, tn2 (job 12, start 3). job 12, start 2 "
        "ended: no rank started"
    )


def test_the_pace_leaves_out_the_time_between_lives():
    records = [record(1, 10.0), record(2, 12.0), record(3, 1000.0), record(4, 1002.0)]
    assert pace(records, [999.0]) == (500.0, 2.0)
    assert pace(records[:1], []) == (None, None)


def test_ages():
    assert [ago(x) for x in (0.2, 119, 120, 7199, 7200, 172_800)] == [
        *("0 s ago", "119 s ago", "2 min ago", "120 min ago", "2 h ago", "2 d ago")
    ]


def test_a_long_file_is_read_from_its_end(tmp_path):
    jsonl(tmp_path / "m", [record(s, 0.0) for s in range(1, 5000)])
    records, damaged = read_tail(tmp_path / "m", 1000)
    assert damaged == 0 and [r["step"] for r in records][-2:] == [4998, 4999]
    assert 5 < len(records) < 20
    jsonl(tmp_path / "m", [record(1, 0.0), "x" * 5000 + "\n"])
    records, damaged = read_tail(tmp_path / "m", 1000)
    assert [r["step"] for r in records] == [1] and damaged == 1
    assert read_tail(tmp_path / "none") == ([], 0)


def test_a_line_that_is_being_written_is_no_damage(tmp_path, squeue, capsys):
    squeue(None)
    run = made(tmp_path / "a", claim={}, records=[record(1, NOW), '{"step": 2, "tok'])
    [found] = listed(capsys, str(run))
    assert (found["name"], found["step"]) == ("a", 1)
    assert capsys.readouterr().err == ""
    jsonl(run / "metrics.jsonl", [record(1, NOW), '{"step": 2, "tok\n', record(3, NOW)])
    assert cli.main(["runs", str(run), str(run)]) == EXIT_DONE
    err = capsys.readouterr().err
    assert err.splitlines() == [
        f"titans-pretrain runs: {run}/metrics.jsonl: 1 of its last lines damaged: left out"
    ]


def test_a_newer_version_says_so(tmp_path, squeue, capsys):
    squeue(None)
    run = made(tmp_path / "a", claim={"released": True})
    (run / "checkpoints/step-00000100/state.json").write_text('{"format": 2}')
    (run / "config.yaml").write_text("train: {steps: 7, levitate: true}\nwings: 2\n")
    assert cli.main(["runs", "show", str(run)]) == EXIT_DONE
    assert "its checkpoints have format 2, this version reads 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "no run in empty"),
        ([], "runs: no such folder"),
        (["show", "b"], "b is no run, nor is runs/b"),
        (["show"], "runs show: no run is named"),
    ],
)
def test_what_is_no_run_is_refused(arguments, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["runs", *arguments]) == EXIT_CONFIG
    assert value in capsys.readouterr().err


def test_what_may_not_be_read_is_told_once_and_the_rest_listed(tmp_path, capsys, monkeypatch):
    made(tmp_path / "a", claim={"released": True})
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert cli.main(["runs", str(tmp_path), str(tmp_path)]) == EXIT_DONE
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.splitlines() == [
        f"titans-pretrain runs: {tmp_path}/locked: Permission denied: left out"
    ]
    assert cli.main(["runs", str(tmp_path / "locked")]) == EXIT_CONFIG
    assert "Permission denied" in capsys.readouterr().err


def test_a_silent_squeue_is_given_up(tmp_path, squeue, capsys, monkeypatch):
    squeue("")
    program = Path(os.environ["PATH"].split(":")[0]) / "squeue"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    run = made(tmp_path / "a", claim={}, files=JOB)
    queue = cli.importlib.import_module("titans_pretrain.launch.slurm").queue
    monkeypatch.setattr("titans_pretrain.launch.slurm.queue", lambda jobs: queue(jobs, 0.2))
    assert cli.main(["runs", str(run)]) == EXIT_DONE
    out, err = capsys.readouterr()
    assert out.endswith("running on tn1\n")
    assert "states are from the run folders alone: squeue said nothing for 0.2 s" in err


def test_no_torch(tmp_path):
    made(tmp_path / "a", claim={})
    code = (
        "import sys; from titans_pretrain.cli import main; main(sys.argv[1:]); "
        "main(['runs', 'show', *sys.argv[2:]]); "
        "print([m for m in ('torch', 'numpy', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", str(tmp_path / "a")], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_an_error_that_ends_a_life_is_noted(tmp_path):
    jsonl(tmp_path / "metrics.jsonl", [record(7, NOW)])
    path = tmp_path / "lives.jsonl"
    error = DataError("a bad shard", "rule", "remedy")
    with (
        pytest.raises(DataError),
        LifeRecord(path, tmp_path / "metrics.jsonl", 2, NOW - 5) as life,
    ):
        life.begin(host="tn1", ranks=4, layout="data 4")
        life.go_on(5, "step-00000005", ["tn1", "tn2", "tn1"])
        raise error
    [facts] = read_lives(path)
    assert (facts["reached"], facts["seen"], facts["from"]) == (7, NOW, 5)
    assert facts["hosts"] == ["tn1", "tn2"]
    assert (facts["step"], facts["code"], facts["why"]) == (7, 3, "DataError: a bad shard")
    with LifeRecord(path, tmp_path / "metrics.jsonl", 3, None) as life:
        life.begin(host="tn1", ranks=4, layout="data 4")
        life.end(9, 0, "done")
    assert [f.get("why") for f in read_lives(path)] == ["DataError: a bad shard", "done"]


def train(tree: dict, stop_after: int | None = None) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "test"), stop_after=stop_after)


def test_a_real_run_through_its_lives(tmp_path, squeue, capsys):
    """Saved on request, gone on with, at its end; and what `inspect` of the files would say."""
    squeue(None)
    tree = small_run(tmp_path / "run", small_dataset(tmp_path), train__steps=6)
    tree["model"]["variant"] = "transformer"
    assert run_world(train, 2, tree, 4) == [EXIT_SAVED] * 2
    [found] = listed(capsys, str(tmp_path / "run"))
    assert (found["state"], found["step"], found["steps"]) == ("waiting", 4, 6)
    assert found["why"] == "to be started again, after: saved on request: --stop-after"
    (tmp_path / "run/checkpoints/step-00000004").rename(tmp_path / "lost")
    write_config(tmp_path / "c.yaml", tree)
    assert run_world(train, 1, tree) == [EXIT_DONE]
    [found] = listed(capsys, str(tmp_path / "run"))
    assert (found["state"], found["step"], found["restarts"]) == ("done", 6, 1)
    values = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert found["loss"] == values["values"]["train/loss"] and found["tokens"] == values["tokens"]
    first, second = read_story(tmp_path / "run")
    assert (first.first, first.last, first.ranks, first.reason) == (
        *(0, 4, 2, "saved on request: --stop-after"),
    )
    assert (second.first, second.last, second.ranks, second.reason) == (0, 6, 1, "done")
    assert first.hosts == second.hosts == (HOST,)
    assert first.began < first.ended < second.began < second.ended
    assert events_after(tmp_path / "run", 0)["events/start"].splitlines() == [
        f"- life 1 from scratch on {HOST}.",
        f"- life 2 from scratch on {HOST}. life 1 ended at step 4: saved on request: --stop-after",
    ]
