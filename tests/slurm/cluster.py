"""A real Slurm cluster on this machine (cluster.sh), and runs submitted to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.prepared import ROOT, write_config
from titans_pretrain.launch.verdict import Restart, read_history
from titans_pretrain.run import checkpoint
from titans_pretrain.run.metrics import read_records

SCRIPT = Path(__file__).with_name("cluster.sh")
SITE: dict[str, Any] = {"gpus_per_node": 1, "cpus_per_task": 1, "time": "10", "wait": 30}
SITE |= {"preflight": None}  # it takes seconds of each life
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str:
    """Why no cluster can be started here, or nothing."""
    if os.getuid() != 0:
        return "a Slurm cluster of network namespaces needs root"
    paths = os.environ["PATH"] + ":/usr/sbin:/sbin"
    for command in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter"):
        if shutil.which(command, path=paths) is None:
            return f"no {command}: install slurmctld slurmd slurm-client munge iproute2"
    made = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True
    )
    return "" if made.returncode == 0 else f"no namespaces here: {made.stderr.decode().strip()}"


class Cluster:
    """A controller and four nodes, n1 to n4, each with two GPUs that are device files only."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: sockets lie in it
        self._env = {**os.environ, "CLUSTER_DIR": str(self.folder / "c")}
        self._env |= {"CLUSTER_OWNER": str(os.getpid()), "PATH": os.environ["PATH"] + ":/usr/sbin"}
        self("up")

    @property
    def small(self) -> Path:
        """A small disk that its machines share: as they see it (see `outside`)."""
        return self.folder / "c" / "small"

    def outside(self, path: Path) -> Path:
        """A path on the login node, as this machine sees it."""
        first = (self.folder / "c" / "login.pid").read_text().strip()
        return Path(f"/proc/{first}/root{path}")

    def down(self) -> None:
        self("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, *verb: object, check: bool = True) -> str:
        """What cluster.sh prints; its own words in the error if it fails."""
        done = self.run_raw(*verb)
        if check and done.returncode:
            raise AssertionError(f"{verb}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def run_raw(self, *verb: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *map(str, verb)],
            env=self._env | env,
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=120,
        )

    def titans(self, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of ours on the login node."""
        words = ("run", sys.executable, "-m", "titans_pretrain", *command)
        return self.run_raw(*words, PYTHONPATH=str(ROOT), **env)

    def submit(
        self, tree: dict[str, Any], *options: str, site: dict[str, Any] | None = None
    ) -> Job:
        """Submits the run that `tree` describes to two nodes."""
        config = write_config(self.folder / "config.yaml", tree)
        place = write_config(self.folder / "site.yaml", SITE | (site or {}))
        nodes = () if "--nodes" in options else ("--nodes", "2")
        said = self.titans("submit", config, *nodes, "--site", place, *options)
        assert said.returncode == 0, said.stdout + said.stderr
        run = self.outside(Path(tree["folder"]).absolute())
        return Job(self, run, sorted((run / "jobs").glob("*/id"))[-1].read_text().split()[0])

    def nodes_of(self, job: str) -> list[str]:
        listed = self("run", "squeue", "-h", "-t", "all", "-j", job, "-o", "%N").strip()
        return self("run", "scontrol", "show", "hostnames", listed).split() if listed else []

    def idle(self) -> int:
        return self("run", "sinfo", "-h", "-N", "-o", "%T").split().count("idle")


class Job:
    """One job of a run, through its lives."""

    def __init__(self, cluster: Cluster, run: Path, number: str) -> None:
        self.cluster, self.run, self.number = cluster, run, number
        self._seen = (0.0, "")  # when, and in what state

    @property
    def state(self) -> str:
        return self.cluster(
            "run", "squeue", "-h", "-t", "all", "-j", self.number, "-o", "%T"
        ).strip()

    @property
    def polled_state(self) -> str:
        """The state, asked for at most twice a second: each time costs four processes."""
        when, state = self._seen
        if time.monotonic() > when + 0.5:
            state = self.state
            self._seen = (time.monotonic(), state)
        return state

    @property
    def log(self) -> str:
        path = self.run / "logs" / f"job-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def restarts(self) -> list[Restart]:
        return read_history(self.run, [self.number])

    @property
    def nodes(self) -> list[str]:
        return self.cluster.nodes_of(self.number)

    @property
    def step(self) -> int:
        """The last that was recorded."""
        path = self.run / "metrics.jsonl"
        return max((r["step"] for r in read_records(path)), default=0) if path.exists() else 0

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return (checkpoint.list_steps(self.run / "checkpoints") or [0])[-1]

    def slurm(self, command: str, *words: object) -> str:
        return self.cluster("run", command, *words)

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 90.0) -> float:
        """Waits for `condition`; returns how long it took in seconds."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert waited < seconds, f"{what}: not within {seconds:.0f} s; {self.story()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def until_life(self, life: int, seconds: float = 90.0) -> float:
        """Until life `life` trains (0 is the first)."""
        path = self.run / "logs" / "rank-00000.log"

        def trains() -> bool:
            said = path.read_text(errors="replace") if path.exists() else ""
            return said.count("training tokens; steps") > life

        return self.until(f"life {life} trains", trains, seconds)

    def until_ended(self, seconds: float = 120.0) -> str:
        self.until("the job ends", lambda: self.polled_state in ENDED, seconds)
        return self.state

    def rank_pid(self, rank: int) -> tuple[int, int]:
        """`find_rank` of one that must be there."""
        found = self.find_rank(rank)
        assert found is not None, f"no rank {rank} on {self.nodes}; {self.story()}"
        return found

    def find_rank(self, rank: int) -> tuple[int, int] | None:
        """(node, pid there) of a rank of the running life."""
        for name in self.nodes:
            node = int(name[1:])
            ours = "^[^ ]*python[^ ]* -u -m titans_pretrain train"  # and not srun
            found = self.cluster("on", node, "pgrep", "-f", ours, check=False)
            for pid in map(int, found.split()):
                env = self.cluster("on", node, "cat", f"/proc/{pid}/environ", check=False).split(
                    "\0"
                )
                if f"SLURM_JOB_ID={self.number}" in env and f"SLURM_PROCID={rank}" in env:
                    return node, pid
        return None

    def story(self) -> str:
        """All that there is to read of it, for a failing test."""
        errors = (p.read_text(errors="replace")[-1500:] for p in (self.run / "logs").glob("*.err"))
        table = self.run / "restarts.tsv"
        return "\n".join(
            [
                f"job {self.number} is {self.state} on {self.nodes}",
                self.cluster("status", check=False),
                table.read_text() if table.exists() else "no restarts",
                self.log[-4000:],
                *errors,
            ]
        )
