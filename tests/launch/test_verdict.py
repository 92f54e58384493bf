"""What a job script does next: a table of lives and their ends, and the files it is read from."""

import ast
import pickle
from pathlib import Path

import pytest

from titans_pretrain import errors
from titans_pretrain.errors import ConfigError, HangError, LostPeerError, NodeError
from titans_pretrain.launch import fitness, preflight_report, verdict
from titans_pretrain.launch.task import SlurmTask, place_from_slurm, tasks_per_node
from titans_pretrain.launch.verdict import Facts, Restart, decide
from titans_pretrain.run import marks
from titans_pretrain.run.marks import Failure, Marks

HANG, NODE, DATA, OTHER = (Failure(c, "E", 3, "tn2", "why") for c in (77, 76, 3, 1))
DEAD, BAD = ("tn1",), ("tn2", "tn3")


def restarts(reason: str, *steps: int) -> list[Restart]:
    return [Restart("then", "7", life, step, reason) for life, step in enumerate(steps)]


TABLE = {
    # name: facts, history -> do, exit code, reason
    "done": (Facts(0), [], "end", 0, "done"),
    "saved, codes merged": (Facts(143, 9, 5, saved=True), [], "again", 75, "asked"),
    "saved, 100 times": (
        Facts(75, 9, 5, saved=True),
        restarts("asked", *[9] * 100),
        *("again", 75, "asked"),
    ),
    "saved without a step": (Facts(75, 5, 5, saved=True), [], "again", 75, "asked without a step"),
    "saved without a step, again and again": (
        Facts(75, 5, 5, saved=True),
        restarts("asked without a step", 5, 5, 5),
        *("end", 75, "asked without a step"),
    ),
    "stopped": (Facts(143, 9, 5, stop=True, saved=True), [], "end", 0, "stopped"),
    "stopped, and a node is gone": (Facts(143, stop=True, dead=DEAD), [], "end", 0, "stopped"),
    "bad node": (Facts(143, bad=BAD), [], "again", 76, "hardware"),
    "bad node before what ranks said": (
        Facts(143, bad=BAD, failure=OTHER),
        [],
        *("again", 76, "hardware"),
    ),
    "node gone before a bad node": (
        Facts(76, bad=BAD, dead=DEAD, unfit="why"),
        [],
        *("stay", 76, "node failure"),
    ),
    "unfit, and no node's fault": (
        Facts(76, started=False, unfit="why"),
        [],
        "end",
        76,
        "preflight",
    ),
    "stopped during the preflight": (Facts(76, stop=True, unfit="why"), [], "end", 0, "stopped"),
    "saved on request during the preflight": (
        Facts(75, saved=True, started=False),
        [],
        *("again", 75, "asked without a step"),
    ),
    "node gone": (Facts(143, dead=DEAD), [], "stay", 143, "node failure"),
    "node gone before what ranks said": (
        Facts(1, dead=DEAD, failure=OTHER),
        [],
        *("stay", 1, "node failure"),
    ),
    "hang": (Facts(143, failure=HANG), [], "again", 77, "hang"),
    "node fault": (Facts(76, failure=NODE), [], "again", 76, "node fault"),
    "data": (Facts(143, failure=DATA), [], "end", 3, "failed"),
    "exception": (Facts(1, failure=OTHER), [], "end", 1, "failed"),
    "config refused before any mark": (Facts(2, started=False), [], "end", 2, "failed"),
    "diverged, by its code alone": (Facts(4), [], "end", 4, "failed"),
    "killed": (Facts(137), [], "again", 137, "crash"),
    "lost peers alone": (Facts(76), [], "again", 76, "crash"),
    "no rank": (Facts(1, started=False), [], "again", 1, "no rank started"),
    "two crashes": (Facts(137, 5), restarts("crash", 5, 5), "again", 137, "crash"),
    "three crashes": (Facts(137, 5), restarts("crash", 5, 5, 5), "end", 137, "crash"),
    "three crashes, then a checkpoint": (
        Facts(137, 6),
        restarts("crash", 5, 5, 5),
        *("again", 137, "crash"),
    ),
    "three hangs, then a crash": (
        Facts(137, 5),
        restarts("hang", 5, 5, 5),
        *("again", 137, "crash"),
    ),
    "three dead nodes": (
        Facts(143, 5, dead=DEAD),
        restarts("node failure", 5, 5, 5),
        *("end", 143, "node failure"),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_verdict(name):
    facts, history, do, code, reason = TABLE[name]
    found = decide(facts, history)
    assert (found.do, found.code, found.reason) == (do, code, reason)
    assert found.nodes == {"hardware": BAD, "node failure": DEAD}.get(reason, ())


def test_a_given_up_job_says_how_often_and_why():
    words = decide(Facts(143, 5, failure=HANG), restarts("hang", 5, 5, 5)).words
    assert words == (
        "rank 3 on tn2: E: why; see logs/rank-00003.err; given up: restarted 3 times for it "
        "without a checkpoint after 5"
    )


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Calls the module as the job script does: (life, arguments) -> its line."""

    def call(life, *arguments):
        monkeypatch.setenv("TITANS_RUN", str(tmp_path))
        monkeypatch.setenv("TITANS_JOB", f"7.{life}")
        assert verdict.main(arguments) == 0
        return Marks(tmp_path, "7", life)

    return call


def _checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


def test_lives_of_a_job_by_its_files(job, tmp_path, capsys):
    told = []

    def say(life, *arguments):
        mine = job(life, *arguments)
        told.append(capsys.readouterr().out.strip())
        return mine

    mine = say(0, "begin")
    mine.write("started")
    _checkpoint(tmp_path, 4)
    mine.write("saved")
    say(0, "end", "--code", "143")
    mine = say(1, "begin")
    mine.write("started")
    mine.write("bad", "tn3\ntn2\n")
    say(1, "end", "--code", "76", "--avoid", "tn9")
    mine = say(2, "begin")  # and then Slurm itself queues the job again
    mine = say(3, "begin")
    mine.write("bad", "tn4\n")
    say(3, "end", "--code", "76")
    say(4, "begin")
    say(4, "end", "--code", "143", "--dead", "tn5")
    say(5, "begin")
    (tmp_path / "stop").touch()
    say(5, "end", "--code", "75")
    say(6, "begin")
    assert told == [
        *("go 0 -", "again 75 -"),
        *("go 0 -", "again 76 tn2,tn3,tn9"),
        "go 0 -",
        *("go 0 -", "again 76 tn2,tn3,tn4"),
        *("go 0 -", "stay 143 tn5"),
        *("go 0 -", "end 0 -"),
        "end 0 -",
    ]
    lines = [x.split("\t")[1:] for x in (tmp_path / "restarts.tsv").read_text().splitlines()]
    assert lines == [
        ["7", "0", "4", "asked", ""],
        ["7", "1", "4", "hardware", "tn3,tn2"],
        ["7", "2", "4", "node failure", ""],
        ["7", "3", "4", "hardware", "tn4"],
        ["7", "4", "4", "node failure", "tn5"],
    ]


def test_a_job_that_slurm_queues_again_for_ever_is_ended(job, capsys):
    for life in range(5):
        job(life, "begin")
    last = capsys.readouterr()
    assert last.out.split("\n") == ["go 0 -", *["go 0 -"] * 3, "end 76 -", ""]
    assert "restarted 3 times" in last.err


def test_a_torn_line_of_the_restarts_counts_for_nothing(job, tmp_path, capsys):
    job(0, "begin")
    job(0, "end", "--code", "143")
    (tmp_path / "restarts.tsv").open("a").write("2026-11-22T14:00:00Z\t7\t0\t0\tcra")
    job(1, "begin")
    job(1, "end", "--code", "143")
    assert capsys.readouterr().out.split("\n") == ["go 0 -", "again 143 -"] * 2 + [""]
    assert [(r.life, r.reason) for r in verdict.read_history(tmp_path, ["7"])] == [
        (0, "no rank started"),
        (1, "no rank started"),
    ]


def test_on_a_full_disk_a_job_ends(job, tmp_path, monkeypatch, capsys):
    mine = job(0, "begin")
    mine.path("failure").touch()  # made, and then there was no room for its words
    assert mine.failure().code == 76
    job(0, "end", "--code", "143")
    assert capsys.readouterr().out.splitlines()[-1] == "again 76 -"
    monkeypatch.setattr(Path, "open", _full)
    job(1, "end", "--code", "76")  # nor for a line about the restart
    last = capsys.readouterr()
    assert last.out == "end 76 -\n"
    assert "No space left on device; free space" in last.err


def _full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture
def chain(tmp_path, monkeypatch, capsys):
    """Calls the module as jobs 7, 8, 9 and 10 of one chain do: (job, arguments) -> its line."""
    submission = tmp_path / "jobs" / "0001"
    submission.mkdir(parents=True)
    (submission / "id").write_text("7\n8\n9\n10\n")

    def call(job, *arguments):
        monkeypatch.setenv("TITANS_RUN", str(tmp_path))
        monkeypatch.setenv("TITANS_JOB", f"{job}.0")
        assert verdict.main([*arguments, "--submission", str(submission)]) == 0
        return capsys.readouterr().out.strip()

    return call


def _reasons(run: Path) -> list[tuple[str, str]]:
    lines = (x.split("\t") for x in (run / "restarts.tsv").read_text().splitlines())
    return [(line[1], line[4]) for line in lines]


def test_the_jobs_of_a_chain_have_one_budget(chain, tmp_path):
    for job in (7, 8, 9):
        assert chain(job, "begin") == "go 0 -"
        Marks(tmp_path, str(job), 0).write("started")
        assert chain(job, "end", "--code", "137") == "again 137 -"
    assert chain(10, "begin") == "go 0 -"
    Marks(tmp_path, "10", 0).write("started")
    assert chain(10, "end", "--code", "137") == "end 137 -"  # a fourth crash, no checkpoint since
    assert _reasons(tmp_path) == [("7", "crash"), ("8", "crash"), ("9", "crash")]


def test_a_chain_leaves_as_the_job_that_ended_the_run(chain, tmp_path):
    assert chain(7, "begin") == "go 0 -"
    Marks(tmp_path, "7", 0).fail(DATA)
    assert chain(7, "end", "--code", "143") == "end 3 -"
    assert (tmp_path / "jobs" / "ended.7.0").read_text() == "3 failed\n"
    assert [chain(job, "begin") for job in (8, 9, 10)] == ["end 3 -"] * 3
    (tmp_path / "jobs" / "0001" / "id").write_text("11\n")  # submitted once more: a new chain
    assert chain(11, "begin") == "go 0 -"


def test_a_chain_leaves_with_0_once_the_run_is_done(chain):
    assert chain(7, "begin") == "go 0 -"
    assert chain(7, "end", "--code", "0") == "end 0 -"
    assert chain(8, "begin") == "end 0 -"


def test_a_job_of_a_chain_that_slurm_ended_counts(chain, tmp_path):
    for job in (7, 8, 9):
        assert chain(job, "begin") == "go 0 -"  # and no word after it
    assert chain(10, "begin") == "go 0 -"
    assert _reasons(tmp_path) == [("7", "cut off"), ("8", "cut off"), ("9", "cut off")]
    _checkpoint(tmp_path, 4)
    Marks(tmp_path, "10", 0).write("saved")
    assert chain(10, "end", "--code", "143") == "again 75 -"
    assert _reasons(tmp_path)[-1] == ("10", "asked")


def test_a_job_by_hand_is_no_chain(job, tmp_path, capsys):
    job(0, "begin", "--submission", "")
    job(0, "end", "--code", "3", "--submission", str(tmp_path / "nowhere"))
    assert capsys.readouterr().out == "go 0 -\nend 3 -\n"


def test_the_first_failure_of_a_life_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    monkeypatch.setenv("TITANS_JOB", "7.2")
    mine = Marks(tmp_path, "7", 2)
    assert mine.failure() is None
    for rank, error in ((5, HangError("stuck", "r", "r")), (0, ConfigError("later", "r", "r"))):
        monkeypatch.setenv("RANK", str(rank))
        marks.failed(error.exit_code, type(error).__name__, error.value)
    found = mine.failure()
    assert found is not None
    assert (found.code, found.kind, found.rank, found.what) == (77, "HangError", 5, "stuck")


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


def test_a_rank_finds_its_place_in_slurms_variables():
    env = dict(SLURM)
    place_from_slurm(env)
    places = {k: env[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert places == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert tasks_per_node("8(x64)") == [8] * 64
    with pytest.raises(ConfigError, match="RANK=5 in a job's task"):
        place_from_slurm(env)
    with pytest.raises(ConfigError, match="no SLURM_LOCALID"):
        place_from_slurm({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"})


def test_a_task_leaves_marks_only_for_a_job_script(tmp_path, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value if name != "SLURM_PROCID" else "0")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TITANS_JOB"):
        monkeypatch.setenv(name, "")  # so that what the task sets is put back
        monkeypatch.delenv(name)
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("titans_pretrain.run.signals.install", lambda: None)
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    with SlurmTask():
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TITANS_JOB", "7.0")
    mine = Marks(tmp_path, "7", 0)
    with pytest.raises(LostPeerError), SlurmTask():
        raise LostPeerError("gone", "r", "r")
    assert mine.has("started")
    assert mine.failure() is None  # another rank is the cause
    monkeypatch.delenv("RANK")
    with pytest.raises(ZeroDivisionError), SlurmTask():
        _ = 1 / 0
    found = mine.failure()
    assert found is not None
    assert found[:3] == (1, "ZeroDivisionError", 0)
    marks.saved()
    assert mine.has("saved")


@pytest.mark.parametrize(
    ("error", "bad"),
    [
        (NodeError("its own disk", "r", "r", "tn9"), ["tn9"]),
        (NodeError("the shared disk", "r", "r"), []),
        (LostPeerError("gone", "r", "r"), []),
        (ConfigError("wrong", "r", "r"), []),
    ],
)
def test_a_node_fault_names_its_node_where_it_is_that_nodes(tmp_path, monkeypatch, error, bad):
    for name, value in {**SLURM, "TITANS_RUN": str(tmp_path), "TITANS_JOB": "7.0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("titans_pretrain.run.signals.install", lambda: None)
    told = pickle.loads(pickle.dumps(error))  # as other ranks are told, who then fail with it, too
    for raised in (told, error):
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(type(error)), SlurmTask():
            raise raised
    assert Marks(tmp_path, "7", 0).lines("bad") == bad


def test_a_local_disk_that_cannot_be_made_is_its_nodes_fault(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TITANS_RUN", str(tmp_path))
    monkeypatch.setenv("TITANS_JOB", "7.0")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("SLURMD_NODENAME", "tn4")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("titans_pretrain.run.signals.install", lambda: None)
    with pytest.raises(NodeError, match="Not a directory"), SlurmTask():
        pass
    mine = Marks(tmp_path, "7", 0)
    found = mine.failure()
    assert found is not None and (found.code, mine.lines("bad")) == (76, ["tn4"])


@pytest.mark.parametrize("module", [verdict, marks, errors, fitness, preflight_report])
def test_what_the_batch_shell_runs_is_python_3_8(module):
    ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
