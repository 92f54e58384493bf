"""A look at some steps of a run: `train CONFIG profile.steps=[a,b] profile.ranks=[0,1]`.

Below RUN/profile/step-a-b/ each rank that looks leaves
- rank-r.trace.json.gz: every operator, with the phases, blocks (measure/blocks.py) and parts of the
  step as ranges round them; open it at ui.perfetto.dev or chrome://tracing. All are on the clock of
  their host: `bench wave --traces` puts the ranks' blocks and waits side by side;
- rank-r.memory.pickle (CUDA): the allocator's history, for pytorch.org/memory_viz; or
  rank-r.memory.json (CPU): bytes allocated over time, and by operator;
- rank-r.summary.txt: time by phase, the 20 operators with the most time of their own.

No number of the run changes. The profiler itself starts one step earlier, if the run has one.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from titans_pretrain import phases
from titans_pretrain.config import ProfileConfig, RunConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.measure.blocks import watch_blocks
from titans_pretrain.measure.parts import watch_parts
from titans_pretrain.parallel.pipeline import Stage
from titans_pretrain.parallel.world import World

logger = logging.getLogger("titans_pretrain.measure.profile")

MOST_ALLOCATIONS = 500_000  # of a CUDA memory history
MOST_POINTS = 2000  # of a CPU memory timeline


def check_profile(config: ProfileConfig, world_size: int) -> None:
    """Raises ConfigError if a rank is to look that does not exist."""
    beyond = [rank for rank in config.ranks if rank >= world_size]
    if config.steps is not None and (beyond or not config.ranks):
        raise ConfigError(
            f"profile.ranks={list(config.ranks)}, {world_size} ranks",
            f"ranks that look are some of 0 to {world_size - 1}",
            "leave out profile.ranks (rank 0 looks), or name ranks of this run",
        )


class Profile:
    """Looks at the steps that the config names, on this rank; elsewhere it only notes the step.

    Args:
        first, last: steps that this life of the run goes through.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        world: World,
        stages: Sequence[Stage],
        first: int,
        last: int,
    ) -> None:
        self._world, self._stages = world, stages
        self._looking = contextlib.ExitStack()
        self._profiler: Any = None
        self._reached = 0
        self._window: tuple[int, int] | None = None
        window = config.profile.steps
        if window is None:
            return
        self._folder = folder / "profile" / f"step-{window[0]}-{window[1]}"
        begin, end = max(window[0], first), min(window[1], last)
        if begin > end:
            when = "past" if window[1] < first else "beyond the end"
            _warn(world, f"steps {first} to {last} run now: the window is {when}, nobody looks")
            return
        if (begin, end) != window:
            _warn(world, f"steps {first} to {last} run now: steps {begin} to {end} are looked at")
        if world.rank in config.profile.ranks:
            self._window = begin, end
            self._begin = max(begin - 1, first)  # the profiler's warm-up, if there is a step for it

    def reach(self, step: int) -> None:
        """Step `step` begins."""
        phases.at_step(step)
        if self._window is None or step <= self._reached:  # a step that is done again
            return
        self._reached = step
        begin, end = self._window
        if step == self._begin:
            self._start(warmup=begin - step, active=end - begin + 1)
        elif self._profiler is not None:
            self._profiler.step()
        if step == begin:
            self._look()
        if step > end:
            self.close()

    def close(self) -> None:
        """Ends the look, early if steps of the window are left; what was seen is written."""
        self._window = None
        self._looking.close()
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _start(self, warmup: int, active: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*warmup")  # step 1 has none before it
            plan = schedule(wait=0, warmup=warmup, active=active, repeat=1)
        self._profiler = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def _look(self) -> None:
        """From now on phases and parts are ranges of the trace."""
        ranges = _Ranges()
        self._looking.enter_context(phases.listening(ranges))
        self._looking.enter_context(watch_blocks(self._stages, ranges))
        self._looking.enter_context(watch_parts(self._stages, ranges))
        if self._world.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
            self._looking.callback(torch.cuda.memory._record_memory_history, enabled=None)

    def _write(self, seen: Any) -> None:
        """A profile that cannot be written is told and left out: the run is worth more."""
        name = f"rank-{self._world.rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._world.device.type == "cuda":
                snapshot = self._folder / f"{name}.memory.pickle"
                torch.cuda.memory._dump_snapshot(str(snapshot))
            plain = self._folder / f"{name}.trace.json"
            seen.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(f"{plain}.gz", "wb", 6) as packed:
                shutil.copyfileobj(source, packed)
            memory = None
            if self._world.device.type != "cuda":
                memory = cpu_memory(json.loads(plain.read_bytes()), seen.key_averages())
                text = json.dumps(memory, indent=1) + "\n"
                (self._folder / f"{name}.memory.json").write_text(text, encoding="utf-8")
            plain.unlink()
            summary = self._folder / f"{name}.summary.txt"
            summary.write_text(self._summary(seen, memory), encoding="utf-8")
        except OSError as e:
            logger.warning("profile: %s: %s; the run goes on without", self._folder, e)
            return
        logger.info("profile: %s", self._folder / f"{name}.*")

    def _summary(self, seen: Any, memory: dict[str, Any] | None) -> str:
        cuda = self._world.device.type == "cuda"
        lines = [f"rank {self._world.rank} on {self._world.device}, torch {torch.__version__}", ""]
        lines += [f"{'range':<28}{'calls':>8}{'ms':>12}" + (f"{'GPU ms':>12}" if cuda else "")]
        for name, (calls, host, device) in by_range(seen.events()).items():
            line = f"{name:<28}{calls:>8}{host / 1e3:>12.2f}"
            lines.append(line + (f"{device / 1e3:>12.2f}" if cuda else ""))
        if memory is not None:
            peak = memory["peak_bytes"] / 2**20
            lines += ["", f"most bytes allocated above the window's first: {peak:,.1f} MiB"]
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        averages = seen.key_averages()
        averages[:] = [op for op in averages if not op.is_user_annotation]
        lines += ["", averages.table(sort_by=order, row_limit=20)]
        return "\n".join(lines) + "\n"


class _Ranges:
    """Turns phases, blocks and parts into ranges of the trace. Backward has none of parts: the
    trace itself ties each of its operators to the forward's."""

    backward = False

    def __init__(self) -> None:
        self._open: list[Any] = []
        self._parts: list[str] = []

    def began(self, name: str) -> None:
        entered = record_function(name)
        entered.__enter__()
        self._open.append(entered)

    def ended(self, name: str) -> None:
        if self._open:  # else it began before anybody looked
            self._open.pop().__exit__(None, None, None)

    def entered(self, part: str, where: str) -> None:
        if part not in self._parts[-1:]:  # attention's own pieces are not told apart
            self.began(f"{where} {part}".strip())
        self._parts.append(part)

    def left(self, part: str, where: str) -> None:
        self._parts.pop()
        if part not in self._parts[-1:]:
            self.ended(part)

    def turned_back(self, part: str) -> None:
        raise AssertionError("backward is not watched")


def by_range(events: Any) -> dict[str, tuple[int, float, float]]:
    """Name of a range -> (how often, its microseconds on the host, on the device), longest first.

    Parts are summed over blocks. Ranges that lie in others count in both.
    """
    found: dict[str, tuple[int, float, float]] = {}
    for event in events:
        if event.is_user_annotation and event.device_type == torch.autograd.DeviceType.CPU:
            block, _, part = event.name.partition(" ")
            name = f"  {part}" if block.startswith("blocks.") else event.name
            calls, host, device = found.get(name, (0, 0.0, 0.0))
            device += event.device_time_total
            found[name] = (calls + 1, host + event.cpu_time_total, device)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def cpu_memory(trace: dict[str, Any], averages: Any) -> dict[str, Any]:
    """Bytes allocated over time (from 0 at the window's first allocation), the most of them, and
    the operators that allocated most of what outlived them."""
    points = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in trace["traceEvents"]
        if event["name"] == "[memory]"
    )
    start, base = points[0] if points else (0.0, 0)
    peaks = []
    width = -(-len(points) // MOST_POINTS)
    for first in range(0, len(points), max(1, width)):  # the highest of each few
        when, total = max(points[first : first + width], key=lambda point: point[1])
        peaks.append([round(when - start, 1), total - base])
    operators = sorted(averages, key=lambda op: -op.self_cpu_memory_usage)
    return {
        "peak_bytes": max((total for _, total in peaks), default=0),
        "operators": [
            {"name": op.key, "calls": op.count, "bytes": op.self_cpu_memory_usage}
            for op in operators[:20]
            if op.self_cpu_memory_usage > 0
        ],
        "timeline_us_bytes": peaks,
    }


def _warn(world: World, what: str) -> None:
    if world.rank == 0:
        logger.warning("profile.steps: %s", what)
