"""`titans-pretrain gpu-check`: does this machine's GPU compute what the CPU computes, how fast.

plan.py says what is done, processes.py starts it, child.py and the modules that it names measure,
judge.py gives the verdicts, report.py writes them. All runs in processes of its own, so that what
crashes or hangs costs its own row alone; the report is written anew after each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError
from titans_pretrain.measure.gpu_check.judge import Row, judge, passed
from titans_pretrain.measure.gpu_check.packages import missing, unpack
from titans_pretrain.measure.gpu_check.plan import GROUPS, processes
from titans_pretrain.measure.gpu_check.processes import Runner, environment
from titans_pretrain.measure.gpu_check.report import console, write

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DRY_RANKS = 2  # gloo processes that stand for GPUs
_FOR_REPORT = 3.0  # seconds kept back


def register(commands: Subparsers) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    _options(commands.add_parser("gpu-check", help="check and time this machine's GPU"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the check passes, else 1. Raises ConfigError where there is no CUDA device."""
    args = _options(argparse.ArgumentParser(prog="titans-pretrain gpu-check")).parse_args(argv)
    return args.run(args)


def _options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description = (
        "On a machine with CUDA GPUs: the memory against the CPU's float64 oracle, training steps "
        "of each variant against the CPU's, collectives, the paper's 170M and 340M in speed and "
        "memory, ZeRO, save and resume across devices. What does not fit in time or memory, or "
        "lacks a package, is skipped and says so. Exit codes: 0 passed, 1 a row failed, or none "
        "of the memory, the steps or the training has passed, 2 no CUDA device."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="all of it on the CPU, tiny: tries the check itself"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="what does not fit into them is left out; default 8, of a dry run 60",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="take packages that are not installed from these wheels, for the check alone",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    minutes = args.minutes or (60.0 if args.dry_run else 8.0)
    device, ranks = ("cpu", DRY_RANKS) if args.dry_run else require_cuda()
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "report.md"):  # a check cut short leaves no earlier verdict
            (args.out / name).unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(
            f"--out {args.out}: {e.strerror}", "the report goes there", "give another folder"
        ) from e
    with tempfile.TemporaryDirectory(prefix="work-", dir=args.out) as work:
        paths: tuple[Path, ...] = ()
        if args.wheels is not None:
            paths = (Path(work).resolve() / "packages",)
            print(f"unpacked for this check: {', '.join(unpack(args.wheels, paths[0])) or 'none'}")
        lacking = missing(environment(device, paths))
        runner = Runner(
            device,
            args.dry_run,
            ranks,
            args.out,
            Path(work),
            began + 60 * minutes - _FOR_REPORT,
            lacking,
            paths,
        )
        rows = check(runner, _report(args, device, lacking, began))
    print(f"{args.out / 'report.md'}, report.json; what the processes said: {args.out / 'logs'}")
    return EXIT_DONE if passed(rows) else EXIT_OTHER


Header = Callable[[bool], dict[str, object]]


def check(runner: Runner, header: Header) -> list[Row]:
    """Runs everything, writing the report after each process; the rows."""
    rows: list[Row] = []
    for group in processes(GROUPS, dry=runner.dry):
        runner(group)
        rows = judge(runner.measured)
        write(runner.out, header(False), rows, runner.measured)
    write(runner.out, header(True), rows, runner.measured)
    print(console(header(True), rows))
    return rows


def _report(args: argparse.Namespace, device: str, lacking: dict[str, str], began: float) -> Header:
    """What the report says beside rows, given whether the check is finished."""
    command = "titans-pretrain gpu-check" + (" --dry-run" if args.dry_run else "")
    commit, now = _commit(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())

    def header(finished: bool) -> dict[str, object]:
        return {
            "command": command,
            "finished": finished,
            "dry_run": args.dry_run,
            "device": device,
            "time": now,
            "seconds": round(time.monotonic() - began, 1),
            "commit": commit,
            "lacking": lacking,
        }

    return header


def require_cuda() -> tuple[str, int]:
    """("cuda", devices). Raises ConfigError where torch is missing or sees no device."""
    try:
        import torch
    except ImportError as e:
        raise ConfigError(
            f"gpu-check: {e}", "the check needs torch at least", "see README, Install"
        ) from e
    if not torch.cuda.is_available():
        raise ConfigError(
            f"gpu-check: torch {torch.__version__} sees no CUDA device",
            "the check runs on a machine with a CUDA GPU, its driver, and torch built for CUDA",
            "see README, Install; or try the check itself on the CPU with --dry-run",
        )
    return "cuda", torch.cuda.device_count()


def _commit() -> str:
    """The commit of the source that runs, if it is a checkout."""
    here, git = Path(__file__).parent, ["git", "describe", "--always", "--dirty"]
    how: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 10}
    try:
        said = subprocess.run(git, **how, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
