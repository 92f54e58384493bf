"""`titans-pretrain compare STUDY`: several models, several seeds, equal tokens, one table.

A study is a YAML file: `base` (a run's config), `entries` (name -> what differs from it), `seeds`
and `folder`. Each entry and seed is an ordinary run in a folder of its own, a process by itself; a
study that was stopped goes on from the runs' checkpoints. Seed after seed, so that whole rows of
the table are there early.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from titans_pretrain.config import RunConfig, apply_override, dump_config, parse_config
from titans_pretrain.errors import (
    EXIT_DIVERGED,
    EXIT_DONE,
    EXIT_SAVED,
    ConfigError,
)
from titans_pretrain.launch.local import dies_with, end, forwarding
from titans_pretrain.run.comparison import Outcome, report
from titans_pretrain.run.console import duration
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import read_records

KEYS = {"folder", "seeds", "base", "entries"}
TELL = 30.0  # seconds between progress lines
POLL = 0.2


@dataclass
class Member:
    """One run of a study."""

    entry: str
    seed: int
    config: RunConfig
    done: int = 0  # steps
    _read: tuple[int, int] = field(default=(0, 0), repr=False)  # size of metrics.jsonl, its step

    @property
    def name(self) -> str:
        return f"{self.entry}-seed{self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder)

    def look(self) -> int:
        """Steps recorded so far; reads only what was appended since the last look."""
        path = self.folder.metrics
        size = path.stat().st_size if path.exists() else 0
        if size != self._read[0]:
            self.done = max((r["step"] for r in read_records(path)), default=0)
            self._read = (size, self.done)
        return self.done


def load_study(path: Path, overrides: Sequence[str] = ()) -> list[Member]:
    """The runs of a study, in the order in which they are trained. Overrides apply to each run,
    `folder=` to the study.

    Raises ConfigError where the file is no study, a run's config is wrong, or the runs could not
    be compared: they must train on equally many rows of the same data and be validated alike.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"study {path}: {e}", "a study is a YAML file", "give its path") from e
    if not isinstance(tree, dict) or tree.keys() != KEYS:
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ConfigError(
            f"study {path} holds {found}",
            f"a study has the keys {', '.join(sorted(KEYS))}",
            "see configs/studies/architectures.yaml",
        )
    for override in overrides:
        if override.startswith("folder="):
            apply_override(tree, override)
    seeds, entries = tree["seeds"], tree["entries"]
    numbers = isinstance(seeds, list) and all(type(s) is int for s in seeds)
    if not numbers or not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"study {path}: seeds {seeds}", "seeds are different integers", "e.g. seeds: [0, 1, 2]"
        )
    if not isinstance(entries, dict) or not entries or not isinstance(tree["base"], dict):
        raise ConfigError(
            f"study {path}: entries {entries!r}",
            "entries are names, each with what differs from base",
            "e.g. entries: {mac: {model: {variant: mac}}}",
        )
    members = []
    for seed in seeds:
        for entry, difference in entries.items():
            run = merge(tree["base"], difference or {})
            for override in overrides:
                apply_override(run, override)
            run = merge(run, {"train": {"seed": seed}, "data": {"seed": seed}})
            run["folder"] = str(Path(str(tree["folder"])) / f"{entry}-seed{seed}")
            members.append(Member(entry, seed, parse_config(run, f"{path}, entry {entry}")))
    _comparable(path, members)
    return members


def merge(base: Mapping[str, Any], difference: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `difference` in place of its own; neither is changed."""
    out = {k: merge(v, {}) if isinstance(v, dict) else v for k, v in base.items()}
    for key, value in difference.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def _comparable(path: Path, members: Sequence[Member]) -> None:
    def budget(c: RunConfig) -> dict[str, Any]:
        rows = sum(c.train.rows(step) for step in range(1, c.train.steps + 1))
        data = c.data.model_copy(update={"seed": 0, "workers": 0})
        return {
            "tokens": rows * c.data.sequence_length,
            "data": data.model_dump(mode="json"),
            "validation": c.validation.model_dump(mode="json"),
        }

    first = budget(members[0].config)
    for member in members:
        mine = budget(member.config)
        different = [k for k in first if mine[k] != first[k]]
        if different:
            key = different[0]
            raise ConfigError(
                f"study {path}: {key} of {member.entry} is {mine[key]}, of {members[0].entry} "
                f"{first[key]}",
                "what is compared has seen equally many tokens of the same data",
                f"set {key} in base",
            )


def compare(path: Path, overrides: Sequence[str], jobs: int | None) -> int:
    """Trains what is left of the study, writes the report into its folder; returns an exit code.

    `jobs` runs at a time (default: as many as fill the cores). A run that diverges is a result;
    any other failure ends the study with that run's exit code. On SIGTERM, SIGINT or SIGUSR1 the
    runs save and the study leaves with 75.
    """
    members = load_study(path, overrides)
    for member in members:
        _refuse_another(member)
    threads = max(1, members[0].config.train.threads)
    jobs = jobs or max(1, len(os.sched_getaffinity(0)) // threads)
    code = _train(members, jobs)
    finished = [m for m in members if m.look() >= m.config.train.steps]
    if not finished:
        return code
    print(report([_outcome(m) for m in finished], members[0].folder.path.parent))
    return code


def _outcome(member: Member) -> Outcome:
    from titans_pretrain.data.sources import tokenizer_of
    from titans_pretrain.model.counts import flops_per_token, parameter_count  # seconds: torch

    config = member.config
    vocabulary = config.model.vocab_size or tokenizer_of(config.data).vocab_size
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    return Outcome(
        member.entry,
        member.seed,
        sum(parameter_count(model).values()),
        3 * sum(flops_per_token(model, config.data.sequence_length).values()),
        list(read_records(member.folder.metrics)),
    )


def _refuse_another(member: Member) -> None:
    """A folder holds the results of one configuration alone."""
    try:
        before = _kept(member).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except OSError as e:
        raise storage_error(e, f"reading {_kept(member)}", starting=True) from e
    told = parse_config(yaml.safe_load(before), str(_kept(member)))
    if told != member.config:
        raise ConfigError(
            f"{member.folder.path} holds a run of another configuration",
            "a study goes on with the configuration that it began with",
            "give the study another folder, or remove this one",
        )


def _kept(member: Member) -> Path:
    """The configuration that the member's run was started with."""
    return member.folder.path / "member.yaml"


def _train(members: Sequence[Member], jobs: int) -> int:
    waiting = [m for m in members if m.look() < m.config.train.steps]
    running: dict[int, tuple[Member, subprocess.Popen[bytes]]] = {}
    processes: list[subprocess.Popen[bytes]] = []
    total = sum(m.config.train.steps for m in members)
    began, at_start = time.monotonic(), sum(m.done for m in members)
    told = began
    with contextlib.ExitStack() as stack:
        stack.callback(end, processes, 0.0)
        asked = stack.enter_context(forwarding(processes))  # requests to stop
        while waiting or running:
            while waiting and len(running) < jobs and not asked:
                member = waiting.pop(0)
                process = _start(member)
                running[process.pid] = member, process
                processes.append(process)
                print(f"{member.name}: {member.config.train.steps - member.done} steps to go")
            time.sleep(POLL)
            for pid, (member, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[pid]
                if code == EXIT_DIVERGED:
                    print(f"{member.name}: diverged after {member.look()} steps")
                elif code == EXIT_DONE:
                    print(f"{member.name}: done")
                elif code == EXIT_SAVED or -code in asked:  # by the signal: it had not begun yet
                    asked.append(signal.SIGTERM)
                else:
                    end([p for p in processes if p is not process], 60.0)
                    _tell_failure(member, code)
                    return code if code > 0 else 128 - code
            if asked and not running:
                print("saved on request; the same command goes on from here")
                return EXIT_SAVED
            if time.monotonic() - told >= TELL:
                told = time.monotonic()
                done = sum(m.look() for m in members)
                share = (done - at_start) / max(1e-9, total - at_start)
                left = (told - began) * (1 - share) / share if share else float("inf")
                now = ", ".join(f"{m.name} {m.done}" for m, _ in running.values())
                eta = duration(left) if share else "unknown"
                print(f"{100 * done / total:5.1f}%  steps: {now}  eta {eta}", flush=True)
    return EXIT_DONE


def _start(member: Member) -> subprocess.Popen[bytes]:
    folder = member.folder
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        atomic_write(_kept(member), dump_config(member.config))
        output = (folder.logs / "rank-00000.out").open("ab")
    except OSError as e:
        raise storage_error(e, f"starting {member.name}", starting=True) from e
    command = [sys.executable, "-m", "titans_pretrain", "train", str(_kept(member))]
    with output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=dies_with(os.getpid()),
        )


def _tell_failure(member: Member, code: int) -> None:
    output = member.folder.logs / "rank-00000.out"
    lines = output.read_text(errors="replace").splitlines()[-20:]
    print(f"{member.name} failed ({code}); its last lines ({output}):", file=sys.stderr)
    print(*(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
