"""What a job script does after a life has ended: queue the job again, end it, or stay.

`decide` is a function of what is known: srun's exit code, the ranks' marks (run/marks.py), nodes
that do not answer, and the restarts so far. The job script calls this module twice a life:

    python -m titans_pretrain.launch.verdict begin                        before the ranks
    python -m titans_pretrain.launch.verdict end --code N [--dead A,B] [--avoid C]

`--submission` names the folder of the submission; where its file `id` lists several jobs, they are
a chain: their restarts count together, and once one of them has ended the run for good, the others
leave as it did. Each prints one line, `go`, `again`, `stay` or `end`, then an exit code and the
nodes to avoid (or -), and tells the reason on stderr. Restarts are kept in RUN/restarts.tsv.

It runs in the batch shell, outside of any container: any Python from 3.8 on, standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from titans_pretrain.errors import EXIT_DONE, EXIT_HANG, EXIT_NODE, EXIT_OTHER, EXIT_SAVED
from titans_pretrain.run.marks import Failure, Marks, here

BUDGET = 3  # restarts for one reason without a newer checkpoint
USER = (2, 3, 4)  # configuration, data, diverged: the same again if started again
ASKED, NODE, CUT = "asked", "node failure", "cut off"  # CUT: a chain's job that Slurm ended


class Restart(NamedTuple):
    """One line of restarts.tsv."""

    time: str
    job: str
    life: int  # that ended
    step: int  # of the newest checkpoint then
    reason: str
    nodes: tuple[str, ...] = ()  # named for it


class Facts(NamedTuple):
    """What is known of a life that has ended."""

    code: int  # of srun
    step: int = 0  # of the newest checkpoint
    begun: int = 0  # of the newest checkpoint as the life began
    stop: bool = False  # the user has asked for the end of the run
    saved: bool = False  # a checkpoint was saved on request
    started: bool = True  # a rank has begun
    failure: Failure | None = None
    bad: tuple[str, ...] = ()  # nodes that a check found bad
    dead: tuple[str, ...] = ()  # nodes that do not answer
    unfit: str = ""  # why the preflight lets no life begin, if no node is to blame


class Verdict(NamedTuple):
    do: str  # again, stay or end
    code: int  # with which the job ends, if it ends
    reason: str
    nodes: tuple[str, ...] = ()
    words: str = ""


def decide(facts: Facts, history: Sequence[Restart]) -> Verdict:
    """What follows. `history`: restarts of this job, or of its chain, the oldest first."""
    f, failure = facts, facts.failure
    if f.stop:
        return Verdict("end", EXIT_DONE, "stopped", words="the user has stopped the run")
    if f.saved:
        if f.step > f.begun:
            return Verdict("again", EXIT_SAVED, ASKED, words=f"saved on request, step {f.step}")
        return _within(f, history, "asked without a step", EXIT_SAVED, "stopped before any step")
    if f.code == EXIT_DONE:
        return Verdict("end", EXIT_DONE, "done")
    if f.dead:
        # Slurm will see it, too, and queue the running job again by itself. First of all: a job
        # that is queued again while a node is gone and not yet DOWN gets broken GPUs.
        words = f"does not answer: {', '.join(f.dead)}"
        return _within(f, history, NODE, f.code, words, f.dead, do="stay")
    if f.bad:
        return _within(f, history, "hardware", EXIT_NODE, f"bad: {', '.join(f.bad)}", f.bad)
    if f.unfit:
        return Verdict("end", EXIT_NODE, "preflight", words=f.unfit)
    if failure is not None:
        words = f"rank {failure.rank} on {failure.host}: {failure.kind}: {failure.what}; "
        words += f"see logs/rank-{max(0, failure.rank):05d}.err"
        if failure.code == EXIT_HANG:
            return _within(f, history, "hang", EXIT_HANG, words)
        if failure.code == EXIT_NODE:
            return _within(f, history, "node fault", EXIT_NODE, words)
        return Verdict("end", failure.code, "failed", words=words)
    if f.code in USER:
        return Verdict("end", f.code, "failed", words=f"exit code {f.code}: see the log")
    if not f.started:
        return _within(f, history, "no rank started", f.code, f"srun left with {f.code}")
    return _within(f, history, "crash", f.code, f"a rank ended without a word, code {f.code}")


def _within(
    facts: Facts,
    history: Sequence[Restart],
    reason: str,
    code: int,
    words: str,
    nodes: tuple[str, ...] = (),
    do: str = "again",
) -> Verdict:
    """`do`, unless it has been done for this reason too often since the newest checkpoint."""
    before = sum(r.reason == reason and r.step >= facts.step for r in history)
    if before < BUDGET:
        return Verdict(do, code, reason, nodes, words)
    words += f"; given up: restarted {before} times for it without a checkpoint after {facts.step}"
    return Verdict("end", code or EXIT_OTHER, reason, nodes, words)


def missing(
    marks: Marks, chain: Sequence[str], history: Sequence[Restart], step: int
) -> Restart | None:
    """The former life, where it left no line: Slurm itself queued the job again, or ended it."""
    former = _former(marks, chain)
    if former is None or any((r.job, r.life) == (former.job, former.life) for r in history):
        return None
    why = NODE if former.job == marks.job else CUT
    return _line(former, step, ASKED if former.has("saved") else why, ())


def _former(marks: Marks, chain: Sequence[str]) -> Marks | None:
    """The life before this one, of this job or of the job before it in the chain."""
    if marks.life:
        return Marks(marks.run, marks.job, marks.life - 1)
    for job in reversed(chain[: chain.index(marks.job)]):
        begun = (marks.run / "jobs").glob(f"begun.{job}.*")
        lives = [int(p.name.rpartition(".")[2]) for p in begun]
        if lives:
            return Marks(marks.run, job, max(lives))
    return None


def chain_of(submission: str, job: str) -> list[str]:
    """The jobs of a submission in their order; a job submitted by hand is one of its own."""
    path = Path(submission, "id")
    jobs = path.read_text(encoding="utf-8").split() if submission and path.exists() else []
    return jobs if job in jobs else [job]


def ended(run: Path, chain: Sequence[str], job: str) -> Verdict | None:
    """How a job before this one in its chain has ended the run, if one has."""
    for former in chain[: chain.index(job)]:
        for path in (run / "jobs").glob(f"ended.{former}.*"):
            code, _, reason = path.read_text(encoding="utf-8").strip().partition(" ")
            words = f"job {former}, earlier in this chain, has ended the run"
            return Verdict("end", int(code), reason, words=words)
    return None


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    names = (p.name[5:] for p in (run / "checkpoints").glob("step-*"))
    return max((int(n) for n in names if n.isdigit()), default=0)


def read_history(run: Path, jobs: Sequence[str]) -> list[Restart]:
    path = run / "restarts.tsv"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        fields = line.split("\t")
        if len(fields) != 6:
            continue  # its node was lost as it wrote this
        when, name, life, step, reason, nodes = fields
        if name in jobs:
            named = tuple(n for n in nodes.split(",") if n)
            found.append(Restart(when, name, int(life), int(step), reason, named))
    return found


def _line(marks: Marks, step: int, reason: str, nodes: tuple[str, ...]) -> Restart:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Restart(now, marks.job, marks.life, step, reason, nodes)


def _note(run: Path, r: Restart) -> None:
    path = run / "restarts.tsv"
    line = "\t".join((r.time, r.job, str(r.life), str(r.step), r.reason, ",".join(r.nodes))) + "\n"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + line)


def begin(marks: Marks, chain: Sequence[str]) -> Verdict:
    """Before the ranks of a life: writes what it starts from, and whether it may start."""
    step, history = newest_step(marks.run), read_history(marks.run, chain)
    if (marks.run / "stop").exists():
        return decide(Facts(0, stop=True), history)
    if (over := ended(marks.run, chain, marks.job)) is not None:
        return over
    marks.write("begun", f"{step}\n")
    lost = missing(marks, chain, history, step)
    if lost is not None:
        _note(marks.run, lost)
        if lost.reason in (NODE, CUT):
            words = "queued again by Slurm" if lost.reason == NODE else f"job {lost.job}"
            verdict = _within(Facts(0, step), history, lost.reason, EXIT_NODE, words)
            return verdict if verdict.do == "end" else verdict._replace(do="go", code=EXIT_DONE)
    return Verdict("go", EXIT_DONE, "begin", words=f"from step {step}")


def end(
    marks: Marks,
    chain: Sequence[str],
    code: int,
    dead: tuple[str, ...],
    avoid: tuple[str, ...],
) -> Verdict:
    """After the ranks of a life; a restart is noted. The nodes are all those to avoid."""
    history = read_history(marks.run, chain)
    facts = Facts(
        code,
        step=newest_step(marks.run),
        begun=int((marks.lines("begun") or ["0"])[0]),
        stop=(marks.run / "stop").exists(),
        saved=marks.has("saved"),
        started=marks.has("started"),
        failure=marks.failure(),
        bad=tuple(dict.fromkeys(marks.lines("bad"))),
        unfit=" ".join(marks.lines("unfit")),
        dead=dead,
    )
    verdict = decide(facts, history)
    if verdict.do != "end":
        _note(marks.run, _line(marks, facts.step, verdict.reason, verdict.nodes))
    if verdict.do != "again" or not verdict.nodes:
        return verdict  # what was excluded before stays excluded
    earlier = {n for r in history if r.reason == "hardware" for n in r.nodes}
    return verdict._replace(nodes=tuple(sorted({*avoid, *earlier, *verdict.nodes})))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verdict")
    parser.add_argument("when", choices=("begin", "end"))
    parser.add_argument("--code", type=int, default=0, help="srun's exit code")
    parser.add_argument("--dead", default="", help="nodes that do not answer")
    parser.add_argument("--avoid", default="", help="nodes that the job was submitted without")
    parser.add_argument("--submission", default="", help="folder that holds code, config and id")
    args = parser.parse_args(argv)
    marks = here()
    if marks is None:
        parser.error("TITANS_RUN and TITANS_JOB are not set: the job script sets them")
    dead, avoid = (tuple(n for n in x.split(",") if n) for x in (args.dead, args.avoid))
    try:
        chain = chain_of(args.submission, marks.job)
        if args.when == "begin":
            v = begin(marks, chain)
        else:
            v = end(marks, chain, args.code, dead, avoid)
    except OSError as e:  # nothing could be counted: no restart, lest it go on for ever
        words = f"{e}; free space or mend the disk, and submit the run again"
        v = Verdict("end", args.code or EXIT_NODE, "the run folder cannot be used", words=words)
    if v.do == "end":
        with contextlib.suppress(OSError):  # a chain's next job will find out by itself
            marks.write("ended", f"{v.code} {v.reason}\n")
    print(f"{v.do}: {v.reason}{f' ({v.words})' if v.words else ''}", file=sys.stderr)
    print(v.do, v.code, ",".join(v.nodes) or "-")
    return 0


if __name__ == "__main__":
    sys.exit(main())
