"""Jobs on a real Slurm that are killed at random moments, as often as one likes: each goes on by
itself and ends bitwise where the undisturbed run ends.

    make kills                              # 200 kills; stopped, it goes on counting
    python -m tests.slurm.kills --kills 400 # 200 more

A job is disturbed five times and then left alone: a rank gets kill -9, a node loses its power and
boots again, the job is queued again by hand, or its ranks are asked to save. What is drawn depends
on the number of the job alone: a failure is repeated by `--only NUMBER`.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests import torture
from tests.slurm.cluster import ENDED, Cluster, Job, why_not
from tests.slurm.faults import STEPS, all_idle, tree

MOMENTS = ("starting", "training", "saving")  # the first of a later life: resuming
MEANS = ("rank 0", "rank 1", "power", "requeue", "signal")
KILLS = 5  # of a job


def lives(job: Job) -> int:
    """How many have begun."""
    return len(list((job.run / "jobs").glob(f"begun.{job.number}.*")))


def come_to(moment: str, life: int, job: Job, draw: random.Random) -> bool:
    """Waits for a moment of life `life`; False if the job ended before."""

    def or_ended(condition: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: condition() or job.polled_state in ENDED

    job.until(f"life {life} begins", or_ended(lambda: lives(job) > life), 240)
    if moment == "starting":
        time.sleep(draw.uniform(0, 10))  # importing and loading, for the most part
    elif moment == "saving":
        folder = job.run / "checkpoints"
        while not list(folder.glob(".writing-*")) and job.polled_state not in ENDED:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
    else:
        step = draw.randint(min(job.saved + 1, STEPS), STEPS)  # it may be saved to its end
        job.until(f"step {step}", or_ended(lambda: job.step >= step), 240)
    return job.state not in ENDED


def kill(means: str, cluster: Cluster, job: Job) -> int:
    """Disturbs the job; the node that has to be booted again, or 0."""
    if means == "requeue":
        cluster("run", "scontrol", "requeue", job.number, check=False)  # it may be queued already
    elif means == "signal":
        cluster("run", "scancel", "--signal=USR1", job.number, check=False)
    elif means == "power":
        node = int((job.nodes or ["n1"])[-1][1:])
        cluster("power-cut", node)
        return node
    else:
        found: list[tuple[int, int]] = []

        def is_there() -> bool:
            place = job.find_rank(int(means[-1]))
            found.extend([place] if place else [])
            return bool(place) or job.polled_state in ENDED

        job.until("the rank", is_there)
        for node, pid in found:
            cluster("on", node, "kill", "-9", pid, check=False)
    return 0


def next_life(job: Job, act: Callable[[], int]) -> tuple[float, int]:
    """Acts, and waits until the next life begins or the job ends: seconds, what `act` returned."""
    begun, node = lives(job), act()
    over = job.until("the next life", lambda: lives(job) > begun or job.polled_state in ENDED, 300)
    return over, node


def disturb(
    cluster: Cluster, config: dict[str, Any], draw: random.Random, tell: Callable[[str], None]
) -> tuple[int, Job]:
    """One job, up to its end; (kills, its last submission)."""
    job, kills, life = cluster.submit(config), 0, 0
    while True:
        if kills < KILLS:
            moment, means = draw.choice(MOMENTS), draw.choice(MEANS)
            if come_to(moment, life, job, draw):
                took, node = next_life(job, partial(kill, means, cluster, job))
                kills += 1
                if node:
                    cluster("boot", node)
                tell(f"{means}, {moment} in life {life}: next after {took:.0f} s")
                life = lives(job) - 1
        else:
            job.until_ended(300)
        if job.state in ENDED:
            if job.state == "COMPLETED":
                return kills, job
            assert "given up" in job.log, job.story()
            tell(f"job {job.number} gave up; submitted again")
            all_idle(cluster)
            job, life = cluster.submit(config), 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = torture.parse(__doc__, "kills", 200, arguments)
    if reason := why_not():
        print(f"no Slurm: {reason}", file=sys.stderr)
        return 2
    count = torture.Count(args)
    if count.enough and args.only is None:
        print(f"{count.kills} kills done; --kills MORE, or --again")
        return 0
    data = args.folder / "data"
    expected = torture.undisturbed(tree(args.folder / "whole", data), data)
    cluster = Cluster()
    try:
        while not count.enough or args.only is not None:
            number = count.runs if args.only is None else args.only
            config = tree(args.folder / f"job-{number:04d}", data)
            shutil.rmtree(config["folder"], ignore_errors=True)
            kills, _ = disturb(cluster, config, random.Random(number), partial(print, flush=True))
            got = torture.result(config["folder"])
            assert got == expected, f"job {number} is not the undisturbed run"
            shutil.rmtree(config["folder"])
            if args.only is not None:
                return 0
            count.add(kills)
            print(f"{count.told()}: job {number} is bitwise the undisturbed run", flush=True)
            all_idle(cluster)
    except AssertionError as e:
        print(f"job {number} failed, its folder stays: {e}", file=sys.stderr)
        return 1
    finally:
        cluster.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
