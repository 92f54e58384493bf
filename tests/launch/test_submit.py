"""`submit` and `stop`: the job script as text, what is refused, and that nothing half is left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from titans_pretrain import cli
from titans_pretrain.config import PreflightConfig, SiteConfig, load_site
from titans_pretrain.errors import ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.launch.freeze import freeze, look_at_code
from titans_pretrain.launch.render import BEGIN, END, TEMPLATE, Job, render, seconds
from titans_pretrain.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "configs" / "site" / "example.yaml"
BIG = ROOT / "configs" / "titans-1.3b.yaml"

WRITTEN = """\
#SBATCH --job-name=titans-1.3b
#SBATCH --partition=gpu
#SBATCH --account=my-project
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --chdir=/home/me
#SBATCH --output=/shared/runs/titans-1.3b/logs/job-%j.out
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --mem=0
#SBATCH --hint=nomultithread
python=/shared/my-project/venv/bin/python shell_python=python3
code=/shared/runs/titans-1.3b/jobs/0001/code
train=(/shared/runs/titans-1.3b/jobs/0001/config.yaml)
run=/shared/runs/titans-1.3b
submission=/shared/runs/titans-1.3b/jobs/0001 requeue=yes
srun_options=()
wrap=()
wait_seconds=60 avoid=
preflight='{"seconds":30.0,"start_seconds":120.0,"matmul_tflops":null,"matmul_of_median":0.7,\
"all_reduce_gb_per_s":null,"disk_free_gb":1.0,"disk_mb_per_s":null,"clock_seconds":5.0}'
local_disk="/scratch/$USER/$SLURM_JOB_ID"
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export NCCL_IB_HCA=mlx5
export NCCL_DEBUG=WARN
setup() {
  module purge
  module load cuda/12.8 nccl
}
"""


def _job(site: SiteConfig) -> Job:
    run = Path("/shared/runs/titans-1.3b")
    python = site.python or "/venv/bin/python"
    home, frozen = Path("/home/me"), run / "jobs" / "0001"
    return Job("titans-1.3b", 64, 8, site.time, run, frozen, home, python)


def _checked(script: str) -> str:
    """`script`, which bash can read."""
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    return script


def _written(script: str) -> str:
    return script.partition(BEGIN)[2].partition(END)[0]


def test_the_job_script_of_the_example_site():
    site = load_site(EXAMPLE)
    script = _checked(render(_job(site), site))
    assert _written(script) == WRITTEN
    template = _checked(TEMPLATE.read_text())
    assert script.replace(WRITTEN, "") == template.replace(_written(template), "")


def test_the_job_script_of_an_odd_site():
    site = SiteConfig(
        gres=None,
        exclusive=False,
        exclude=["tn1", "tn2"],
        srun=["--container-image=/a b.sqsh"],
        env={"X": "it's $HOME"},
        preflight=None,
    )
    lines = _written(_checked(render(_job(site), site))).splitlines()
    assert "#SBATCH --exclude=tn1,tn2" in lines
    assert "srun_options=('--container-image=/a b.sqsh')" in lines
    assert "wait_seconds=60 avoid=tn1,tn2" in lines
    assert "preflight=" in lines
    assert """export X='it'"'"'s $HOME'""" in lines
    assert not [x for x in lines if "gres" in x or "exclusive" in x or "--time" in x]


def test_the_template_by_hand_asks_for_what_submit_asks_for():
    by_hand = set(_written(TEMPLATE.read_text()).splitlines())
    for option in ("--requeue", "--open-mode=append", "--signal=USR1@300"):
        assert f"#SBATCH {option}" in by_hand
    names = {line.split("=")[0].strip() for line in by_hand}
    assert {"python", "code", "train", "run", "srun_options", "wrap"} <= names
    assert f"preflight='{PreflightConfig().model_dump_json()}'" in by_hand


def test_a_template_without_marks_is_refused(tmp_path):
    (tmp_path / "own.sbatch").write_text("#!/bin/bash\n")
    site = SiteConfig(template=str(tmp_path / "own.sbatch"))
    with pytest.raises(ConfigError, match="its two marks are not there"):
        render(_job(site), site)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("1:00:05", 3605), ("2-0", 172800), ("1-2:03", 93780)],
)
def test_time_limits_as_sbatch_reads_them(time, expected):
    assert seconds(time) == expected


def test_a_time_limit_in_words_is_refused():
    with pytest.raises(ConfigError, match="'a day'"):
        seconds("a day")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"partitoin": "gpu"}, "did you mean partition"),
        ({"sbatch": ["mem=0"]}, "one option with its dashes"),
        ({"env": {"NCCL DEBUG": "WARN"}}, "letters, digits and _"),
        ({"account": "my project"}, "one word for sbatch"),
        ({"preflight": {"matmul_tflop": 5}}, "preflight.matmul_tflop=5: no such key"),
        ({"preflight": {"seconds": 1}}, "greater than or equal to 5"),
        ({"stop_ahead": 5}, "greater than or equal to 60"),
    ],
)
def test_a_wrong_site_file_is_refused(tmp_path, tree, words):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=words):
        load_site(tmp_path / "site.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, and a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path


def _submit(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = cli.main(["submit", str(BIG), *arguments])
    return (code, *capsys.readouterr())


def test_a_dry_run_of_the_largest_tells_all_and_touches_nothing(tmp_path):
    arguments = ["submit", str(BIG), "--nodes", "64", "--site", str(EXAMPLE), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "titans_pretrain", *arguments, "optim.lr=5e-4"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PATH": "/nonexistent", "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    run = tmp_path / "runs" / "titans-1.3b"
    told = done.stdout.splitlines()
    assert told[0] == "job      none: a dry run, nothing is written (titans-1.3b)"
    assert told[1] == "ranks    64 nodes x 8 GPUs = 512, TP 1, PP 1, CP 8, DP 64, ZeRO-1"
    assert f"watch    tail -F {run}/logs/job-JOB.out" in told
    assert f"stop     titans-pretrain stop {run}" in told
    assert "  lr: 0.0005" in told
    assert (
        "checks   each node before a life begins: seconds=30 start_seconds=120 "
        "matmul_of_median=0.7 disk_free_gb=1 clock_seconds=5" in told
    )
    expected = WRITTEN.replace("/shared/runs/titans-1.3b", str(run))
    assert expected.replace("/home/me", str(tmp_path)) in done.stdout
    _checked(done.stdout[done.stdout.index("#!/bin/bash") :])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "3"], "--nodes 3 x 8 GPUs = 24 ranks: "),
        (["--nodes", "64", "--name", "my run"], "remedy: --name my-run"),
        (["--nodes", "64", "folder=runs/my run"], "holds ' '"),
        (["--nodes", "64", "--time", "5"], "time limit 5, stop_ahead=300 s"),
        (["--nodes", "64", "--site", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_what_is_refused_before_slurm_is_asked(here, capsys, arguments, words):
    code, out, err = _submit(capsys, "--dry-run", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert list(here.iterdir()) == []


def test_without_slurm_nothing_is_written(here, capsys):
    code, out, err = _submit(capsys, "--nodes", "64")
    assert (code, out) == (2, "")
    assert "no sbatch on this machine" in err
    assert list(here.iterdir()) == []


def test_slurms_own_words_are_passed_on():
    with pytest.raises(ConfigError, match=r"said:\n.*nonsense"):
        slurm.call(["git", "nonsense"])


@pytest.fixture
def accepted(monkeypatch):
    """What Slurm's commands were called with; `answers` is what they say, or refuse with."""
    calls, answers = [], {"squeue": ""}

    def call(command, seconds=None):
        calls.append(command)
        said = answers.get(command[0], "17;cluster\n")
        if isinstance(said, ConfigError):
            raise said
        return said

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setattr(slurm, "have", lambda command: True)
    return calls, answers


def test_what_sbatch_refuses_leaves_no_trace(here, capsys, accepted, monkeypatch):
    def call(command, seconds=None):
        if "--parsable" in command:
            assert Path(command[-1]).read_text().startswith("#!/bin/bash")
            raise ConfigError("sbatch said: invalid partition", "r", "r")
        return ""

    monkeypatch.setattr(slurm, "call", call)
    (here / "runs").mkdir()
    code, out, err = _submit(capsys, "--nodes", "64")
    assert (code, out) == (2, "")
    assert "invalid partition" in err
    assert list(here.rglob("*")) == [here / "runs"]


def test_a_submitted_run_and_a_second_one(here, capsys, accepted):
    calls, answers = accepted
    code, out, err = _submit(capsys, "--nodes", "64")
    assert (code, err) == (0, "")
    assert out.startswith("job      17 (titans-1.3b)\n")
    run = here / "runs" / "titans-1.3b"
    frozen = run / "jobs" / "0001"
    assert calls[-2] == ["sbatch", "--parsable", str(frozen / "pretrain.sbatch")]
    assert {p.name for p in frozen.iterdir()} >= {"code", "config.yaml", "env.txt", "id"}
    assert yaml.safe_load((frozen / "config.yaml").read_text())["optim"]["lr"] == 7e-4
    assert slurm.jobs_of(run) == ["17"]

    code, _, err = _submit(capsys, "--nodes", "64", "optim.lr=1e-3", "train.steps=9000")
    assert code == 2
    assert f"optim.lr: 0.0007 in {frozen}/config.yaml, 0.001 now" in err
    assert "train.steps: 190734 in" in err
    assert "--changed" in err
    answers["squeue"] = "RUNNING\n"
    code, _, err = _submit(capsys, "--nodes", "64", "optim.lr=1e-3", "--changed")
    assert code == 2
    assert f"job 17 of the run in {run} is RUNNING" in err
    assert not (run / "jobs" / "0002").exists()
    answers["squeue"] = ConfigError("slurm_load_jobs error: Invalid job id specified", "r", "r")
    code, out, _ = _submit(capsys, "--nodes", "64", "optim.lr=1e-3", "--changed")
    assert code == 0
    assert "changed  optim.lr: 0.0007" in out
    assert (run / "jobs" / "0002" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("state", "told"),
    [("RUNNING", ["scancel", "--signal=USR1", "17"]), ("PENDING", ["scancel", "17"]), ("", None)],
)
def test_stop_tells_slurm_and_bars_the_run(here, capsys, accepted, state, told):
    calls, answers = accepted
    assert _submit(capsys, "--nodes", "64")[0] == 0
    run = here / "runs" / "titans-1.3b"
    answers["squeue"] = f"{state}\n"
    calls.clear()
    assert cli.main(["stop", str(run)]) == 0
    assert [c for c in calls if c[0] == "scancel"] == ([told] if told else [])
    assert (run / "stop").exists()
    capsys.readouterr()
    code, _, err = _submit(capsys, "--nodes", "64")
    assert code == 2
    assert f"remove {run / 'stop'} and start again" in err
    with pytest.raises(ConfigError, match="the run was stopped"):
        RunFolder(run).take()


def test_stop_needs_a_run(here, capsys):
    assert cli.main(["stop", "nowhere"]) == 2
    assert "nowhere is no run folder" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_frozen_code_runs_from_its_copy(tmp_path):
    code = look_at_code()
    (tmp_path / "0001").mkdir()
    freeze(tmp_path / "0001", code, "folder: x\n", "#!/bin/bash\n", ["titans-pretrain", "submit"])
    copy = tmp_path / "0001" / "code"
    assert sum(p.is_file() for p in copy.rglob("*")) == code.files
    found = subprocess.run(
        [sys.executable, "-c", "import titans_pretrain.cli as c; print(c.__file__)"],
        cwd=ROOT,  # where the package lies, too
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == str(copy / "titans_pretrain" / "cli.py")
    told = (tmp_path / "0001" / "env.txt").read_text()
    assert "command  titans-pretrain submit\n" in told
    assert f"commit   {code.commit or 'none'}\n" in told
