"""`titans-pretrain gpu-check`: does this machine's GPU compute what the CPU computes, and how fast.

Each section of gpu_check_cases.py runs in a process of its own: a process group cannot be made
again on another device, and what crashes or hangs costs its own row alone. This file starts them,
judges what they measured and writes report.json and report.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError
from titans_pretrain.measure.gpu_check_report import (
    CASES,
    MODELS,
    PRECISIONS,
    TOLERANCES,
    Measured,
    console,
    judge,
    markdown,
)

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CASE_LIMIT_S = 90.0  # a case that takes longer hangs; its process' start is in it


def register(commands: Subparsers) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    _options(commands.add_parser("gpu-check", help="check and time this machine's GPU"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every row passes, else 1. Raises ConfigError where there is no CUDA device."""
    args = _options(argparse.ArgumentParser(prog="titans-pretrain gpu-check")).parse_args(argv)
    return args.run(args)


def _options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.description = (
        "On a machine with one CUDA GPU: the memory against the CPU's float64 oracle, training "
        "steps of each model against the CPU's, save and resume, and speed. Exit codes: 0 all "
        "pass, 1 not all, 2 no CUDA device."
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="DIR")
    parser.add_argument(
        "--dry-run", action="store_true", help="all of it on the CPU, tiny: tries the check itself"
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="N", help="what is not done by then fails"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    device = "cpu" if args.dry_run else require_cuda()
    try:
        (args.out / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "report.md"):  # a check cut short leaves no earlier verdict
            (args.out / name).unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(
            f"--out {args.out}: {e.strerror}", "the report goes there", "give another folder"
        ) from e
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="work-", dir=args.out) as work:
        sections = Sections(device, args.dry_run, args.out, Path(work), began + 60 * args.minutes)
        measured = measure(sections)
    rows = judge(measured, TOLERANCES)
    passed = all(row.verdict != "FAIL" for row in rows)
    report = {
        "passed": passed,
        "dry_run": args.dry_run,
        "device": device,
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "seconds": round(time.monotonic() - began, 1),
        "commit": _commit(),
        "tolerances": TOLERANCES,
        "rows": [asdict(row) for row in rows],
        "measured": measured,
    }
    # Infinity is no JSON; a report that cannot be read elsewhere would be no report.
    text = json.dumps(json.loads(json.dumps(report), parse_constant=str), indent=1)
    (args.out / "report.json").write_text(text + "\n", encoding="utf-8")
    (args.out / "report.md").write_text(markdown(report, rows), encoding="utf-8")
    print(console(report, rows))
    print(f"\n{args.out / 'report.md'}, report.json; what the processes said: {args.out / 'logs'}")
    return EXIT_DONE if passed else EXIT_OTHER


def require_cuda() -> str:
    """Returns "cuda". Raises ConfigError where torch sees no device."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"gpu-check: torch {torch.__version__} sees no CUDA device",
            "the check runs on a machine with a CUDA GPU, its driver, and torch built for CUDA",
            "see README, Install; or try the check itself on the CPU with --dry-run",
        )
    return "cuda"


@dataclass(frozen=True)
class Sections:
    """Starts sections, one process each, until the time is over."""

    device: str  # "cpu" or "cuda"
    dry: bool
    out: Path
    work: Path  # for checkpoints and results
    end: float  # time.monotonic()

    def __call__(
        self, section: str, cases: Sequence[str], *, device: str = ""
    ) -> dict[str, dict[str, Any]]:
        """{case: what it measured}, or {"error": why} for a case that crashed or hung.

        After either the cases that are left get a new process.
        """
        device, left = device or self.device, list(cases)
        results: dict[str, dict[str, Any]] = {}
        while left:
            if time.monotonic() >= self.end:
                return results | {case: {"error": "not run: the time was over"} for case in left}
            print(f"{section} on {device}: {len(left)} cases", flush=True)
            found, problem = self._process(section, left, device)
            results |= found
            left = [case for case in left if case not in results]
            if left and problem:
                results[left.pop(0)] = {"error": problem}
            elif problem:  # all done, then it died: not in silence
                results[f"{section}: end of the process"] = {"error": problem}
        return results

    def _process(
        self, section: str, cases: list[str], device: str
    ) -> tuple[dict[str, dict[str, Any]], str]:
        """(what was measured, what went wrong) in one process."""
        number = len(list(self.work.glob("results-*")))
        path = self.work / f"results-{number}.jsonl"
        path.touch()
        log = self.out / "logs" / f"{number}-{section}-{device}.log"
        task = {
            "section": section,
            "cases": cases,
            "device": device,
            "dry": self.dry,
            "folder": str(self.work),
            "results": str(path),
            "threads": 1 if self.dry else min(8, os.cpu_count() or 1),
        }
        command = [
            sys.executable,
            "-m",
            "titans_pretrain.measure.gpu_check_cases",
            json.dumps(task),
        ]
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(device),
                start_new_session=True,
            )
            try:
                hung = _follow(process, path, self.end)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        # A line without its end is one that a kill cut short.
        text = path.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in text.splitlines()]
        problem = hung
        if not hung and process.returncode:
            words = log.read_text(errors="replace").strip().splitlines()
            problem = f"exit code {process.returncode}: {words[-1] if words else 'no word'}"
        if not problem and len(lines) < len(cases):
            problem = "the process ended early, without an error"
        return {line.pop("case"): line for line in lines}, problem


def _follow(process: subprocess.Popen[bytes], results: Path, end: float) -> str:
    """Waits for `process`; returns why it should be killed, or "" if it ended by itself."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if results.stat().st_size != size:
            size, since = results.stat().st_size, now
        if now >= end:
            return "not finished: the time was over"
        if now - since > CASE_LIMIT_S:
            return f"hang: killed after {CASE_LIMIT_S:.0f} s"
        time.sleep(0.05)
    return ""


_LAUNCHED = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]


def _environment(device: str) -> dict[str, str]:
    """One process alone, whatever launched this one; the CPU's sees no GPU."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NVIDIA_TF32_OVERRIDE": "0"}
    env.pop("DS_ACCELERATOR", None)
    for name in _LAUNCHED:
        env.pop(name, None)
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env


def measure(sections: Sections) -> Measured:
    """Runs every section; see gpu_check_cases.py for what a case's result holds."""
    from titans_pretrain.memory.problems import PROBLEMS

    memories = [f"{name} {p}" for p in PRECISIONS for name in PROBLEMS]
    chunks = [f"memory C={chunk} {p}" for p in PRECISIONS for chunk in (16, 64)]
    out: Measured = {}
    out["memory"] = sections("memory", ["machine", *memories])
    out["reference"] = sections("steps", [f"{model} fp32" for model in MODELS], device="cpu")
    out["steps"] = sections("steps", CASES)
    runs = sections("run", [f"{kind} {case}" for kind in ("straight", "again") for case in CASES])
    runs |= sections("run", [f"resumed {case}" for case in CASES])
    # Where a repeated run differs, so may a resumed one: there deterministic algorithms decide.
    ends = {name: result.get("content") for name, result in runs.items()}
    unsteady = [c for c in CASES if ends[f"straight {c}"] != ends[f"again {c}"]]
    for kind in ("straight", "resumed"):
        runs |= sections("run", [f"{kind}/deterministic {case}" for case in unsteady])
    out["run"] = runs
    out["speed"] = sections("speed", [*CASES, *chunks])
    return out


def _commit() -> str:
    """The commit of the source that runs, if it is a checkout."""
    here, git = Path(__file__).parent, ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(git, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
