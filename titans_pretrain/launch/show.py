"""A run's story in words: its config, submissions and lives, what went wrong, what is kept."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from titans_pretrain.launch.runs import Found, Row, ago, pace, read_tree, short
from titans_pretrain.launch.story import Life, reports
from titans_pretrain.run.console import duration
from titans_pretrain.run.folder import CHECKPOINT_FORMAT, RunFolder

Tell = Callable[[str], None]

_LOSSES = 5  # of the last records


def as_json(found: Found, row: Row) -> dict[str, Any]:
    """Everything that `as_text` tells."""
    return {
        **asdict(row),
        "submissions": submissions(found.folder),
        "lives": [asdict(life) for life in found.lives],
        "reports": [str(path) for path in reports(found.folder, 0.0, None)],
        "skipped": skipped(RunFolder(found.folder).metrics),
        "checkpoints": [
            {"step": step, "time": at, "bytes": size_of(found.folder, step)}
            for step, at in found.checkpoints.items()
        ],
        "losses": [[r["step"], r["values"].get("train/loss")] for r in _last_values(found)],
    }


def as_text(found: Found, row: Row, tell: Tell) -> str:
    """The story, a paragraph each."""
    parts = {
        f"{row.name}: {row.state} {row.why}".rstrip(): list(_what(found, row, tell)),
        "submissions": [" ".join(s.values()) for s in submissions(found.folder)],
        "lives": [line for life in found.lives for line in _life(found, life)],
        "the watchdog's reports": [str(p) for p in reports(found.folder, 0.0, None)],
        "skipped": [
            f"before step {s['step']}: {s['event']}"
            for s in skipped(RunFolder(found.folder).metrics)
        ],
        "checkpoints": list(_checkpoints(found)),
        "losses": list(_losses(found)),
        "what to type": list(_commands(found, row)),
    }
    return "\n".join(
        "\n".join([head, *(f"  {line}" for line in lines)])
        for head, lines in parts.items()
        if lines
    )


def _what(found: Found, row: Row, tell: Tell) -> Iterator[str]:
    run = RunFolder(found.folder)
    config = run.config
    if not config.exists():
        config = max(run.jobs.glob("*/config.yaml"), default=config)
    tree = read_tree(config, lambda what: tell(f"{what} damaged: left out"))
    model, data, train, optim = (_section(tree, k) for k in ("model", "data", "train", "optim"))
    yield (
        f"model     {model.get('variant')}, {model.get('blocks')} blocks of width "
        f"{model.get('width')}, {train.get('precision')}"
    )
    yield (
        f"data      {', '.join(data.get('sources') or {})}; rows of {data.get('sequence_length')} "
        f"tokens, {train.get('global_batch')} a step"
    )
    yield (
        f"training  {train.get('steps')} steps, lr {optim.get('lr')} {optim.get('schedule')}, "
        f"seed {train.get('seed')}"
    )
    latest = next((life for life in reversed(found.lives) if life.layout), None)
    if latest is not None:
        yield f"layout    {latest.ranks} ranks, {latest.layout}"
    written = _format(found)
    if written is not None and written != CHECKPOINT_FORMAT:
        yield (
            f"version   its checkpoints have format {written}, this version reads "
            f"{CHECKPOINT_FORMAT}: use the version of titans_pretrain that wrote them"
        )
    progress = f"step {row.step:,} of {row.steps:,}" if row.steps else f"step {row.step:,}"
    rate = f", {row.tokens_per_s:,.0f} tokens/s" if row.tokens_per_s is not None else ""
    yield f"progress  {progress}, {row.tokens:,} tokens{rate}{_left(found, row)}"


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _left(found: Found, row: Row) -> str:
    if row.eta_s is not None:
        done = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found.now + row.eta_s))
        return f", {duration(row.eta_s)} left: done at {done}"
    _, seconds = pace(found.records, [life.began for life in found.lives if life.began])
    if row.steps is None or seconds is None or row.step >= row.steps:
        return ""
    return f", {duration((row.steps - row.step) * seconds)} left once it runs"


def _format(found: Found) -> int | None:
    """Of the newest checkpoint; None if there is none, or it cannot be read."""
    path = found.folder / "checkpoints" / f"step-{found.newest:08d}" / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("format") if isinstance(state, dict) else None


def submissions(run: Path) -> list[dict[str, str]]:
    """Of each: its job, when, its size, and the command, as far as its folder tells."""
    found = []
    for folder in sorted(p for p in (run / "jobs").glob("[0-9]*") if p.is_dir()):
        told = _lines(folder / "env.txt")
        facts = {k: v for k, _, v in (line.partition(" ") for line in told)}
        script = "\n".join(_lines(folder / "pretrain.sbatch"))
        size = {
            name: re.search(rf"^#SBATCH --{name}=(\d+)", script, re.MULTILINE)
            for name in ("nodes", "ntasks-per-node")
        }
        nodes, tasks = size["nodes"], size["ntasks-per-node"]
        jobs = _lines(folder / "id")
        found.append(
            {
                "number": folder.name,
                "job": f"job{'s' * (len(jobs) > 1)} {', '.join(jobs)}" if jobs else "no job",
                "time": facts.get("time", "").strip(),
                "size": f"{nodes[1]} nodes x {tasks[1]}" if nodes and tasks else "",
                "commit": f"commit {facts.get('commit', '').strip()[:12]}",
                "command": facts.get("command", "").strip(),
            }
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _life(found: Found, life: Life) -> Iterator[str]:
    where = f" on {', '.join(life.hosts)}" if life.hosts else ""
    job = f", job {life.job} (start {life.queued + 1})" if life.job and life.number else ""
    steps = ""
    if life.first is not None:
        steps = (
            f", steps {life.first:,} to {life.last:,}"
            if life.last is not None
            else (f", from step {life.first:,}")
        )
    ended = _at(life.ended) if life.ended else "now" if _is_last(found, life) else "?"
    yield f"{life.name}: {_at(life.began)} to {ended}{where}{job}{steps}"
    if life.how:
        yield f"  {short(life.how, 300)}"


def _is_last(found: Found, life: Life) -> bool:
    alive = found.holder is not None and found.holder.alive
    return alive and life is found.lives[-1]


def _at(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when)) if when else "?"


def skipped(metrics: Path) -> list[dict[str, Any]]:
    """What the run passed by, of the whole file: {"step", "event"}. Raises OSError."""
    found = []
    if metrics.exists():
        with metrics.open("rb") as file:
            for line in file:
                if b'"event":' in line and b'"events/divergence"' in line:
                    record = json.loads(line)
                    found.append({"step": record["step"], "event": record["event"]})
    return found


def size_of(run: Path, step: int) -> int:
    """Bytes of a checkpoint's files."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return sum(p.stat().st_size for p in folder.iterdir()) if folder.exists() else 0


def _checkpoints(found: Found) -> Iterator[str]:
    for step, at in found.checkpoints.items():
        size = size_of(found.folder, step) / 2**20
        yield f"step {step:,}, {ago(found.now - at)}, {size:,.1f} MiB"


def _last_values(found: Found) -> list[dict[str, Any]]:
    return [r for r in found.records if "values" in r][-_LOSSES:]


def _losses(found: Found) -> Iterator[str]:
    last = [
        f"{r['step']:,}: {r['values']['train/loss']:.4f}"
        for r in _last_values(found)
        if "train/loss" in r["values"]
    ]
    if last:
        yield f"training    {', '.join(last)}"
    for record in reversed(found.records):
        loss = record.get("values", {}).get("validation/loss")
        if loss is not None:
            yield f"validation  {record['step']:,}: {loss:.4f}"
            return


def _commands(found: Found, row: Row) -> Iterator[str]:
    run = RunFolder(found.folder)
    at = shlex.quote(str(found.folder))
    logs = [run.logs / f"job-{found.jobs[-1]}.out"] if found.jobs else []
    log = next((path for path in logs if path.exists()), run.log(0))
    yield f"watch   tail -F {shlex.quote(str(log))}"
    yield f"        titans-pretrain board {at}"
    if row.state in ("running", "starting", "pending", "requeued"):
        yield f"stop    titans-pretrain stop {at}"
        return
    if row.state in ("done", "stopping"):
        return
    again = f"titans-pretrain train {shlex.quote(str(run.config))}"
    if found.lives and found.lives[-1].ranks > 1:
        again += f" --ranks {found.lives[-1].ranks}"
    commands = [s["command"] for s in submissions(found.folder) if s["command"]]
    remove = f"rm {shlex.quote(str(run.stop))}; " if found.stop else ""
    yield f"resume  {remove}{commands[-1] if commands else again}"
