"""`titans-pretrain submit CONFIG [a.b=c ...] --nodes N`: checks, freezes and submits a run.

Everything that can be refused is checked before anything is written; what was written for a job
that sbatch then refuses is removed again.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from titans_pretrain.config import (
    PreflightConfig,
    RunConfig,
    SiteConfig,
    dump_config,
    load_config,
    load_site,
)
from titans_pretrain.errors import EXIT_DONE, ConfigError
from titans_pretrain.launch import slurm
from titans_pretrain.launch.freeze import Code, freeze, look_at_code
from titans_pretrain.launch.render import Job, render, seconds
from titans_pretrain.run.files import storage_error
from titans_pretrain.run.folder import RunFolder


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser(
        "submit",
        help="submit a run to Slurm",
        allow_abbrev=False,
        description="Checks the run that CONFIG describes against the nodes, freezes code and "
        "config in its folder and submits a job, which queues itself again until the run is done.",
    )
    submit.add_argument("config", metavar="CONFIG", help="YAML file")
    submit.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. optim.lr=3e-4")
    submit.add_argument("--nodes", type=_positive, required=True, metavar="N")
    submit.add_argument("--gpus-per-node", type=_positive, metavar="G", help="default: the site's")
    submit.add_argument("--time", metavar="T", help="limit of a life, e.g. 24:00:00")
    submit.add_argument("--site", metavar="FILE", help="what the cluster is like: configs/site/")
    submit.add_argument("--name", help="of the job; default: the run folder's")
    submit.add_argument(
        "--changed", action="store_true", help="go on with a run although its config has changed"
    )
    submit.add_argument(
        "--dry-run", action="store_true", help="print all of it; submit and write nothing"
    )
    submit.set_defaults(run=submit_run)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def submit_run(args: argparse.Namespace) -> int:
    """The command. Raises ConfigError or NodeError, with nothing left behind."""
    config = load_config(args.config, args.overrides)
    site = load_site(args.site) if args.site else SiteConfig()
    gpus = args.gpus_per_node or site.gpus_per_node
    layout = _layout(config, args.nodes, gpus)
    time = args.time or site.time
    if time is not None and seconds(time) <= site.stop_ahead:
        raise ConfigError(
            f"time limit {time}, stop_ahead={site.stop_ahead} s",
            "ranks are asked to save stop_ahead seconds before the limit",
            "give the job more time, or set stop_ahead in the site file",
        )
    run = Path(config.folder).absolute()
    _require_plain(run)
    _require_plain(Path.cwd())
    folder = RunFolder(run)
    folder.refuse_if_stopped()
    changed = list(differences(folder, config))
    if changed and not args.changed:
        raise ConfigError(
            f"{run} holds a run with another config:\n    " + "\n    ".join(changed),
            "a run keeps its config",
            "set another folder=, or go on with the changed one: --changed",
        )
    if not args.dry_run:
        _refuse_if_queued(run)
    frozen = _next(folder.jobs)
    name = _job_name(args.name or run.name)
    python = site.python or sys.executable
    job = Job(name, args.nodes, gpus, time, run, frozen, Path.cwd(), python)
    script, code = render(job, site), look_at_code()

    number = "none: a dry run, nothing is written"
    if not args.dry_run:
        number = _submit(folder, job, code, dump_config(config), script)
    facts = {
        "job": f"{number} ({name})",
        "ranks": f"{args.nodes} nodes x {gpus} GPUs = {args.nodes * gpus}, {layout}",
        "folder": str(run),
        "script": str(frozen / "pretrain.sbatch"),
        "config": str(frozen / "config.yaml"),
        "code": f"{frozen / 'code'}: {code.describe()}",
        "checks": _preflight(site.preflight),
    }
    job_id = "JOB" if args.dry_run else number
    for key, value in (facts | _commands(run, job_id)).items():
        print(f"{key:<8} {value}")
    for line in changed:
        print(f"changed  {line}")
    if args.dry_run:
        print(f"\n--- {job.frozen / 'config.yaml'}\n{dump_config(config)}", end="")
        print(f"\n--- {job.frozen / 'pretrain.sbatch'}\n{script}", end="")
    return EXIT_DONE


def _preflight(bounds: PreflightConfig | None) -> str:
    """One line on what is checked before each life."""
    if bounds is None:
        return "none of the nodes before a life begins (preflight: null in the site file)"
    told = bounds.model_dump(exclude_none=True)
    return f"each node before a life begins: {' '.join(f'{k}={v:g}' for k, v in told.items())}"


def _layout(config: RunConfig, nodes: int, gpus: int) -> str:
    from titans_pretrain.parallel.layout import plan_layout  # torch

    try:
        return plan_layout(config, nodes * gpus).describe()
    except ConfigError as e:
        found = f"--nodes {nodes} x {gpus} GPUs = {nodes * gpus} ranks: {e.value}"
        raise ConfigError(found, e.rule, e.remedy) from e


def differences(folder: RunFolder, config: RunConfig) -> Iterator[str]:
    """What `config` has otherwise than the run in its folder, a line each."""
    from titans_pretrain.run.checkpoint import flatten  # torch

    written = sorted(folder.jobs.glob("*/config.yaml"))
    written += [folder.config] if folder.config.exists() else []
    if not written:
        return
    former = written[-1]
    then, now = (flatten(c.model_dump(mode="json")) for c in (load_config(former), config))
    if now["model.vocab_size"] is None:  # a run fills it in from its data
        now["model.vocab_size"] = then["model.vocab_size"]
    for key in sorted((then.keys() | now.keys()) - {"folder"}):
        if then.get(key) != now.get(key):
            yield f"{key}: {then.get(key)} in {former}, {now.get(key)} now"


def _submit(folder: RunFolder, job: Job, code: Code, config: str, script: str) -> str:
    """Writes what the job needs and submits it; returns its id."""
    slurm.call(["sbatch", "--version"])
    with contextlib.ExitStack() as undo:
        for path in (folder.path, folder.jobs, folder.logs):
            if not path.exists():
                undo.callback(_remove_empty, path)
        undo.callback(shutil.rmtree, job.frozen, ignore_errors=True)
        try:
            folder.logs.mkdir(parents=True, exist_ok=True)
            freeze(job.frozen, code, config, script, ["titans-pretrain", *sys.argv[1:]])
        except OSError as e:
            raise storage_error(e, f"writing {job.frozen}", starting=True) from e
        said = slurm.call(["sbatch", "--parsable", str(job.frozen / "pretrain.sbatch")])
        undo.pop_all()
    number = said.strip().partition(";")[0]
    try:
        (job.frozen / "id").write_text(f"{number}\n", encoding="utf-8")
    except OSError as e:
        print(f"job {number} is submitted, its id could not be written: {e}", file=sys.stderr)
    return number


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not there, or somebody else's files are in it
        folder.rmdir()


def _commands(run: Path, job: str) -> dict[str, str]:
    at = shlex.quote(str(run))
    return {
        "watch": f"tail -F {at}/logs/job-{job}.out",
        "": f"titans-pretrain runs show {at}; titans-pretrain board {at}",
        "stop": f"titans-pretrain stop {at}",
    }


def _next(jobs: Path) -> Path:
    taken = [int(p.name) for p in jobs.glob("[0-9]*") if p.name.isdigit()]
    return jobs / f"{max(taken, default=0) + 1:04d}"


def _refuse_if_queued(run: Path) -> None:
    for job in slurm.jobs_of(run):
        if state := slurm.state(job):
            raise ConfigError(
                f"job {job} of the run in {run} is {state}",
                "one job at a time trains a run",
                f"wait for it, or stop it: titans-pretrain stop {run}; or set another folder=",
            )


def _job_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        better = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "run"
        raise ConfigError(
            f"job name {name!r}",
            "a job's name has letters, digits, . _ + and - and no blanks",
            f"--name {better}",
        )
    return name


def _require_plain(path: Path) -> None:
    if odd := re.search(r"[^A-Za-z0-9/._+=@:,~-]", str(path)):
        raise ConfigError(
            f"path {str(path)!r} holds {odd[0]!r}",
            "paths in a job script have no blanks and nothing that Slurm or the shell reads as "
            "something else",
            "rename the folder, or set another folder=",
        )
