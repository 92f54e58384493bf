"""Kills runs of two ranks by `kill -9` at random moments and holds them to what follows: within 60
seconds no process is left and the exit code is not zero, and the run that goes on ends bitwise
where the undisturbed one ends.

    make torture                              # 50 kills; stopped, it goes on counting
    python -m tests.torture --kills 200       # 150 more

A run is killed up to five times and then finished. The runs take the layouts in turn: two ranks of
data, tensor, pipeline and context parallelism. Half of the lives are started by the launcher, which
ends the other rank; in the others nobody looks, and a rank must notice by itself. What is drawn
depends on the number of the run alone: a failure is repeated by `--only NUMBER`. Of the kills while
it saves those are counted, too, that left the save unfinished.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.prepared import ROOT, small_dataset, small_run, write_config
from titans_pretrain.config import WatchdogConfig
from titans_pretrain.errors import EXIT_DONE
from titans_pretrain.launch.local import free_port
from titans_pretrain.run import checkpoint
from titans_pretrain.run.lock import newest_claim
from titans_pretrain.run.metrics import read_records

MOMENTS = ("starting", "resuming", "training", "saving")
VICTIMS = ("rank 0", "rank 1", "launcher")
BOUND = 60.0  # seconds until no process is left
LONGEST = 240.0  # seconds for a life that nobody kills
STEPS = 40
KILLS = 5  # of a run
LAYOUTS = ("data", "tensor", "pipeline", "context")  # of run 0, 1, 2, 3, 4 again, ...
UNFINISHED = "a save left unfinished"
MARK = "TITANS_TORTURE"  # in the environment of a run's processes


def tree(folder: Path, data: Path, layout: str = "data") -> dict[str, Any]:
    return small_run(
        folder,
        data,
        parallel={} if layout == "data" else {layout: 2},
        train__steps=STEPS,
        checkpoint__every_steps=4,
        validation__every=20,
        watchdog={"start_minutes": 0.5, "step_minutes": 0.5, "silent_seconds": 20.0},
    )


@dataclass
class Life:
    """One start of a run of two ranks; `launched`: by the launcher, else each rank by itself."""

    folder: Path
    launched: bool
    mark: str
    before: int  # the number of the last life that claimed the folder
    announced: int  # how many have begun to train
    processes: list[subprocess.Popen[bytes]]

    @staticmethod
    def start(config: dict[str, Any], launched: bool, *overrides: str) -> Life:
        folder = Path(config["folder"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = write_config(folder.parent / f"{folder.name}.yaml", config)
        mark = f"{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "titans_pretrain", "train", str(path), *overrides]
        common = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
        if launched:
            places = [{}]
            command += ["--ranks", "2"]
        else:
            port = str(free_port())
            places = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
                for rank in range(2)
            ]
        life = Life(folder, launched, mark, claims(folder), announcements(folder), [])
        with (folder.parent / f"{folder.name}.out").open("ab") as out:
            for place in places:
                env = common | place
                life.processes.append(
                    subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=out)
                )
        return life

    def alive(self) -> list[psutil.Process]:
        """The processes of this life, loaders among them."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:  # gone meanwhile, or another user's
                continue
        return found

    def victim(self, who: str) -> int | None:
        """The pid of a rank, or of the launcher; None if it is not there (yet)."""
        if who == "launcher" or not self.launched:
            return self.processes[0 if who == "launcher" else int(who[-1])].pid
        for process in self.alive():
            try:
                ours = process.ppid() == self.processes[0].pid  # a rank, and none of its loaders
                if ours and process.environ().get("RANK") == who[-1]:
                    return process.pid
            except psutil.Error:
                continue
        return None

    def over(self) -> bool:
        return all(p.poll() is not None for p in self.processes)

    def end(self) -> list[int]:
        """Kills what is left and returns the exit codes."""
        for process in self.alive():
            process.kill()
        return [p.wait(10) for p in self.processes]


def until(condition: Callable[[], Any], life: Life, seconds: float = LONGEST) -> bool:
    """Waits for `condition`; False if the life ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if life.over():
            return False
        assert time.monotonic() < deadline, f"{life.folder}: waited {seconds:.0f} s"
        time.sleep(0.001)
    return True


def claims(folder: Path) -> int:
    """How many lives have claimed the folder."""
    claim = newest_claim(folder) if folder.exists() else None
    return claim.life if claim else 0


def announcements(folder: Path) -> int:
    """How many lives have begun to train."""
    log = folder / "logs" / "rank-00000.log"
    return log.read_text().count("training tokens; steps") if log.exists() else 0


def come_to(moment: str, life: Life, draw: random.Random) -> bool:
    """Waits for a moment of a life; False if it ended before that came."""
    folder = life.folder
    if moment == "starting":
        time.sleep(draw.uniform(0, 8))  # importing, for the most part
        return not life.over()
    if moment == "resuming":
        claimed = until(lambda: claims(folder) > life.before, life)
        time.sleep(draw.uniform(0, 1.5))
        return claimed and not life.over()
    if not until(lambda: announcements(folder) > life.announced, life):
        return False
    if moment == "saving":
        if not until(lambda: list((folder / "checkpoints").glob(".writing-*")), life):
            return False
        time.sleep(draw.uniform(0, 0.04))
        return not life.over()
    done = (checkpoint.list_steps(folder / "checkpoints") or [0])[-1]
    step = draw.randrange(done + 1, max(done + 2, STEPS - 1))
    if not until(lambda: f'"step": {step},' in (folder / "metrics.jsonl").read_text(), life):
        return False
    time.sleep(draw.uniform(0, 0.05))
    return not life.over()


def kill(life: Life, moment: str, who: str, draw: random.Random) -> str | None:
    """Kills `who` at a `moment`, and asserts what must follow; what happened in words, or None if
    the run was done before."""
    try:
        there = come_to(moment, life, draw) and until(lambda: life.victim(who), life)
        if not there or (pid := life.victim(who)) is None:
            until(life.over, life)
            assert life.end() == [EXIT_DONE] * len(life.processes)
            return None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while (left := life.alive()) and time.monotonic() < began + BOUND:
            life.over()  # reaps
            time.sleep(0.05)
        seconds = time.monotonic() - began
        assert not left, f"{[p.cmdline()[-3:] for p in left]} live on after {seconds:.0f} s"
        codes = [p.wait(10) for p in life.processes]
        assert 0 not in codes, f"exit codes {codes}"
        how = "launched" if life.launched else "alone"
        told = f"{who} ({how}), {moment}: all gone in {seconds:.1f} s, exit codes {codes}"
        if moment == "saving" and list((life.folder / "checkpoints").glob(".writing-*")):
            told += f", {UNFINISHED}"
        return told
    finally:
        life.end()


def finish(config: dict[str, Any], launched: bool = True) -> None:
    """Runs to the end. Nobody is killed, so the limits need not be tight."""
    default = WatchdogConfig()
    limits = [f"watchdog.{name}={getattr(default, name)}" for name in config["watchdog"]]
    life = Life.start(config, launched, *limits)
    try:
        assert not until(lambda: False, life)
        codes = [p.wait(10) for p in life.processes]
        said = life.folder.with_suffix(".out").read_text(errors="replace")[-2000:]
        assert codes == [EXIT_DONE] * len(codes), f"exit codes {codes}; it said: ...{said}"
    finally:
        life.end()


def result(folder: str) -> tuple[str, list[tuple[Any, ...]]]:
    """Weights, moments and data position of the last checkpoint; and what was recorded."""
    checkpoints = Path(folder) / "checkpoints"
    last = checkpoint.folder_of(checkpoints, checkpoint.list_steps(checkpoints)[-1])
    names = ("train/loss", "train/grad_norm", "train/lr", "validation/loss")
    curve = [
        (r["step"], *(r["values"].get(name) for name in names))
        for r in read_records(Path(folder) / "metrics.jsonl")
    ]
    return checkpoint.content_sha256(last), curve


def torture(config: dict[str, Any], number: int, expected: Any, tell: Callable[[str], None]) -> int:
    """One run: kills, then the end, compared. Returns the number of kills."""
    draw = random.Random(number)
    kills = 0
    for _ in range(KILLS):
        launched = draw.random() < 0.5
        moment = draw.choice(MOMENTS)
        who = draw.choice(VICTIMS if launched else VICTIMS[:2])
        workers = draw.choice((0, 0, 1))
        life = Life.start(config, launched, f"data.workers={workers}")
        what = kill(life, moment, who, draw)
        if what is None:
            break
        kills += 1
        tell(what)
    finish(config)
    got = result(config["folder"])
    assert [r[0] for r in got[1]] == list(range(1, STEPS + 1))
    assert got == expected, "not the undisturbed run"
    return kills


def parse(
    about: str | None, name: str, kills: int, arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=kills, help=f"so many in all (default: {kills})"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / name)
    parser.add_argument("--again", action="store_true", help="count from 0")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this run alone, uncounted")
    return parser.parse_args(arguments)


class Count:
    """Kills and runs so far, kept from one call of the command to the next."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.folder.mkdir(parents=True, exist_ok=True)
        self._path, self._wanted = args.folder / "count.json", args.kills
        kept = not args.again and self._path.exists()
        state = json.loads(self._path.read_text()) if kept else {"kills": 0, "runs": 0}
        self.kills, self.runs = state.pop("kills"), state.pop("runs")
        self.of_them = Counter(state)  # kinds of kills
        self._before, self._began = self.kills, time.monotonic()

    def add(self, kills: int, of_them: Mapping[str, int] = {}) -> None:
        self.kills, self.runs = self.kills + kills, self.runs + 1
        self.of_them.update(of_them)
        state = {"kills": self.kills, "runs": self.runs, **self.of_them}
        self._path.write_text(json.dumps(state))

    @property
    def enough(self) -> bool:
        return self.kills >= self._wanted

    def told(self, further: int = 0) -> str:
        """How far the count is, with `further` kills that are not added yet."""
        done = self.kills + further
        each = (time.monotonic() - self._began) / max(1, done - self._before)
        left = max(0, self._wanted - done) * each / 60
        return f"kill {done}/{self._wanted}, {left:.0f} min left"


def undisturbed(whole: dict[str, Any], data: Path) -> tuple[str, list[tuple[Any, ...]]]:
    """What a run comes to that nobody kills; prepares its data."""
    if not (data / "manifest.json").exists():
        shutil.rmtree(data, ignore_errors=True)
        small_dataset(data.parent)
    shutil.rmtree(whole["folder"], ignore_errors=True)
    finish(whole)
    return result(whole["folder"])


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "torture", 50, arguments)
    count = Count(args)
    if count.enough and args.only is None:
        print(f"{count.kills} kills done; --kills MORE, or --again")
        return 0
    data = args.folder / "data"
    expected: dict[str, Any] = {}
    while not count.enough or args.only is not None:
        number = count.runs if args.only is None else args.only
        layout = LAYOUTS[number % len(LAYOUTS)]
        if layout not in expected:
            whole = tree(args.folder / f"whole-{layout}", data, layout)
            expected[layout] = undisturbed(whole, data)
        config = tree(args.folder / f"run-{number:04d}", data, layout)
        shutil.rmtree(config["folder"], ignore_errors=True)
        said: list[str] = []

        def tell(what: str, said: list[str] = said) -> None:
            said.append(what)
            print(f"{count.told(len(said))}: {what}", flush=True)

        try:
            kills = torture(config, number, expected[layout], tell)
        except AssertionError as e:
            print(f"run {number} ({layout}) failed, its folder stays: {e}", file=sys.stderr)
            return 1
        went = f"went on {kills} times and is the undisturbed one, bitwise"
        print(f"run {number} ({layout}) {went}", flush=True)
        shutil.rmtree(config["folder"])
        if args.only is not None:
            return 0
        saving, unfinished = (sum(w in what for what in said) for w in (", saving:", UNFINISHED))
        count.add(kills, {layout: kills, "while saving": saving, UNFINISHED: unfinished})
        of_them = ", ".join(f"{n} {kind}" for kind, n in count.of_them.items())
        print(f"{count.kills} kills so far, of them {of_them}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
