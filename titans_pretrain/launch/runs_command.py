"""`titans-pretrain runs [FOLDER ...]`: a line a run. `titans-pretrain runs show RUN`: its story."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from titans_pretrain.errors import EXIT_DONE, ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.launch.runs import (
    Found,
    Row,
    as_table,
    find_runs,
    is_run,
    read_run,
    row,
    short,
)
from titans_pretrain.launch.show import as_json, as_text

DEFAULT = Path("runs")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    runs = commands.add_parser(
        "runs",
        help="list runs and their states, or tell one's story",
        description="A line for each run at or below the folders. `runs show RUN ...` tells the "
        "story of each RUN: a run folder, or its name below runs/. States come from Slurm where it "
        "knows a run's job, else from the run's folder.",
    )
    runs.add_argument(
        "what", nargs="*", metavar="[show] FOLDER", help=f"where to look; default: {DEFAULT}"
    )
    runs.add_argument("--json", action="store_true", help="print the same as JSON")
    runs.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="print it again after so many seconds"
    )
    runs.set_defaults(run=runs_command)


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number


def runs_command(args: argparse.Namespace) -> int:
    """The command. Raises ConfigError."""
    told: set[str] = set()

    def tell(what: str) -> None:
        """Once, however often it is met."""
        if what not in told:
            told.add(what)
            print(f"titans-pretrain runs: {what}", file=sys.stderr)

    show = args.what[:1] == ["show"]
    if show and not args.what[1:]:
        raise ConfigError(
            "runs show: no run is named",
            "show tells the story of runs",
            "titans-pretrain runs show RUN; titans-pretrain runs lists them",
        )
    while True:
        text = _show(args.what[1:], tell, args.json) if show else _list(args.what, tell, args.json)
        if args.watch is not None and sys.stdout.isatty() and not args.json:
            print("\033[H\033[2J", end="")
        print(text, flush=True)
        if args.watch is None:
            return EXIT_DONE
        try:
            time.sleep(args.watch)
        except KeyboardInterrupt:
            return EXIT_DONE


def _list(folders: Sequence[str], tell: Callable[[str], None], as_json_: bool) -> str:
    roots = [Path(folder) for folder in folders] or [DEFAULT]
    named = [(run, _name(run, root, len(roots))) for root in roots for run in find_runs(root, tell)]
    if not named:
        raise ConfigError(
            f"no run in {', '.join(map(str, roots))}",
            "a run's folder holds config.yaml and metrics.jsonl, or jobs and logs",
            "titans-pretrain runs FOLDER; a run is where its config's folder= says",
        )
    found = [(each, name) for run, name in named if (each := _read(run, tell)) is not None]
    queue = _queue([each for each, _ in found], tell)
    rows = [row(each, name, queue) for each, name in found]
    if as_json_:
        return json.dumps([asdict(r) for r in rows], indent=1)
    return "\n".join(as_table(rows))


def _name(run: Path, root: Path, roots: int) -> str:
    if run == root:
        return run.resolve().name
    return str(run.relative_to(root)) if roots == 1 else str(run)


def _show(names: Sequence[str], tell: Callable[[str], None], as_json_: bool) -> str:
    found = [each for name in names if (each := _read(_run(name), tell)) is not None]
    queue = _queue(found, tell)
    rows: list[tuple[Found, Row]] = [
        (each, row(each, each.folder.resolve().name, queue)) for each in found
    ]
    if as_json_:
        return json.dumps([as_json(each, r) for each, r in rows], indent=1)
    return "\n\n".join(as_text(each, r, tell) for each, r in rows)


def _run(name: str) -> Path:
    """The folder of a run that is named by it, or by what it is called below runs/."""
    for folder in (Path(name), DEFAULT / name):
        if folder.is_dir():
            try:
                names = [p.name for p in folder.iterdir()]
            except PermissionError as e:
                raise ConfigError(
                    f"{folder}: {e.strerror}", "a run's folder can be read", "ask its owner"
                ) from e
            if is_run(names):
                return folder
    raise ConfigError(
        f"{name} is no run, nor is {DEFAULT / name}",
        "a run's folder holds config.yaml and metrics.jsonl, or jobs and logs",
        "titans-pretrain runs lists those below runs; titans-pretrain runs FOLDER those elsewhere",
    )


def _read(run: Path, tell: Callable[[str], None]) -> Found | None:
    """None, and why, where a run cannot be read."""
    try:
        return read_run(run, time.time(), lambda what: tell(f"{what} damaged: left out"))
    except OSError as e:
        tell(f"{run}: {e.filename or ''}: {e.strerror}: left out")
        return None


def _queue(
    found: Sequence[Found], tell: Callable[[str], None]
) -> Mapping[str, slurm.Queued] | None:
    """What Slurm knows of all their jobs; None, and why, if it cannot be asked."""
    jobs = sorted({job for each in found for job in each.jobs})
    if not jobs:
        return {}
    try:
        return slurm.queue(jobs)
    except ConfigError as e:
        tell(f"states are from the run folders alone: {short(e.value, 200)}")
        return None
