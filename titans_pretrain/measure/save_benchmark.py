"""`titans-pretrain bench save CONFIG`: how long a save holds training up, behind it and at once.

One synchronous and one asynchronous save by turns, of the same state onto the same disk, with steps
of training between them: left alone, and while the save is written. Its checkpoints are removed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titans_pretrain.config import RunConfig, dump_config, load_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.launch.local import as_ranks
from titans_pretrain.measure.failing import Failing
from titans_pretrain.measure.made import made_batches
from titans_pretrain.measure.step_benchmark import for_benchmark, vocabulary_of, write_json
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.rendezvous import told_to_all
from titans_pretrain.parallel.world import start_world, world_size
from titans_pretrain.run.saver import Saved, Saver
from titans_pretrain.step import TrainStep


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; returns 0, or the exit code of the rank that failed."""
    parser = argparse.ArgumentParser(
        prog="titans-pretrain bench save", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; its data need not exist")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. model.width=512")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start here")
    parser.add_argument("--saves", type=int, default=5, metavar="K", help="of each mode; default 5")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_intermixed_args(argv)
    if min(args.saves, args.ranks or 1) < 1:
        parser.error("--saves and --ranks are at least 1")
    config = load_config(args.config, args.overrides)
    if (code := as_ranks(["bench", "save", *argv], args.ranks)) is not None:
        return code
    figures = measure(config, args.saves, args.folder)
    if int(os.environ.get("RANK", 0)) == 0:
        print(table(figures))
        if args.json is not None:
            write_json(args.json, figures)
    return 0


def measure(config: RunConfig, saves: int, folder: Path | None = None) -> dict[str, Any]:
    """Saves and trains on this rank; medians in seconds, plain values for JSON. Collective."""
    with contextlib.ExitStack() as leaving, Failing(config) as failing:
        with told_to_all():
            layout = plan_layout(config, world_size())
        said = f"{dump_config(config)}{saves}"
        world = failing.joined(start_world(config.train, layout, said=said))
        leaving.callback(world.shut_down)
        model = config.model
        vocabulary = {"vocab_size": vocabulary_of(config)}
        config = config.model_copy(update={"model": model.model_copy(update=vocabulary)})
        config = failing.config = for_benchmark(config, 1)
        step = failing.step = TrainStep(config, layout, world)
        batches = made_batches(config, 1, world.place.data, layout.data_parallel)

        def scratch() -> str:
            try:
                return leaving.enter_context(tempfile.TemporaryDirectory(dir=folder))
            except OSError as e:
                raise ConfigError(
                    f"--folder {folder}: {e.strerror}", "it is there", "make it, or name another"
                ) from e

        checkpoints = Path(world.only_first(scratch))
        told: dict[str, list[Saved]] = {"sync": [], "async": []}
        savers = {
            mode: leaving.enter_context(
                Saver(
                    checkpoints,
                    config.checkpoint.model_copy(update={"mode": mode, "keep_last": 1}),
                    *(world, lambda: None, told[mode].append),
                )
            )
            for mode in told
        }
        done = 0

        def train() -> float:
            nonlocal done
            done += 1
            began = time.perf_counter()
            step(batches, 1)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        def save(mode: str) -> None:
            state = {"step": done, "life": 1, "config": config.model_dump(mode="json")}
            rng = {"rng/cpu": torch.get_rng_state()}
            savers[mode].save(state, step.optimizer.fragments(), rng)

        alone, beside = [], []
        for turn in range(saves + 1):  # the first one warms up: it makes the host copy's memory
            train()
            save("sync")
            alone.append(train())
            save("async")
            writing = True
            while writing:  # all ranks take the same steps
                beside.append(train())
                writing = bool(world.max([float(len(told["async"]) == turn)])[0])
                world.raise_any(savers["async"].poll())
        fragments = step.optimizer.fragments()
        size = sum(t.nbytes for f in fragments if f.first for t in f.tensors.values())
        return {
            "ranks": world.size,
            "bytes": int(world.sum([float(size)])[0]),
            "sync_s": statistics.median(s.stalled for s in told["sync"][1:]),
            "async_stall_s": statistics.median(s.stalled for s in told["async"][1:]),
            "async_behind_s": statistics.median(s.behind for s in told["async"][1:]),
            "step_s": statistics.median(alone[1:]),
            "step_while_writing_s": statistics.median(beside[1:]),
        }


def table(figures: dict[str, Any]) -> str:
    """What `measure` found on rank 0, for the console."""
    sync, stall = figures["sync_s"], figures["async_stall_s"]
    step, writing = figures["step_s"], figures["step_while_writing_s"]
    return "\n".join(
        (
            f"{figures['bytes'] / 2**20:,.1f} MiB by {figures['ranks']} ranks",
            f"synchronous save           training stands still for {1e3 * sync:>10.2f} ms",
            f"asynchronous save          training stands still for {1e3 * stall:>10.2f} ms, "
            f"1/{sync / stall:.1f} of it",
            f"    complete, behind the training, after             "
            f"{1e3 * figures['async_behind_s']:>10.2f} ms",
            f"a step, left alone {1e3 * step:.2f} ms; while a save is written "
            f"{1e3 * writing:.2f} ms, {writing / step:.2f} times",
        )
    )
