"""`submit --array` and `--chain`: which runs and jobs, and that all are submitted or none."""

from pathlib import Path

import pytest
import yaml

from titans_pretrain import cli
from titans_pretrain.config import SiteConfig, load_site
from titans_pretrain.errors import ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.launch.sweep import members

ROOT = Path(__file__).resolve().parents[2]
BIG = ROOT / "configs" / "titans-1.3b.yaml"
SWEEP = ["--array", "optim.lr=5e-4,7e-4", "--array", "model.variant=mag,lmm"]
FOLDERS = [
    "optim.lr=5e-4_model.variant=mag",
    "optim.lr=5e-4_model.variant=lmm",
    "optim.lr=7e-4_model.variant=mag",
    "optim.lr=7e-4_model.variant=lmm",
]


def test_the_members_of_a_sweep():
    found = members(["a.b=1,2", "c=[3,5],'x, y'"], ["d=1"])
    assert [m.overrides for m in found] == [
        ("a.b=1", "c=[3,5]"),
        ("a.b=1", "c='x, y'"),
        ("a.b=2", "c=[3,5]"),
        ("a.b=2", "c='x, y'"),
    ]
    assert [m.name for m in found] == [
        "a.b=1_c=-3-5",
        "a.b=1_c=-x-y",
        "a.b=2_c=-3-5",
        "a.b=2_c=-x-y",
    ]
    (only,) = members([], ["d=1"])
    assert (only.name, only.overrides) == ("", ())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (["a=1,"], "an empty value"),
        (["a"], "an empty value"),
        (["a=1,,2"], "an empty value"),
        (["a=1,2", "a=3"], "a is given twice"),
        (["given=1,2"], "given is given twice"),
        (["folder=x,y"], "each run's folder follows from its values"),
        (["a=1,2,1"], "two runs are named a=1"),
        (["a=1 2,1-2"], "two runs are named a=1-2"),
        ([f"a={'x' * 300}"], "at most 200 characters"),
        (["a=1,2,3", "b=1,2"], "6 combinations, at most 5"),
    ],
)
def test_a_wrong_sweep_is_refused(arrays, words):
    with pytest.raises(ConfigError, match=words):
        members(arrays, ["given=1"], most=5)


class Slurm:
    """Stands in for sbatch, scancel and scontrol: accepts `most` jobs, counted from 1."""

    def __init__(self, most: int = 99) -> None:
        self.most, self.jobs, self.calls = most, 0, []
        self.release_works = True

    def call(self, command, seconds=None):
        self.calls.append(list(command))
        if command[:2] == ["sbatch", "--parsable"]:
            assert Path(command[-1]).read_text().startswith("#!/bin/bash")
            if self.jobs == self.most:
                raise ConfigError("sbatch said: too many jobs", "r", "r")
            self.jobs += 1
            return f"{self.jobs}\n"
        if command[0] == "scontrol" and not self.release_works:
            raise ConfigError("scontrol said: no", "r", "r")
        return ""

    def of(self, name):
        return [c[1:] for c in self.calls if c[0] == name]

    def options(self):
        """Of each sbatch that submits, beside --parsable and the script."""
        return [c[1:-1] for c in self.of("sbatch") if "--parsable" in c]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = Slurm()
    monkeypatch.setattr(slurm, "call", fake.call)
    monkeypatch.setattr(slurm, "have", lambda command: True)
    return fake


def _submit(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = cli.main(["submit", str(BIG), "--nodes", "64", *arguments])
    return (code, *capsys.readouterr())


def test_a_sweep_is_a_run_and_a_job_for_each_combination(cluster, capsys, tmp_path):
    code, out, err = _submit(capsys, *SWEEP, "--array-limit", "2", "train.seed=5")
    assert (code, err) == (0, "")
    assert [c[:1] for c in cluster.options()] == [["--hold"]] * 4
    assert [c[1:] for c in cluster.options()] == [
        [],
        [],
        ["--dependency=afterany:1"],
        ["--dependency=afterany:2"],
    ]
    assert cluster.of("scontrol") == [["release", "1,2,3,4"]]
    runs = tmp_path / "runs" / "titans-1.3b"
    assert sorted(p.name for p in runs.iterdir()) == sorted(FOLDERS)
    for number, name in enumerate(FOLDERS, start=1):
        frozen = runs / name / "jobs" / "0001"
        config = yaml.safe_load((frozen / "config.yaml").read_text())
        assert (config["train"]["seed"], config["folder"]) == (5, str(runs / name))
        assert f"optim.lr={config['optim']['lr'] * 1e4:.0f}e-4" in name
        assert name.endswith(config["model"]["variant"])
        script = (frozen / "pretrain.sbatch").read_text()
        assert f"#SBATCH --job-name=titans-1.3b-{number}\n" in script
        assert f"\nrun={runs / name}\n" in script
        assert slurm.jobs_of(runs / name) == [str(number)]
        assert f"\n{number}     titans-1.3b-{number}  {name}\n" in out


def test_a_sweep_is_submitted_whole_or_not_at_all(cluster, capsys, tmp_path):
    (tmp_path / "runs").mkdir()
    cluster.most = 2
    code, out, err = _submit(capsys, *SWEEP)
    assert (code, out) == (2, "")
    assert "sbatch said: too many jobs" in err
    assert f"Jobs 1, 2, submitted before it, are cancelled, at {FOLDERS[2]}" in err
    assert cluster.of("scancel") == [["2"], ["1"]]
    assert cluster.of("scontrol") == []  # none has begun
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]
    cluster.most, cluster.release_works = 99, False
    code, _, err = _submit(capsys, *SWEEP)
    assert (code, "scontrol said: no" in err) == (2, True)
    assert len(cluster.of("scancel")) == 6
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_all_of_a_sweep_is_checked_before_any_is_written(cluster, capsys, tmp_path):
    code, out, err = _submit(capsys, "--array", "parallel.tensor=4,3")
    assert (code, out) == (2, "")
    assert "parallel.tensor=3: --nodes 64 x 8 GPUs = 512 ranks: " in err
    assert cluster.options() == []
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_sweep_prints_a_table(cluster, capsys, tmp_path):
    code, out, err = _submit(capsys, *SWEEP, "--dry-run")
    assert (code, err) == (0, "")
    assert "\n-     titans-1.3b-3  optim.lr=7e-4_model.variant=mag\n" in out
    assert out.count("\n--- ") == 5  # four configurations and a script
    assert list(tmp_path.iterdir()) == []


def test_a_chain_is_jobs_that_wait_for_one_another(cluster, capsys, tmp_path):
    code, out, err = _submit(capsys, "--chain", "3")
    assert (code, err) == (0, "")
    assert cluster.options() == [
        ["--hold"],
        ["--hold", "--dependency=afterany:1"],
        ["--hold", "--dependency=afterany:2"],
    ]
    assert out.startswith("job      1, 2, 3 (titans-1.3b)\n")
    run = tmp_path / "runs" / "titans-1.3b"
    assert (run / "jobs" / "0001" / "id").read_text() == "1\n2\n3\n"
    script = (run / "jobs" / "0001" / "pretrain.sbatch").read_text()
    assert "#SBATCH --no-requeue\n" in script
    assert "#SBATCH --requeue\n" not in script
    assert f"\nsubmission={run / 'jobs' / '0001'} requeue=no\n" in script
    assert slurm.jobs_of(run) == ["1", "2", "3"]


def test_chains_of_a_sweep_wait_for_the_end_of_others(cluster, capsys):
    code, *_ = _submit(capsys, "--array", "train.seed=1,2", "--array-limit", "1", "--chain", "2")
    assert code == 0
    waits = [c[1:] for c in cluster.options()]
    assert waits == [[], *([f"--dependency=afterany:{i}"] for i in (1, 2, 3))]


def test_a_chain_that_is_cut_off_by_sbatch_leaves_nothing(cluster, capsys, tmp_path):
    cluster.most = 1
    code, _, err = _submit(capsys, "--chain", "3")
    assert code == 2
    assert "Jobs 1, submitted before it, are cancelled" in err
    assert cluster.of("scancel") == [["1"]]
    assert list(tmp_path.iterdir()) == []


def test_a_site_without_requeue(cluster, capsys, tmp_path):
    (tmp_path / "site.yaml").write_text("requeue: false\n")
    code, out, _ = _submit(capsys, "--site", "site.yaml", "--dry-run", "--time", "60")
    assert code == 0
    assert "lives    one job of up to 60: the site forbids requeue; --chain N submits N\n" in out
    assert "#SBATCH --no-requeue\n" in out
    assert " requeue=no\n" in out


def test_a_second_submission_at_the_same_moment_is_refused(cluster, capsys, tmp_path, monkeypatch):
    frozen = tmp_path / "runs" / "titans-1.3b" / "jobs" / "0001"
    frozen.mkdir(parents=True)
    (frozen / "config.yaml").write_text("other\n")
    monkeypatch.setattr("titans_pretrain.launch.submit_command._next", lambda jobs: frozen)
    monkeypatch.setattr("titans_pretrain.launch.submit_command.differences", lambda *a: iter(()))
    code, _, err = _submit(capsys)
    assert code == 2
    assert f"{frozen} has just been made by another submission" in err
    assert [p.name for p in frozen.iterdir()] == ["config.yaml"]  # the other's stays
    assert cluster.options() == []


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (["None", "PartitionConfig", "PartitionTimeLimit"], "PartitionTimeLimit"),
        (["JobHeldUser", "Priority"], None),
        (["Dependency"], None),
        (["InvalidQOS"], "InvalidQOS"),
    ],
)
def test_a_job_that_slurm_accepts_and_never_starts(cluster, capsys, monkeypatch, reasons, told):
    said = iter(reasons)

    def call(command, seconds=None):
        return f"1|PENDING|{next(said)}|\n" if command[0] == "squeue" else cluster.call(command)

    monkeypatch.setattr(slurm, "call", call)
    code, out, _ = _submit(capsys)
    assert code == 0
    assert list(said) == []
    warned = f"warning  Slurm does not start job 1 as it is: {told}; scancel 1\n"
    assert (warned in out, "does not start" in out) == ((True, True) if told else (False, False))


def test_words_between_srun_and_python(tmp_path):
    (tmp_path / "site.yaml").write_text("wrap: [apptainer, exec, --nv, titans.sif]\n")
    assert load_site(tmp_path / "site.yaml").wrap == ["apptainer", "exec", "--nv", "titans.sif"]
    for wrong in ("[--nv, x]", "['']", '["a\\nb"]'):
        (tmp_path / "site.yaml").write_text(f"wrap: {wrong}\n")
        with pytest.raises(ConfigError, match="a program and its arguments"):
            load_site(tmp_path / "site.yaml")
    (tmp_path / "site.yaml").write_text("time: 24:00:00\n")
    with pytest.raises(ConfigError, match="YAML takes 24:00:00 for a number"):
        load_site(tmp_path / "site.yaml")
    assert SiteConfig().requeue
