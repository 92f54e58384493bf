"""Starts what the check does, one process after another, until the time is over. Knows no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_pretrain.launch.local import dies_with
from titans_pretrain.measure.gpu_check.plan import Group, needed_s

Results = dict[str, dict[str, Any]]  # part -> what it measured, or {"error"} or {"skipped": why}
Measured = dict[str, Results]  # section -> its results

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TELLING = re.compile(r"^\s*([\w.]+(Error|Exception|Interrupt|Exit)\b|Fatal |Segmentation )")
_WORDS = 3  # last lines of a process that failed
DIES_S = 10.0  # that a killed process may take to be gone
_DRY_S = 300.0  # of a part in a dry run, on however slow a machine
_AS_IT_TRAINS = ("train", "zero", "memory speed")  # TF32 as torch has it; elsewhere it is off


@dataclass(frozen=True)
class Runner:
    """Runs groups. `measured` grows with each."""

    device: str  # "cpu" or "cuda"
    dry: bool
    ranks: int  # of a group that takes all
    out: Path
    work: Path  # for checkpoints and results
    end: float  # time.monotonic()
    lacking: Mapping[str, str]  # need -> why it is not met
    paths: tuple[Path, ...] = ()  # of unpacked packages
    measured: Measured = field(default_factory=dict)

    def __call__(self, group: Group) -> None:
        """Runs what is possible of the group; each of its parts gets a result."""
        results = self.measured.setdefault(group.section, {})
        if why := self.hindered(group):
            results |= {part: {"skipped": why} for part in group.parts}
            return
        left = list(group.parts)
        while left:
            remains, needed = (
                self.end - time.monotonic(),
                needed_s(group, self.measured, dry=self.dry),
            )
            if remains < needed:
                why = f"{max(0.0, remains):.0f} s were left, it needs about {needed:.0f}"
                results |= {part: {"skipped": why} for part in left}
                return
            print(f"{remains:4.0f} s left  {group.section}: {', '.join(left)}", flush=True)
            found, problem = self._process(group, left)
            results |= found
            left = [part for part in left if part not in results]
            if left and problem:
                results[left.pop(0)] = problem
            elif "error" in problem:  # all done, then it died: not in silence
                results["the end of the process"] = problem

    def hindered(self, group: Group) -> str:
        """Why the group cannot run here, or ""."""
        if group.needs in self.lacking:
            return self.lacking[group.needs]
        if group.section == "layouts" and self.ranks == 1:
            return "one GPU: there is nothing to divide"
        if group.after:
            before = self.measured.get(group.after, {})
            if not any("contents" in result for result in before.values()):
                return f"it reads what '{group.after}' saves, which saved nothing"
        return ""

    def _process(self, group: Group, parts: list[str]) -> tuple[Results, dict[str, Any]]:
        """(results of the parts that were done, what went wrong with the next one)."""
        number = len(list(self.work.glob("results-*")))
        path = self.work / f"results-{number}.jsonl"
        path.touch()
        device = "cpu" if group.on_cpu else self.device
        name = f"{number:02}-{group.section}-{device}".replace(" ", "-")
        log = self.out / "logs" / f"{name}.log"
        task = {
            "section": group.section,
            "parts": parts,
            "device": device,
            "dry": self.dry,
            "engines": "engines" not in self.lacking,
            "ranks": self._ranks(group),
            "folder": str(self.work),
            "results": str(path),
            "logs": str(self.out / "logs" / name),
            "threads": 1 if self.dry else min(8, os.cpu_count() or 1),
        }
        module = "titans_pretrain.measure.gpu_check.child"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(task)],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment(device, self.paths, tf32=group.section in _AS_IT_TRAINS),
                start_new_session=True,
                preexec_fn=dies_with(os.getpid()),
            )
            try:
                problem = self._follow(process, path, _DRY_S if self.dry else group.most_s)
            finally:
                end(process)  # several ranks die with it, which has launched them
        # A line without its end is one that a kill cut short.
        text = path.read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in text.splitlines()]
        if not problem and process.returncode:
            words = last_words(log.read_text(errors="replace"))
            problem = {"error": f"exit code {process.returncode}: {words}"}
        if not problem and len(lines) < len(parts):
            problem = {"error": "the process ended early, without an error"}
        return {line.pop("part"): line for line in lines}, problem

    def _ranks(self, group: Group) -> int:
        if group.section == "layouts":  # they halve what they divide, and share eight rows
            return 2 ** min(3, self.ranks.bit_length() - 1)
        return self.ranks if group.all_ranks else 1

    def _follow(
        self, process: subprocess.Popen[bytes], results: Path, most_s: float
    ) -> dict[str, Any]:
        """Waits for `process`; why it is to be killed, or {} if it ended by itself."""
        size, since = 0, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if results.stat().st_size != size:
                size, since = results.stat().st_size, now
            if now >= self.end:
                return {"skipped": f"not finished after {now - since:.0f} s: the time was over"}
            if now - since > most_s:
                return {"error": f"hang: killed after {most_s:.0f} s"}
            time.sleep(0.05)
        return {}


def end(process: subprocess.Popen[Any]) -> None:
    """Kills what is left of a process that leads its group. One that does not even die of SIGKILL,
    in a driver that hangs, is left behind: the check goes on."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DIES_S)


def last_words(log: str) -> str:
    """The last lines of what a process said; the last that names an error before them, if it is
    not among them."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-_WORDS:]
    telling = [line for line in lines if _TELLING.match(line)]
    if telling and telling[-1] not in last:
        last = [telling[-1], *last]
    return " / ".join(line[:300] for line in last) or "no word"


def environment(device: str, paths: tuple[Path, ...] = (), *, tf32: bool = False) -> dict[str, str]:
    """One process alone, whatever launched this one; the CPU's sees no GPU."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    here = Path(__file__).parents[3]  # the package may run from a checkout, not installed
    found = [str(here), env.get("PYTHONPATH", ""), *map(str, paths)]
    env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
    env |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, found))}
    env.pop("DS_ACCELERATOR", None)
    if not tf32:
        env["NVIDIA_TF32_OVERRIDE"] = "0"
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env
