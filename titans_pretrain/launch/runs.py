"""What state each run is in: from Slurm where there is one, else from the run folders alone.

| state    | what it means                                                                        |
|----------|--------------------------------------------------------------------------------------|
| running  | a process holds the folder and shows signs of life                                   |
| stopping | likewise, and the user has asked it to end for good                                  |
| starting | its job runs, and no rank holds the folder yet                                       |
| pending  | its job waits in Slurm's queue for the first time                                    |
| requeued | its job waits there again, after a life that ended                                   |
| waiting  | for somebody to start it again: saved on request; or its ranks have left, and its    |
|          | job looks what is wrong, or waits for Slurm to see that a node is gone               |
| done     | all steps                                                                            |
| stopped  | by the user, for good                                                                |
| failed   | for the reason told                                                                  |
| dead     | a process holds the folder and shows no sign of life, and no job is known            |

Reads only, and no more of a long file than its end. Knows nothing of torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.errors import EXIT_SAVED, ConfigError
from titans_pretrain.launch.slurm import Queued, jobs_of
from titans_pretrain.launch.story import Life, begun_at, read_story
from titans_pretrain.launch.verdict import NODE
from titans_pretrain.run.console import duration
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import Record, read_tail
from titans_pretrain.run.lock import Holder, look

DEEP = 5  # folders below one another in which runs are looked for

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where there is one

Told = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a run's folder says."""

    folder: Path
    steps: int | None  # of the whole run
    records: list[Record]  # the last of its metrics
    checkpoints: dict[int, float]  # step -> when it was complete
    holder: Holder | None
    lives: list[Life]
    jobs: list[str]  # ids, the oldest first
    begun: set[tuple[str, int]]  # (job, how often queued again) of each start of a job script
    stop: bool
    now: float

    @property
    def newest(self) -> int:
        """The newest checkpoint's step; 0 if there is none."""
        return max(self.checkpoints, default=0)

    @property
    def last(self) -> Record:
        """The last record of values; empty if there is none."""
        return next((r for r in reversed(self.records) if "values" in r), {})


@dataclass(frozen=True)
class Row:
    """One run, as a line shows it."""

    name: str
    folder: str
    state: str  # of the table above
    why: str  # more of it in words
    step: int
    steps: int | None
    tokens: int
    loss: float | None  # nats a token, of the last record
    tokens_per_s: float | None  # over the last records
    checkpoint: int  # the newest one's step; 0: none
    checkpoint_age_s: float | None
    restarts: int  # starts after the first
    eta_s: float | None  # of what runs
    jobs: list[str] = field(default_factory=list)


def find_runs(folder: Path, denied: Told) -> Iterator[Path]:
    """The run folders at or below `folder`, by name; what cannot be read is told to `denied`.

    Raises ConfigError if there is no such folder, or it cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder",
            "runs are looked for in folders",
            "give the folder that holds them; a run is where its config's folder= says",
        )
    try:
        yield from _below(folder, 0, denied)
    except PermissionError as e:
        raise ConfigError(
            f"{folder}: {e.strerror}", "a folder of runs can be read", "ask its owner"
        ) from e


def _below(folder: Path, depth: int, denied: Told) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        names = {e.name: e.is_dir(follow_symlinks=False) for e in entries}
    if is_run(names):
        yield folder
        return
    for name in sorted(n for n, is_dir in names.items() if is_dir and not n.startswith(".")):
        if depth < DEEP:
            try:
                yield from _below(folder / name, depth + 1, denied)
            except PermissionError as e:
                denied(f"{folder / name}: {e.strerror}: left out")


def is_run(names: Sequence[str] | Mapping[str, bool]) -> bool:
    """Whether a folder with these entries is a run's."""
    begun = "config.yaml" in names and ("metrics.jsonl" in names or "checkpoints" in names)
    return begun or ("jobs" in names and "logs" in names)


def read_run(folder: Path, now: float, damaged: Told) -> Found:
    """Raises OSError if it cannot be read."""
    run = RunFolder(folder)
    records, torn = read_tail(run.metrics)
    if torn:
        damaged(f"{run.metrics}: {torn} of its last lines")
    frozen = sorted(run.jobs.glob("*/config.yaml"))
    config = run.config if run.config.exists() or not frozen else frozen[-1]
    return Found(
        folder,
        steps_of(read_tree(config, damaged)),
        records,
        _checkpoints(run.checkpoints),
        look(folder, now),
        read_story(folder, damaged),
        jobs_of(folder),
        set(begun_at(folder)),
        run.stop.exists(),
        now,
    )


def read_tree(config: Path, damaged: Told) -> dict[str, Any]:
    """A configuration as it stands, not judged: it may be of another version. Raises OSError."""
    try:
        tree = yaml.load(config.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    except FileNotFoundError:
        return {}
    if not isinstance(tree, dict):
        damaged(str(config))
        return {}
    return tree


def steps_of(tree: Mapping[str, Any]) -> int | None:
    """train.steps of a resolved configuration, if it can be found."""
    train = tree.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _checkpoints(folder: Path) -> dict[int, float]:
    found = {}
    for path in folder.glob("step-*"):
        if path.name[5:].isdigit():
            state = path / "state.json"
            found[int(path.name[5:])] = (state if state.exists() else path).stat().st_mtime
    return dict(sorted(found.items()))


def row(found: Found, name: str, queue: Mapping[str, Queued] | None) -> Row:
    """`queue`: the jobs that Slurm knows; None where it cannot be asked."""
    state, why = judge(found, queue)
    last = found.last
    step = last.get("step", found.newest)
    rate, seconds = pace(found.records, [life.began for life in found.lives if life.began])
    left = None if found.steps is None or seconds is None else (found.steps - step) * seconds
    ages = [found.now - at for step, at in found.checkpoints.items() if step == found.newest]
    claimed = found.holder.life if found.holder is not None else 0
    numbers = [life.number for life in found.lives]
    without = numbers.count(0) if any(numbers) else 0  # an older run has no other lives on record
    return Row(
        name=name,
        folder=str(found.folder),
        state=state,
        why=why,
        step=step,
        steps=found.steps,
        tokens=last.get("tokens", 0),
        loss=last.get("values", {}).get("train/loss"),
        tokens_per_s=rate,
        checkpoint=found.newest,
        checkpoint_age_s=ages[0] if ages else None,
        restarts=max(0, claimed + without - 1),
        eta_s=left if state == "running" else None,
        jobs=found.jobs,
    )


def pace(records: Sequence[Record], begins: Sequence[float]) -> tuple[float | None, float | None]:
    """(tokens a second, seconds a step) of the last records, with all that happened between them:
    saves, validations; the time between two lives, which began at `begins`, is left out."""
    seconds = tokens = steps = 0.0
    values = [r for r in records if "values" in r and "time" in r]
    for before, after in itertools.pairwise(values):
        if any(before["time"] < at <= after["time"] for at in begins):
            continue
        seconds += after["time"] - before["time"]
        tokens += after["tokens"] - before["tokens"]
        steps += after["step"] - before["step"]
    return (tokens / seconds, seconds / steps) if seconds > 0 and steps > 0 else (None, None)


def judge(found: Found, queue: Mapping[str, Queued] | None) -> tuple[str, str]:
    """(state, more of it in words)."""
    jobs = [queue[job] for job in found.jobs if queue is not None and job in queue]
    running = [job for job in jobs if job.state != "PENDING"]
    if running:
        return _of_running(found, running[-1])
    holder = found.holder
    if holder is not None and holder.alive:
        host = holder.claim.host if holder.claim is not None else "an unknown host"
        return ("stopping" if found.stop else "running"), f"on {host}"
    if jobs:
        return _of_pending(found, jobs[-1])
    if found.steps is not None and found.newest >= found.steps:
        return "done", ""
    if found.stop:
        return "stopped", ""
    life = found.lives[-1] if found.lives else None
    if queue is None and life is None and found.jobs:
        return "pending", f"job {found.jobs[-1]}, as submitted"
    if life is None and holder is None:
        job = found.jobs[-1] if found.jobs else ""
        return "failed", f"no rank began; see logs/job-{job}.out" if job else "no rank began"
    if queue is None and life is not None and life.restarted:
        return "requeued", f"job {life.job}, after: {life.how}"
    if life is not None and life.reason and not (life.code == EXIT_SAVED or life.restarted):
        return "failed", life.how.removeprefix("failed: ")
    if holder is not None and not holder.released:
        host = holder.claim.host if holder.claim is not None else "an unknown host"
        return "dead", f"no sign of life from {host} for {duration(holder.age)}"
    return "waiting", "to be started again" + (f", after: {life.how}" if life and life.how else "")


def _of_running(found: Found, job: Queued) -> tuple[str, str]:
    where = f"on {job.nodes}, job {job.job}"
    if job.state != "RUNNING":
        where += f" ({job.state.lower()})"
    if found.holder is not None and found.holder.alive:
        return ("stopping" if found.stop else "running"), where
    now = max((queued for name, queued in found.begun if name == job.job), default=0)
    life = next((x for x in found.lives if (x.job, x.queued) == (job.job, now)), None)
    if life is None:
        return "starting", where
    if life.reason == NODE and life.avoided:
        return "waiting", f"until Slurm sees that {', '.join(life.avoided)} is gone, job {job.job}"
    return "waiting", f"for its job script to say what follows, job {job.job}"


def _of_pending(found: Found, job: Queued) -> tuple[str, str]:
    where = f"job {job.job}" + (f" ({job.reason})" if job.reason not in ("", "None") else "")
    former = [life for life in found.lives if life.job == job.job]
    if not former:
        return "pending", where
    return "requeued", f"{where}, after: {former[-1].how or 'an end that left no word'}"


def as_table(rows: Sequence[Row]) -> list[str]:
    """A table: a heading, and a line a run."""
    head = ("run", "step", "tokens", "loss", "tokens/s", "checkpoint", "restarts", "eta", "state")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)]
            + [line[-1]]
        ).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    age = f"{row.checkpoint:,}, {ago(row.checkpoint_age_s)}" if row.checkpoint_age_s else "none"
    return (
        row.name,
        f"{row.step:,}/{row.steps:,}" if row.steps else f"{row.step:,}/?",
        f"{row.tokens:,}",
        f"{row.loss:.4f}" if row.loss is not None else "-",
        f"{row.tokens_per_s:,.0f}" if row.tokens_per_s is not None else "-",
        age,
        str(row.restarts),
        duration(row.eta_s) if row.eta_s is not None else "-",
        short(f"{row.state} {row.why}".strip()),
    )


def short(text: str, most: int = 100) -> str:
    """`text` in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def ago(seconds: float | None) -> str:
    """3 min ago."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
