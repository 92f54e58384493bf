"""What can happen to a job: each fault is brought about on a real Slurm, and what follows is timed.

python -m tests.slurm.faults [NAME ...]     as a table; the tests run the same
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import torture
from tests.prepared import small_run
from tests.slurm.cluster import Cluster, Job

STEPS, EVERY = 120, 20  # of a run; between two checkpoints
WATCHDOG = {"start_minutes": 3, "step_minutes": 0.5, "silent_seconds": 15.0}


def tree(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Of a run of two ranks that takes some 10 s."""
    return small_run(
        folder,
        data,
        **{
            "train__steps": STEPS,
            "train__micro_batch": 4,  # one of each rank
            "checkpoint__every_steps": EVERY,
            "validation__every": 60,
            "log__tensorboard": True,
            "watchdog": WATCHDOG,
            **changes,
        },
    )


@dataclass(frozen=True)
class Fault:
    """One way to disturb a job, and what must follow."""

    what: str
    act: Callable[[Cluster, Job], Any]  # it is past a checkpoint; returns what `undo` needs
    reason: str  # in restarts.tsv (or A|B); "" if the job ends or goes on
    undo: Callable[[Cluster, Any], Any] = lambda cluster, made: None
    then: str = "again"  # or "ends" (as `state`), or "goes on" in the same life
    state: str = "COMPLETED"
    loses: int | None = None  # at most so many steps, done again; None: those not saved yet
    reads: tuple[str, ...] = ()  # words of the job's log
    around: Callable[[Cluster], AbstractContextManager[Any]] = field(
        default=lambda cluster: nullcontext()
    )
    within: float = 60.0  # seconds, until the life is over
    changes: dict[str, Any] = field(default_factory=dict)
    site: dict[str, Any] = field(default_factory=dict)
    small: bool = False  # the run folder lies on the small disk
    again: bool = False  # a later life, too, if the machine is slow
    by_hand: bool = False  # too long for every test run
    elsewhere: bool = False  # the next life runs without the node that `act` returns


@dataclass(frozen=True)
class Told:
    """What followed: seconds until the life was over and until the next one trained."""

    noticed: float | None
    back: float | None
    lost: int
    words: str


def strike(cluster: Cluster, fault: Fault, job: Job) -> Told:
    """Disturbs a job once it trains; asserts what `fault` says of it, up to its end."""
    with fault.around(cluster), ExitStack() as disturbed:
        job.until_life(0)
        job.until("a checkpoint", lambda: job.step > EVERY + 5)
        made = fault.act(cluster, job)
        disturbed.callback(fault.undo, cluster, made)
        began = time.monotonic()
        if fault.then == "goes on":
            state = job.until_ended()
            assert (state, job.restarts) == (fault.state, []), job.story()
            return Told(None, None, 0, said(fault, job))
        noticed = job.until("the life is over", lambda: over(job), fault.within)
        reached, saved = job.step, job.saved
        # Saves are written behind the training: the newest may have been under way.
        loses = reached % EVERY + EVERY if fault.loses is None else fault.loses
        assert 0 <= reached - saved <= loses, (reached, saved, job.story())
        if fault.then == "ends":
            assert job.until_ended() == fault.state, job.story()
            return Told(noticed, None, reached - saved, said(fault, job))
        job.until_life(1, 600)
        back = time.monotonic() - began
        if fault.elsewhere:
            assert f"n{made}" not in job.nodes, job.story()
        disturbed.close()
        assert job.until_ended() == fault.state, job.story()
        assert len(job.restarts) == 1 or (job.restarts and fault.again), job.story()
        assert all(r.reason in fault.reason.split("|") for r in job.restarts), job.story()
        return Told(noticed, back, reached - saved, said(fault, job))


def submit(cluster: Cluster, fault: Fault, folder: Path, data: Path) -> Job:
    folder = cluster.small / "run" if fault.small else folder
    return cluster.submit(tree(folder, data, **fault.changes), site=fault.site)


def over(job: Job) -> bool:
    """srun has left, or Slurm has taken the job back, or it has ended."""
    return "srun left with" in job.log or job.polled_state not in ("RUNNING", "COMPLETING")


def said(fault: Fault, job: Job) -> str:
    for words in fault.reads:
        assert words in job.log, f"not said: {words}; {job.story()}"
    return "; ".join(x for x in job.log.splitlines() if fault.reads and fault.reads[0] in x)[:300]


def signal_steps(cluster: Cluster, job: Job) -> None:
    job.slurm("scancel", "--signal=USR1", job.number)


def kill_rank(cluster: Cluster, job: Job) -> None:
    node, pid = job.rank_pid(1)
    cluster("on", node, "kill", "-9", pid)


def stop_rank(cluster: Cluster, job: Job) -> None:
    node, pid = job.rank_pid(1)
    cluster("on", node, "kill", "-STOP", pid)


def last_node(job: Job) -> int:
    return int(job.nodes[-1][1:])


def cut_power(cluster: Cluster, job: Job) -> int:
    node = last_node(job)
    cluster("power-cut", node)
    return node


def cut_power_of_first(cluster: Cluster, job: Job) -> int:
    """Of the batch script's and rank 0's node."""
    node = int(job.nodes[0][1:])
    cluster("power-cut", node)
    return node


def cut_power_in_save(cluster: Cluster, job: Job) -> int:
    node, writing = last_node(job), job.run / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(writing.glob(".writing-*")):
        assert time.monotonic() < deadline, job.story()
        time.sleep(0.001)
    cluster("power-cut", node)
    return node


def boot(cluster: Cluster, node: int) -> None:
    cluster("boot", node)
    all_idle(cluster, but=1)


def unplug(cluster: Cluster, job: Job) -> int:
    node = last_node(job)
    cluster("unplug", node)
    return node


def plug(cluster: Cluster, node: int) -> None:
    cluster("plug", node)
    # By itself Slurm looks for a node that it has taken for DOWN at every twentieth ping alone.
    resume(cluster, node)


def drain(cluster: Cluster, job: Job) -> int:
    node = last_node(job)
    job.slurm("scontrol", "update", f"nodename=n{node}", "state=drain", "reason=test")
    job.slurm("scancel", "--signal=USR1", job.number)
    return node


def resume(cluster: Cluster, node: int) -> None:
    # It may be in service again already.
    cluster("run", "scontrol", "update", f"nodename=n{node}", "state=resume", check=False)


def restart_controller(cluster: Cluster, job: Job) -> None:
    cluster("controller-dies")
    time.sleep(2)
    cluster("controller-starts")


def fill_disk(cluster: Cluster, job: Job) -> Path:
    path = cluster.small / "filled"
    cluster("run", "dd", "if=/dev/zero", f"of={path}", "bs=64k", check=False)
    return path


def reach_time_limit(cluster: Cluster, job: Job) -> None:
    """Slurm's signal, a minute before the limit of two, finds the ranks where they are: stopped
    until then, which spares the machine. Slurm lets what is stopped go on as it signals."""
    for rank in range(2):
        node, pid = job.rank_pid(rank)
        cluster("on", node, "kill", "-STOP", pid)
    job.until("Slurm signals", lambda: "on request" in job.log, 100)


def slow_down(cluster: Cluster, job: Job) -> None:
    """A rank gets a quarter of its time until somebody has noticed."""
    node, pid = job.rank_pid(1)
    turn = f"kill -STOP {pid}; sleep 0.3; kill -CONT {pid}; sleep 0.1"
    began = time.monotonic()
    while "rank 1 on n2 is slow" not in job.log:  # of another, a busy machine may say so, too
        assert time.monotonic() < began + 60, job.story()
        cluster("on", node, "bash", "-c", f"for i in 1 2 3 4 5; do {turn}; done")


def all_idle(cluster: Cluster, seconds: float = 60.0, but: int = 0) -> None:
    deadline = time.monotonic() + seconds
    while cluster.idle() < 4 - but:
        assert time.monotonic() < deadline, cluster("status")
        time.sleep(0.2)


def seen_after(seconds: int) -> Callable[[Cluster], AbstractContextManager[None]]:
    """Slurm takes a silent node for DOWN after so many seconds, instead of 10."""

    @contextmanager
    def around(cluster: Cluster) -> Iterator[None]:
        cluster("timeout", seconds)
        try:
            yield
        finally:
            cluster("timeout", 10)

    return around


FAULTS = {
    "signal": Fault(
        "signal ahead of the time limit", signal_steps, "asked", loses=0, reads=("again: asked",)
    ),
    "time limit": Fault(
        "the time limit itself",
        reach_time_limit,
        "asked",
        loses=0,
        reads=("again: asked",),
        site={"time": "2", "stop_ahead": 60},
        again=True,
    ),
    "requeue": Fault(
        "`scontrol requeue`, preemption",
        lambda cluster, job: job.slurm("scontrol", "requeue", job.number),
        "asked",
        loses=0,
    ),
    "cancel": Fault(
        "`scancel`",
        lambda cluster, job: job.slurm("scancel", job.number),
        "",
        then="ends",
        state="CANCELLED",
        loses=0,
        reads=("ended by Slurm",),
    ),
    "drain": Fault("drained node, then a signal", drain, "asked", resume, loses=0, elsewhere=True),
    "rank killed": Fault(
        "a rank is killed (kill -9, out of memory)", kill_rank, "crash", reads=("again: crash",)
    ),
    "rank stopped": Fault("a rank stops (SIGSTOP)", stop_rank, "hang", reads=("again: hang",)),
    "power": Fault("power cut of a node", cut_power, "node failure", boot, elsewhere=True),
    "power first": Fault(
        "power cut of the first node", cut_power_of_first, "node failure", boot, elsewhere=True
    ),
    "power save": Fault(
        "power cut of a node in a save",
        cut_power_in_save,
        "node failure",
        boot,
        elsewhere=True,
        changes={"checkpoint__mode": "local"},
    ),
    "power 60": Fault(
        "power cut of a node, SlurmdTimeout=60",
        cut_power,
        "node failure",
        boot,
        reads=("stays, until Slurm sees",),
        around=seen_after(60),
        elsewhere=True,
    ),
    "power 300": Fault(
        "power cut of a node, SlurmdTimeout=300 (Slurm's default)",
        cut_power,
        "node failure",
        boot,
        reads=("stays, until Slurm sees",),
        around=seen_after(300),
        elsewhere=True,
        by_hand=True,
    ),
    "network": Fault("a node's network is cut", unplug, "node failure|hang", plug, elsewhere=True),
    "disk": Fault(
        "the shared disk is full, and stays so",
        fill_disk,
        "",
        lambda cluster, path: cluster("run", "rm", path),
        then="ends",
        state="FAILED",
        small=True,
    ),
    "slow": Fault(
        "a rank is slow",
        slow_down,
        "",
        then="goes on",
        reads=("rank 1 on n2 is slow",),
        changes={"log__straggler": {"every": 2, "looks": 2}},
    ),
    "controller": Fault("Slurm's controller restarts", restart_controller, "", then="goes on"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FAULTS))
    args = parser.parse_args()
    unknown = set(args.names) - FAULTS.keys()
    if unknown:
        parser.error(f"{unknown}: choose from {', '.join(FAULTS)}")
    home = Path(tempfile.mkdtemp(prefix="faults-"))
    data, bad = home / "data", 0
    expected = torture.undisturbed(tree(home / "whole", data), data)
    cluster = Cluster()
    print("| fault | noticed after | trains again after | steps done again | the log says |")
    print("|---|---|---|---|---|")
    for count, name in zip(itertools.count(), args.names or FAULTS):
        fault = FAULTS[name]
        job = submit(cluster, fault, home / f"run-{count}", data)
        try:
            told = strike(cluster, fault, job)
            assert fault.then == "ends" or torture.result(str(job.run)) == expected
        except AssertionError as e:
            bad += 1
            print(f"| {fault.what} | FAILED | | | |", flush=True)
            print(f"{name}: {e}", file=sys.stderr, flush=True)
            cluster("down")
            cluster("up")
            continue
        times = [f"{x:.0f} s" if x is not None else "-" for x in (told.noticed, told.back)]
        print(f"| {fault.what} | {' | '.join(times)} | {told.lost} | {told.words} |", flush=True)
        all_idle(cluster)
    cluster.down()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
