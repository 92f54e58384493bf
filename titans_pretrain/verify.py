"""`titans-pretrain verify CONFIG`: a layout's first steps against one plain process.

The ranks go through N steps as training does. Then one process goes through the same rows with the
plain model and torch's AdamW: no Megatron, no DeepSpeed, no plan, no shard. Compared are the losses
and gradient norms of all steps, the gradient of the first step and the way that the N steps have
gone, parameter by parameter; and what several ranks hold, copy by copy. All of it in float32.

How much rounding alone may do is measured, too: the plain process runs once more from weights
changed by 1e-7 of themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_pretrain import phases
from titans_pretrain.arguments import positive
from titans_pretrain.config import RunConfig, dump_config, load_config
from titans_pretrain.data.batch import Batch
from titans_pretrain.data.streaming import open_batches
from titans_pretrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError, OutOfMemoryError
from titans_pretrain.feed import open_stream, with_vocabulary
from titans_pretrain.launch.local import as_ranks
from titans_pretrain.measure.failing import Failing
from titans_pretrain.measure.footprint import release
from titans_pretrain.measure.made import made_batches
from titans_pretrain.measure.out_of_memory import is_out_of_memory
from titans_pretrain.measure.step_benchmark import prepared
from titans_pretrain.parallel.layout import Fragment, Layout, plan_layout
from titans_pretrain.parallel.rendezvous import told_to_all
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.run import dcp
from titans_pretrain.run.watchdog import Watchdog
from titans_pretrain.step import TrainStep
from titans_pretrain.verify_config import VOCABULARY, changes, verified
from titans_pretrain.verify_plain import Step, Trained, first_weight, train_plain
from titans_pretrain.verify_report import (
    GRADIENT,
    UPDATE,
    Compared,
    Difference,
    Gap,
    report,
    tolerance,
)

ROUNDING = 1e-7
PATIENCE = 7 * 24 * 3600.0  # seconds in which the other ranks wait for the plain process

Apart = dict[str, tuple[float, float]]  # of a copy, by parameter: see `copies`


def register(subparsers: Any) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    parser = subparsers.add_parser(
        "verify",
        help="check a config's layout against one plain process",
        description=f"{(__doc__ or '').splitlines()[0]} Exit codes: 0 all agrees, 1 something "
        "differs or cannot be judged; others as `train`.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; its data need not exist")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. parallel.tensor=2")
    parser.add_argument("--ranks", type=positive, metavar="N", help="processes to start here")
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--shrink", action="store_true", help="the same layout of a small model on made-up rows"
    )
    parser.add_argument("--all", action="store_true", help="list every parameter, not the worst 10")
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="seen by all ranks; default: a temporary one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 where all agrees, 1 where not."""
    asked = load_config(args.config, args.overrides)
    ranks = world_size() if "RANK" in os.environ else args.ranks or 1
    with told_to_all():
        plan_layout(verified(asked, ranks, args.shrink), ranks)  # also before there are ranks
    command = ["verify", args.config, *args.overrides, "--steps", str(args.steps)]
    command += [f"--{name}" for name in ("shrink", "all") if getattr(args, name)]
    if args.scratch is not None:
        command += ["--scratch", str(args.scratch)]
        try:
            args.scratch.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"--scratch {args.scratch}: {e.strerror}",
                "what the layout has computed goes there",
                "give another folder",
            ) from e
    if (code := as_ranks(command, ranks if ranks > 1 else None)) is not None:
        return code
    with tempfile.TemporaryDirectory(dir=args.scratch) as mine:
        return verify(asked, args.steps, Path(mine), shrink=args.shrink, everything=args.all)


def verify(
    asked: RunConfig, steps: int, scratch: Path, *, shrink: bool = False, everything: bool = False
) -> int:
    """Collective. Runs both sides; rank 0 prints the report. The exit code, equal on every rank.

    Args:
        scratch: an empty folder of this rank; that of rank 0 is used by all.
    """
    config = verified(asked, world_size(), shrink)
    layout, changed = plan_layout(config, world_size()), changes(asked, config)
    with contextlib.ExitStack() as leaving, Failing(config) as failing:
        # A report of a hang goes into the scratch folder: there is no run.
        away = config.model_copy(update={"folder": str(scratch)})
        with Watchdog(away) as watchdog, contextlib.ExitStack() as watched:
            said = f"{dump_config(config)}{steps} {shrink} {everything}"
            world = failing.joined(start_world(config.train, layout, watchdog.timeout_s, said))
            leaving.callback(world.shut_down)
            watchdog.joined(world, watched)
            scratch = Path(world.broadcast_object(str(scratch)))
            world.agree(lambda: require_seen(scratch))
            made = world.only_first(lambda: shrink or not prepared(config))
            config, plain_rows, rows = rows_of(config, world, watched, made)
            step = failing.step = TrainStep(config, layout, world)
            taken, mine = go(step, rows, steps, scratch, watchdog)
            apart = world.gather_objects(mine)
        # The plain process may need all of the memory, and long: the others wait, unwatched.
        release(step)
        failing.step = None
        torch.cuda.empty_cache()
        patient = replace(world, timeout_s=PATIENCE).apart()

        def judge() -> bool:
            read = plain_rows(steps)
            recompute = config.train.recompute == "blocks" and not shrink
            found = against_plain(config, world.device, read, scratch, taken, apart, recompute)
            head = headline(config, layout, steps, "made-up rows" if made else "its own data")
            print(report(head, changed, found, everything=everything), flush=True)
            return found.agrees

        return EXIT_DONE if patient.only_first(judge) else EXIT_OTHER


def require_seen(scratch: Path) -> None:
    """Raises ConfigError where rank 0's folder is not this rank's."""
    if not scratch.is_dir():
        raise ConfigError(
            f"{scratch}: not seen from {os.uname().nodename}",
            "what the layout has computed goes through a folder that all ranks see",
            "give one on a shared disk with --scratch",
        )


def headline(config: RunConfig, layout: Layout, steps: int, rows: str) -> str:
    m = config.model
    return (
        f"{layout.describe()} of {m.variant}, {m.blocks} blocks of width {m.width}, against one "
        f"plain process: {steps} steps of {config.train.global_batch} x "
        f"{config.data.sequence_length} tokens ({rows}), float32"
    )


Steps = list[list[Batch]]  # micro-batches of each step


def rows_of(
    config: RunConfig, world: World, leaving: contextlib.ExitStack, made: bool
) -> tuple[RunConfig, Callable[[int], Steps], Iterator[list[Batch]]]:
    """The config with its vocabulary; all ranks' micro-batches of so many steps; and step by step
    those of this rank, until `leaving` is left. Collective."""
    if made:
        size = config.model.vocab_size or VOCABULARY * config.parallel.tensor
        model = config.model.model_copy(update={"vocab_size": size})
        config = config.model_copy(update={"model": model})
        place, ranks = world.place.data, world.layout.data_parallel

        def make(steps: int) -> Steps:
            return [made_batches(config, number) for number in range(1, steps + 1)]

        def made_rows() -> Iterator[list[Batch]]:
            number = 0
            while number := number + 1:
                yield made_batches(config, number, place, ranks)

        return config, make, made_rows()
    stream = world.agree(lambda: open_stream(config, world))
    config = with_vocabulary(config, stream)

    def read(steps: int) -> Steps:
        alone = open_batches(
            config.data,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            align=config.model.alignment,
            vocab_size=config.model.vocab_size,
            rows=config.train.rows,
        )
        with contextlib.closing(alone.batches(alone.start())) as batches:
            return [next(batches)[0] for _ in range(steps)]

    batches = leaving.enter_context(
        contextlib.closing(world.agree(lambda: stream.batches(stream.start())))
    )
    return config, read, (micro_batches for micro_batches, _ in batches)


def go(
    step: TrainStep,
    rows: Iterator[list[Batch]],
    steps: int,
    folder: Path,
    watchdog: Watchdog,
) -> tuple[list[Step], Apart]:
    """Collective. The layout's side; leaves the first gradient and the last weights in the folder,
    by unsharded name. Returns the steps, and how far this rank's copies are from what was saved."""
    taken: list[Step] = []
    gradients: list[Fragment] = []

    def keep(owned: dict[str, Fragment]) -> None:
        for f in owned.values():
            gradients.append(replace(f, tensors={"gradient": f.tensors["gradient"].clone()}))

    handle = step.optimizer.on_reduced_gradients(keep)
    for number in range(1, steps + 1):
        phases.at_step(number)
        with phases.phase("data"):
            micro_batches = step.world.agree(lambda: next(rows))
        watchdog.fed(micro_batches)
        did = step(micro_batches, number)
        taken.append(Step(did.loss, did.grad_norm))
        if number == 1:
            handle.remove()
            factor = max(1.0, (did.grad_norm + 1e-6) / step.config.optim.clip)  # unclipped again
            for f in gradients:
                f.tensors["gradient"].mul_(factor)
    weights = [  # copies: of what a writer may see
        replace(f, tensors={"weight": f.tensors["weight"].clone()})
        for f in step.optimizer.fragments()
    ]
    with phases.phase("checkpoint"):
        dcp.save_tensors(folder / "gradient", gradients, {})
        dcp.save_tensors(folder / "weight", weights, {})
        gradient = copies(folder / "gradient", gradients, "gradient")
        weight = copies(folder / "weight", weights, "weight")
    return taken, {
        n: (float(gradient[n].abs().max()), float(weight[n].norm()))
        for n in sorted(gradient.keys() & weight.keys())
    }


def copies(folder: Path, fragments: Sequence[Fragment], what: str) -> dict[str, Tensor]:
    """What this rank's copies, of which another rank saved its own, have more than that."""
    metadata, found = dcp.read_metadata(folder), {}
    for f in fragments:
        [name] = dcp.names_of(f, [what]).values()
        if not f.first and name in metadata.state_dict_metadata:
            saved = f.shard.of(dcp.load_one(folder, name, metadata)).reshape(-1)
            found[f.name] = f.tensors[what].cpu() - saved[f.start : f.start + f.numel]
    return found


def against_plain(
    config: RunConfig,
    device: torch.device,
    rows: Steps,
    folder: Path,
    taken: Sequence[Step],
    apart: Sequence[Apart],
    recompute: bool,
) -> Compared:
    """The plain side, and every parameter's difference from it; `apart`: of each rank.

    Raises OutOfMemoryError."""
    try:
        plain = train_plain(config, device, rows, recompute=recompute)
        shaken = train_plain(config, device, rows, recompute=recompute, changed=ROUNDING)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise OutOfMemoryError(
            f"the plain process, on {device}: {str(e).strip().splitlines()[0]}",
            "the whole model, its AdamW state and one row's activations fit into one process",
            "verify a small model in the same layout: --shrink; or use train.device=cpu, "
            "train.recompute=blocks, or a smaller data.sequence_length",
        ) from e
    kinds = (("gradient", "optimizer/gradient"), ("weight", "model"))
    tables = [(folder / kind, prefix, dcp.read_metadata(folder / kind)) for kind, prefix in kinds]

    def saved(name: str) -> list[Tensor | None]:
        return [
            dcp.load_one(where, path, table)
            if (path := f"{prefix}/{name}") in table.state_dict_metadata
            else None
            for where, prefix, table in tables
        ]

    parameters: list[Difference] = []
    several: list[Difference] = []
    for name in plain.weights:
        one, others = differences(config, name, plain, shaken, saved(name), apart)
        parameters.append(one)
        several += sorted(others, key=lambda d: d.order)[-1:]  # the worst of its copies
    return Compared(taken, plain.steps, shaken.steps, parameters, several)


def differences(
    config: RunConfig,
    name: str,
    plain: Trained,
    shaken: Trained,
    saved: Sequence[Tensor | None],
    apart: Sequence[Apart],
) -> tuple[Difference, list[Difference]]:
    """Of one parameter as the layout saved it (gradient, weight; None: not at all), and of its
    copies on other ranks from that.

    AdamW takes a step of full length in either direction however small a gradient is: where it is
    below what gradients may differ by in any step, rounding decides. Such entries do not count as
    an update.
    """
    gradient, weight = plain.gradient[name], plain.weights[name]
    begin, changed = (
        first_weight(config.model, name, weight.shape, config.train.seed, change)
        for change in (0.0, ROUNDING)
    )
    moved = weight - begin
    largest, way = float(gradient.abs().max()), float(moved.norm())
    rounding = _relative(float((shaken.gradient[name] - gradient).abs().max()), largest)
    faintest, other = plain.faintest[name], shaken.faintest[name]
    noise = float((faintest - other).abs().nan_to_num(0.0, 0.0).max())  # of all steps; inf - inf
    decided = faintest > tolerance(max(rounding, noise), GRADIENT)
    shaken_off = (shaken.weights[name] - changed - moved)[decided]
    rounding_update = _relative(float(shaken_off.norm()), way)

    def differs(gradient: float, update: float, note: str = "") -> Difference:
        off = Gap(_relative(gradient, largest), rounding, GRADIENT)
        astray = Gap(_relative(update, way), rounding_update, UPDATE)
        return Difference(name, off, astray, note, silent=largest == gradient == 0)

    others = [
        differs(*told[name], f"rank {rank}'s copy")
        for rank, told in enumerate(apart)
        if name in told
    ]
    found, after = saved
    if found is None or after is None:
        return differs(math.nan, math.nan, "which no rank has"), others
    off, astray = (found - gradient).abs().max(), (after - weight)[decided].norm()
    return differs(float(off), float(astray)), others


def _relative(difference: float, of: float) -> float:
    return difference / max(of, 1e-30)
