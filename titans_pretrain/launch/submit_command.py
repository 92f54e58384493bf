"""`titans-pretrain submit CONFIG [a.b=c ...] --nodes N`: checks, freezes and submits a run.

`--array a.b=c,d` submits a run for each value, `--chain N` several jobs for a run. Everything that
can be refused is checked, for all runs, before anything is written; what was written for jobs that
sbatch then refuses is removed again.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from titans_pretrain.arguments import positive
from titans_pretrain.config import (
    PreflightConfig,
    RunConfig,
    SiteConfig,
    dump_config,
    load_config,
    load_site,
)
from titans_pretrain.errors import EXIT_DONE, ConfigError, TitansError
from titans_pretrain.estimate.fit import require_fit
from titans_pretrain.estimate.hardware import hardware_of
from titans_pretrain.launch import disks, slurm
from titans_pretrain.launch.freeze import SCRIPT, Code, look_at_code
from titans_pretrain.launch.render import Job, render, seconds
from titans_pretrain.launch.submission import Run, submit
from titans_pretrain.launch.sweep import MOST, Member, members
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.run.folder import RunFolder


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "submit",
        help="submit a run to Slurm",
        allow_abbrev=False,
        description="Checks the run that CONFIG describes against the nodes, freezes code and "
        "config in its folder and submits a job, which queues itself again until the run is done.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file")
    add("overrides", nargs="*", metavar="a.b=c", help="e.g. optim.lr=3e-4")
    add("--nodes", type=positive, required=True, metavar="N")
    add("--gpus-per-node", type=positive, metavar="G", help="default: the site's")
    add("--time", metavar="T", help="limit of a life, e.g. 24:00:00")
    add("--site", metavar="FILE", help="what the cluster is like: configs/site/")
    add("--name", help="of the job; default: the run folder's")
    add(
        "--array",
        action="append",
        default=[],
        metavar="a.b=c,d",
        help="a run for each value, in a folder of its own below the config's; given again: for "
        "each combination",
    )
    add(
        "--array-limit",
        type=positive,
        default=0,
        metavar="K",
        help="runs of --array at a time: each waits for the end of the one K before it",
    )
    add("--array-most", type=positive, default=MOST, metavar="N", help=f"default: {MOST} runs")
    add(
        "--chain",
        type=positive,
        metavar="N",
        help="N jobs one after the other, where a job may not queue itself again",
    )
    add("--changed", action="store_true", help="go on with a run although its config has changed")
    add("--gpu", metavar="NAME", help="as `plan --gpu`, to check what fits; default: the site's")
    add("--force", action="store_true", help="submit although by estimate it does not fit")
    add("--dry-run", action="store_true", help="print all of it; submit and write nothing")
    parser.set_defaults(run=submit_run)


def submit_run(args: argparse.Namespace) -> int:
    """The command. Raises ConfigError, DataError or NodeError, with nothing left behind."""
    site = load_site(args.site) if args.site else SiteConfig()
    base = Path(load_config(args.config, args.overrides).folder).absolute()
    _require_plain(base)
    _require_plain(Path.cwd())
    chosen = members(args.array, args.overrides, args.array_most)
    name = _job_name(args.name or base.name)
    runs = []
    for number, member in enumerate(chosen, start=1):
        of_it = f"{name}-{number}" if args.array else name
        try:
            runs.append(_checked(args, site, member, base / member.name, of_it))
        except TitansError as e:
            if args.array:
                raise type(e)(f"{member.name}: {e.value}", e.rule, e.remedy) from e
            raise
    code = look_at_code()
    ids: list[list[str]] = []
    if not args.dry_run:
        ids = submit(runs, code, args.chain or 1, args.array_limit)
    _tell(args, site, runs, code, ids)
    return EXIT_DONE


def _checked(
    args: argparse.Namespace, site: SiteConfig, member: Member, path: Path, name: str
) -> Run:
    """One run, with all that can be known before it is submitted. Raises TitansError."""
    from titans_pretrain.run.checkpoint import require_format  # torch

    config = load_config(args.config, [*args.overrides, *member.overrides, f"folder={path}"])
    gpus = args.gpus_per_node or site.gpus_per_node
    layout = _layout(config, args.nodes, gpus)
    memory = _memory(config, args.nodes * gpus, args.gpu or site.gpu, args.force)
    time = args.time or site.time
    if time is not None and seconds(time) <= site.stop_ahead:
        raise ConfigError(
            f"time limit {time}, stop_ahead={site.stop_ahead} s",
            "ranks are asked to save stop_ahead seconds before the limit",
            "give the job more time, or set stop_ahead in the site file",
        )
    folder = RunFolder(path)
    folder.refuse_if_stopped()
    require_format(folder.checkpoints)
    changed = tuple(differences(folder, config))
    if changed and not args.changed:
        raise ConfigError(
            f"{path} holds a run with another config:\n    " + "\n    ".join(changed),
            "a run keeps its config",
            "set another folder=, or go on with the changed one: --changed",
        )
    if not args.dry_run:
        _refuse_if_queued(path)
    job = Job(
        name,
        args.nodes,
        gpus,
        time,
        path,
        frozen=_next(folder.jobs),
        workdir=Path.cwd(),
        python=site.python or sys.executable,
        requeue=site.requeue and args.chain is None,
    )
    return Run(member, config, folder, layout, memory, job, render(job, site), changed)


def _memory(config: RunConfig, ranks: int, gpu: str | None, force: bool) -> str:
    """What the run holds, in one line. Raises ConfigError if it cannot fit."""
    if gpu is None:
        return "not estimated: neither the site file nor --gpu says what GPU this is"
    return require_fit(config, ranks, hardware_of(gpu), force=force)


def _tell(
    args: argparse.Namespace,
    site: SiteConfig,
    runs: Sequence[Run],
    code: Code,
    ids: Sequence[Sequence[str]],
) -> None:
    """Prints what was submitted, or would be."""
    job, run_folder = runs[0].job, runs[0].folder.path
    ranks = job.nodes * job.gpus_per_node
    what = "none: a dry run, nothing is written" if args.dry_run else ", ".join(ids[0])
    facts = {"job": f"{what} ({job.name})"}
    if args.array:
        how = " (a dry run, nothing is written)" if args.dry_run else ""
        facts = {"runs": f"{len(runs)} in {run_folder.parent}{how}"}
    facts["ranks"] = f"{job.nodes} nodes x {job.gpus_per_node} GPUs = {ranks}, {runs[0].layout}"
    facts["memory"] = runs[0].memory
    if not args.array:
        facts["folder"] = str(run_folder)
        facts["script"] = str(job.frozen / SCRIPT)
        facts["config"] = str(job.frozen / "config.yaml")
    facts["code"] = code.describe()
    facts["checks"] = _preflight(site.preflight)
    facts["lives"] = _lives(args, site)
    ran = [i for jobs in ids for i in jobs] or ["JOB"]
    for key, value in (facts | _commands(runs, ran)).items():
        print(f"{key:<8} {value}")
    for line in (line for run in runs for line in run.changed):
        print(f"changed  {line}")
    for line in disks.warnings(_paths(runs), job.nodes):
        print(f"warning  {line}")
    if ids:
        for number, why in slurm.never_starts([jobs[0] for jobs in ids]).items():
            print(f"warning  Slurm does not start job {number} as it is: {why}; scancel {number}")
    if args.array:
        _table(runs, ids)
    if args.dry_run:
        for run in runs:
            print(f"\n--- {run.job.frozen / 'config.yaml'}\n{dump_config(run.config)}", end="")
        print(f"\n--- {job.frozen / SCRIPT}\n{runs[0].script}", end="")


def _lives(args: argparse.Namespace, site: SiteConfig) -> str:
    """How a run gets beyond the time limit of one job."""
    limit = args.time or site.time or "the partition's time limit"
    if args.chain is not None:
        return f"a chain of {args.chain} jobs of up to {limit}, one after the other"
    if not site.requeue:
        return f"one job of up to {limit}: the site forbids requeue; --chain N submits N"
    return f"each up to {limit}: the job queues itself again until the run is done"


def _paths(runs: Sequence[Run]) -> dict[str, Path]:
    """What all nodes of the jobs have to see."""
    folder = runs[0].folder.path
    paths = {disks.RUN: folder.parent if runs[0].member.name else folder}
    paths["python"] = Path(runs[0].job.python)
    for data in (run.config.data for run in runs):
        for kind, sets in (("data", data.sources), ("validation", data.validation)):
            local = {n: Path(s.path).absolute() for n, s in sets.items() if "://" not in s.path}
            paths |= {f"{kind} {name}": path for name, path in local.items()}
    return paths


def _table(runs: Sequence[Run], ids: Sequence[Sequence[str]]) -> None:
    rows = [("jobs", "name", "folder")]
    for number, run in enumerate(runs):
        jobs = " ".join(ids[number]) if ids else "-"
        rows.append((jobs, run.job.name, run.member.name))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print()
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}")


def _preflight(bounds: PreflightConfig | None) -> str:
    """One line on what is checked before each life."""
    if bounds is None:
        return "none of the nodes before a life begins (preflight: null in the site file)"
    told = bounds.model_dump(exclude_none=True)
    return f"each node before a life begins: {' '.join(f'{k}={v:g}' for k, v in told.items())}"


def _layout(config: RunConfig, nodes: int, gpus: int) -> str:
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


def _commands(runs: Sequence[Run], ids: Sequence[str]) -> dict[str, str]:
    at = shlex.quote(str(runs[0].folder.path))
    over = at if len(runs) == 1 else shlex.quote(str(runs[0].folder.path.parent))
    each = at if len(runs) == 1 else f"{over}/RUN"
    log = f"job-{ids[0]}.out" if len(runs) == 1 else "job-*.out"
    see = f"titans-pretrain runs show {at}; titans-pretrain board {at}"
    if len(runs) > 1:
        see = f"titans-pretrain runs {over}; titans-pretrain board {over}/*"
    return {
        "watch": f"tail -F {each}/logs/{log}",
        "": see,
        "stop": f"titans-pretrain stop {each}",
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
