"""`titans-pretrain bench step CONFIG`: where a step's time goes, in one run, side by side.

Steps by turns are left alone (their time is the headline) and watched, phase by phase and part by
part. FLOPs are those of model/counts.py, beside a matrix product measured between the steps on this
very machine. One more step counts bytes and collectives and is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_pretrain.config import HardwareConfig, RunConfig, dump_config, load_config
from titans_pretrain.data.batch import Batch
from titans_pretrain.errors import ConfigError
from titans_pretrain.estimate.beside import planned
from titans_pretrain.estimate.hardware import hardware_of
from titans_pretrain.feed import open_stream, with_vocabulary
from titans_pretrain.launch.local import as_ranks
from titans_pretrain.measure.failing import Failing
from titans_pretrain.measure.footprint import held_bytes
from titans_pretrain.measure.made import made_batches, matmul_rate
from titans_pretrain.measure.parts import watch_parts
from titans_pretrain.measure.step_benchmark_report import table
from titans_pretrain.measure.stopwatch import Key, Stopwatch
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.rendezvous import told_to_all
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.phases import at_step, listening, phase
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.step import DTYPES, Progressed, TrainStep
from titans_pretrain.watch import Watch

VOCABULARY = 32_000  # of made-up tokens, where the config names none
# Parts of the table -> parts of flops_per_token.
COUNTED = {
    "attention": ("attention_maps", "attention"),
    "memory": ("memory_maps", "memory", "retrieval"),
    "mlp": ("mlp",),
    "head and loss": ("head",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0, or the exit code of the rank that failed."""
    parser = argparse.ArgumentParser(
        prog="titans-pretrain bench step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; its data need not exist")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. train.micro_batch=4")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start here")
    parser.add_argument("--steps", type=int, default=6, metavar="K", help="of each kind; default 6")
    parser.add_argument("--warm-up", type=int, default=2, metavar="K", help="steps before them")
    parser.add_argument("--synthetic", action="store_true", help="made-up tokens in any case")
    parser.add_argument("--gpu", metavar="NAME", help="print what `plan --gpu NAME` says beside")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_intermixed_args(argv)
    if min(args.steps, args.warm_up + 1, args.ranks or 1) < 1:
        parser.error("--steps and --ranks are at least 1, --warm-up is at least 0")
    config = load_config(args.config, args.overrides)
    hardware = hardware_of(args.gpu) if args.gpu is not None else None
    if (code := as_ranks(["bench", "step", *argv], args.ranks)) is not None:
        return code
    figures = measure(config, args.steps, args.warm_up, args.synthetic, hardware)
    if int(os.environ.get("RANK", 0)) == 0:
        print(table(figures))
        if args.json is not None:
            write_json(args.json, figures)
    return 0


def measure(
    config: RunConfig,
    steps: int,
    warm_up: int,
    synthetic: bool,
    hardware: HardwareConfig | None = None,
) -> dict[str, Any]:
    """Runs the steps on this rank; the figures, plain values for JSON, with those of a plan for
    `hardware`. Collective."""
    with told_to_all():
        layout = plan_layout(config, world_size())
    with contextlib.ExitStack() as leaving, Failing(config) as failing:
        said = f"{dump_config(config)}{steps} {warm_up} {synthetic}"
        world = failing.joined(start_world(config.train, layout, said=said))
        leaving.callback(world.shut_down)
        made = synthetic or not prepared(config)
        last = warm_up + 2 * steps + 1
        config = for_benchmark(config, last)
        config, batches = _made(config, world) if made else _read(config, world)
        failing.config = config
        leaving.callback(batches.close)
        step = failing.step = TrainStep(config, layout, world)
        folder = RunFolder(leaving.enter_context(tempfile.TemporaryDirectory()))
        for path in (folder.checkpoints, folder.tensorboard, folder.logs):
            path.mkdir()
        watch = Watch(config, folder, world, leaving, {}, 0, 0, lambda state: {})
        bench = _Bench(config, world, step, watch, batches)

        dtype = DTYPES[config.train.precision]
        for number in range(1, warm_up + 1):
            bench.step(number)
            _progress(world, f"warm-up {number}/{warm_up}")
        rates, plain, watched = [], [], []
        clock = Stopwatch(world.device)
        for number in range(warm_up + 1, last, 2):
            rates.append(matmul_rate(world.device, dtype))
            plain.append(bench.step(number))
            with listening(clock), watch_parts(step.stages, clock):
                clock.start()
                bench.step(number + 1)
                watched.append(clock.stop())
            _progress(world, f"steps {len(watched)}/{steps}")
        labels = bench.labels / bench.count
        memory, collectives = count_bytes(bench, last)
        _progress(world, "")
        return {
            "what": _describe(config, world, made),
            "ranks": world.size,
            "tokens": config.train.global_batch * config.data.sequence_length,
            "labels": labels,
            "step_s": sum(n for _, n in faster_half([{("", ""): s} for s in plain])),
            "matmul_flop_per_s": max(rates),
            "matmul_dtype": config.train.precision,
            "seconds": {" / ".join(filter(None, key)): s for key, s in faster_half(watched)},
            "flops": counted(config, world.size),
            "memory_bytes": memory,
            "collectives": collectives,
            "plan": None if hardware is None else planned(config, world.size, hardware),
        }


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Writes a benchmark's figures. Raises ConfigError."""
    try:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"--json {path}: {e.strerror}", "the figures go there", "give another file"
        ) from e


def for_benchmark(config: RunConfig, steps: int) -> RunConfig:
    """The config of a run that is long enough, without a ramp: each step is the full one."""
    train = config.train.model_copy(update={"steps": max(steps, config.train.steps), "ramp": None})
    return config.model_copy(update={"train": train})


def prepared(config: RunConfig) -> bool:
    """Whether all sources of the config are there."""
    paths = [source.path for source in config.data.sources.values()]
    return all("://" in path or (Path(path) / "manifest.json").exists() for path in paths)


def vocabulary_of(config: RunConfig) -> int:
    """The vocabulary's size without data: the config's, or one that the tensor ranks divide."""
    tensor = config.parallel.tensor
    return config.model.vocab_size or -(-VOCABULARY // tensor) * tensor


Batches = Iterator[tuple[list[Batch], dict[str, Any]]]


def _made(config: RunConfig, world: World) -> tuple[RunConfig, Any]:
    vocabulary = vocabulary_of(config)
    model = config.model.model_copy(update={"vocab_size": vocabulary})
    config = config.model_copy(update={"model": model})

    def repeat() -> Batches:
        micro_batches = made_batches(config, 1, world.place.data, world.layout.data_parallel)
        while True:
            yield micro_batches, {}

    return config, repeat()


def _read(config: RunConfig, world: World) -> tuple[RunConfig, Any]:
    stream = world.agree(lambda: open_stream(config, world))
    return with_vocabulary(config, stream), world.agree(lambda: stream.batches(stream.start(), 1))


class _Bench:
    """Goes through steps as training does: fetch, step, record."""

    def __init__(
        self, config: RunConfig, world: World, step: TrainStep, watch: Watch, batches: Batches
    ) -> None:
        self.config, self.world, self.train_step = config, world, step
        self.watch, self.batches = watch, batches
        self.labels = self.count = 0

    def step(self, number: int) -> float:
        """Goes through one step; its seconds. Collective."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        at_step(number)
        began = time.perf_counter()
        with phase("data"):
            micro_batches, data = next(self.batches)
        waited = time.perf_counter() - began
        report = self.train_step(micro_batches, number)
        self.labels, self.count = self.labels + report.tokens, self.count + 1
        with phase("watch"):
            at = Progressed(number, self.labels, data)
            took = time.perf_counter() - began
            self.watch.record(at, report, took, waited, self.train_step.whole_model)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def count_bytes(bench: _Bench, number: int) -> tuple[dict[str, int], dict[str, Any]]:
    """(bytes held, by kind; collectives of a step, by name) of this rank, in one step."""
    seen, live = Collectives(), LiveBytes()
    held = held_bytes(bench.train_step)
    cuda = bench.world.device.type == "cuda"
    with contextlib.ExitStack() as inside:
        inside.enter_context(seen)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            inside.enter_context(live)
        bench.step(number)
    if cuda:
        peak = torch.cuda.max_memory_allocated() - sum(held.values())
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        reserved = {"reserved, not in use": unused}
    else:
        peak, reserved = live.peak, {}
    kinds = {kind: n for kind, n in held.items() if kind != "gradients"}
    return {**kinds, "made in a step, at most": peak, **reserved}, seen.counted


class Collectives(TorchDispatchMode):
    """Counts calls and bytes (of a rank's own tensors) of every c10d operator in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[str, dict[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            here = self.counted.setdefault(name, {"calls": 0, "bytes": 0})
            tensors = [x for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor)]
            here["calls"] += 1
            here["bytes"] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def faster_half(steps: Sequence[dict[Key, float]]) -> list[tuple[Key, float]]:
    """The mean of the half of the steps that took least, rounded up: phases still add up to a
    step, and what else the machine did in the others is left out."""
    fast = sorted(steps, key=lambda step: sum(step.values()))[: -(-len(steps) // 2)]
    keys = dict.fromkeys(key for step in fast for key in step)
    return [(key, sum(step.get(key, 0.0) for step in fast) / len(fast)) for key in keys]


def counted(config: RunConfig, ranks: int) -> dict[str, float]:
    """FLOPs of one rank in one step by phase and part, by model/counts.py."""
    tokens = config.train.global_batch * config.data.sequence_length / ranks
    by_part = flops_per_token(config.model, config.data.sequence_length)
    found = {}
    for part, counted_parts in COUNTED.items():
        forward = tokens * sum(by_part[name] for name in counted_parts)
        if forward:
            found[f"forward / {part}"] = forward
            found[f"backward / {part}"] = 2 * forward
            if config.train.recompute == "blocks" and part != "head and loss":
                found[f"recompute / {part}"] = forward
    return found


def _describe(config: RunConfig, world: World, made: bool) -> str:
    model, train = config.model, config.train
    parameters = sum(parameter_count(model).values())
    device = world.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return (
        f"{model.variant}, {model.blocks} x {model.width}, {parameters:,} parameters, "
        f"{train.global_batch} x {config.data.sequence_length} tokens a step in micro-batches of "
        f"{train.micro_batch}, {train.precision}, recompute {train.recompute}; {world.size} ranks "
        f"on {device}, {world.threads} threads each; {'made-up' if made else 'prepared'} data"
    )


def _progress(world: World, what: str) -> None:
    """One line that is written over, for a person who waits."""
    if world.rank == 0 and sys.stderr.isatty():
        print(f"\r{what:<40}", end="" if what else "\r", file=sys.stderr, flush=True)
