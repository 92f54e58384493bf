"""`titans-pretrain verify CONFIG`: a layout's first steps against one plain process.

The ranks go through N steps as training does. Then one process goes through the same rows with the
plain model and torch's AdamW: no Megatron, no DeepSpeed, no plan, no shard. Compared are the losses
and gradient norms of all steps, the gradient of the first step and the way that the N steps have
gone, parameter by parameter. All of it in float32.

How much rounding alone may do is measured, too: the plain process runs once more from weights
changed by 1e-7 of themselves. A difference counts where it is beyond its tolerance and beyond ten
times that.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig, RunConfig, dump_config, load_config
from titans_pretrain.data.batch import Batch
from titans_pretrain.data.streaming import open_batches
from titans_pretrain.errors import EXIT_DONE, EXIT_OTHER, ConfigError
from titans_pretrain.feed import open_stream, with_vocabulary
from titans_pretrain.launch.local import as_ranks
from titans_pretrain.measure.made import made_batches
from titans_pretrain.measure.step_benchmark import prepared
from titans_pretrain.model.loss import token_loss, z_penalty
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM, initialise
from titans_pretrain.parallel.layout import Fragment, Layout, plan_layout
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.run import dcp
from titans_pretrain.run.optim import learning_rate, param_groups
from titans_pretrain.step import TrainStep

GRADIENT, UPDATE, LOSS = 1e-5, 1e-3, 1e-5  # tolerances, each relative
ROUNDING, BEYOND = 1e-7, 10.0
VOCABULARY = 512  # of made-up tokens, where the config names none
HEAD_WIDTH = 16  # of a shrunk model: with 4, float32 says little


@dataclass(frozen=True)
class Step:
    loss: float  # nats a label
    grad_norm: float


class PlainRun:
    """Training in one process: the plain model, torch's AdamW, one batch after the other."""

    def __init__(self, config: RunConfig, device: torch.device, changed: float = 0.0) -> None:
        self.config, self.device = config, device
        self.model = TitansLM(config.model, dtype=torch.float32, device=device)
        initialise(self.model, config.train.seed)
        if changed:
            g = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in self.model.parameters():
                    p.mul_(1 + changed * torch.randn(p.shape, generator=g).to(device))
        o = config.optim
        groups = param_groups(self.model.named_parameters(), kind, o)
        self.adamw = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def step(self, number: int, batches: Sequence[Batch]) -> tuple[Step, dict[str, Tensor]]:
        """Update `number` (from 1) from all rows of the step: what it was, and every gradient
        before clipping."""
        tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
        self.adamw.zero_grad()
        nats = 0.0
        for batch in batches:
            mask = batch.loss_mask.to(self.device)
            logits, _ = self.model(batch.tokens.to(self.device), batch.positions, carry=False)
            loss = token_loss(logits, batch.labels.to(self.device))[mask].sum() / tokens
            nats += loss.item()
            if self.config.train.z_loss:
                loss = loss + self.config.train.z_loss * z_penalty(logits)[mask].sum() / tokens
            loss.backward()
        gradients = {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        rate = learning_rate(number, self.config.optim, self.config.train.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.adamw.step()
        return Step(nats, float(norm)), gradients

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


@dataclass(frozen=True)
class Difference:
    """Of one parameter; relative to the gradient's largest entry and to the way gone."""

    name: str
    gradient: float
    update: float
    rounding_gradient: float
    rounding_update: float

    @property
    def wrong(self) -> bool:
        return not (
            self.gradient <= max(GRADIENT, BEYOND * self.rounding_gradient)
            and self.update <= max(UPDATE, BEYOND * self.rounding_update)
        )

    @property
    def size(self) -> float:
        """By which parameters are ordered: how far beyond its tolerance; NaN above all."""
        worst = max(self.gradient / GRADIENT, self.update / UPDATE)
        return math.inf if math.isnan(self.gradient + self.update) else worst


def register(subparsers: Any) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    parser = subparsers.add_parser(
        "verify",
        help="check a config's layout against one plain process",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; its data need not exist")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. parallel.tensor=2")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes to start here")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="default 3")
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
    config = load_config(args.config, args.overrides)
    ranks = args.ranks or world_size()
    if min(args.steps, ranks) < 1:
        raise ConfigError(
            f"--steps {args.steps}, --ranks {ranks}", "both are at least 1", "give larger numbers"
        )
    config = checked(config, args.steps)
    if args.shrink:
        config = shrunk(config, ranks)
    layout = plan_layout(config, ranks)
    if (code := as_ranks(sys.argv[1:], ranks if ranks > 1 else None)) is not None:
        return code
    with tempfile.TemporaryDirectory(dir=args.scratch) as mine:
        return verify(config, layout, args.steps, Path(mine), args.shrink, args.all)


def checked(config: RunConfig, steps: int) -> RunConfig:
    """The config as it is verified: in float32, the schedule cut to the steps, no growing batch."""
    train = {"precision": "fp32", "steps": max(steps, 2), "ramp": None}
    optim = {"warmup_steps": 0, "schedule": "constant"}  # full steps from the first on
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "optim": config.optim.model_copy(update=optim),
        }
    )


def shrunk(config: RunConfig, ranks: int) -> RunConfig:
    """The same layout, wiring and heads of a small model: two blocks a piece, heads of 16, four
    chunks (MAC: segments) a context rank, two micro-batches of one row."""
    p, m = config.parallel, config.model
    data_parallel = max(1, ranks // (p.tensor * p.context * p.pipeline))
    chunk = min(m.memory.chunk, 16)
    segment = 2 * chunk
    tensor = p.tensor
    model = {
        "blocks": 2 * p.pipeline * p.interleave,
        "width": m.heads * HEAD_WIDTH,
        "mlp_width": -(-2 * m.heads * HEAD_WIDTH // tensor) * tensor,
        "vocab_size": -(-VOCABULARY // tensor) * tensor,
        "segment": segment,
        "window": None if m.window is None else min(m.window, 3 * chunk),
        "persistent_tokens": min(m.persistent_tokens, 4),
        "memory": m.memory.model_copy(update={"chunk": chunk}),
    }
    train = {
        "micro_batch": 1,
        "global_batch": 2 * data_parallel * max(1, p.pipeline),
    }
    length = 4 * segment * p.context * tensor
    return config.model_copy(
        update={
            "model": ModelConfig.model_validate({**m.model_dump(), **_dumped(model)}),
            "train": config.train.model_copy(update=train),
            "data": config.data.model_copy(update={"sequence_length": length}),
        }
    )


def _dumped(model: dict[str, Any]) -> dict[str, Any]:
    return {**model, "memory": model["memory"].model_dump()}


def verify(
    config: RunConfig, layout: Layout, steps: int, scratch: Path, made: bool, everything: bool
) -> int:
    """Collective. Runs both sides; rank 0 prints the report. The exit code, equal on every rank."""
    world = start_world(config.train, layout, said=dump_config(config))
    try:
        config, mine, whole = rows_of(config, world, made)
        folder = Path(world.broadcast_object(str(scratch)))
        taken = go(config, layout, world, mine, steps, folder)
        wrong = 0
        if world.rank == 0:
            found = against_plain(config, world.device, whole, steps, folder, taken)
            print(report(config, layout, steps, taken, *found, everything=everything))
            wrong = any(d.wrong for d in found[1]) or not agree(taken, found[0])
        return EXIT_OTHER if world.broadcast_object(wrong) else EXIT_DONE
    finally:
        world.shut_down()


Rows = Iterator[list[Batch]]


def rows_of(config: RunConfig, world: World, made: bool) -> tuple[RunConfig, Rows, Rows]:
    """The config with its vocabulary; each step's micro-batches of this rank, and of all ranks."""
    place, ranks = world.place.data, world.layout.data_parallel
    if not made and prepared(config):
        stream = world.agree(lambda: open_stream(config, world))
        config = with_vocabulary(config, stream)
        alone = open_batches(
            config.data,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            align=config.model.alignment,
            vocab_size=config.model.vocab_size,
            rows=config.train.rows,
        )
        mine, whole = ((b for b, _ in s.batches(s.start())) for s in (stream, alone))
        return config, mine, whole
    size = config.model.vocab_size or VOCABULARY * config.parallel.tensor
    model = config.model.model_copy(update={"vocab_size": size})
    config = config.model_copy(update={"model": model})

    def repeat(rank: int, of: int) -> Rows:
        number = 0
        while number := number + 1:
            yield made_batches(config, number, rank, of)

    return config, repeat(place, ranks), repeat(0, 1)


def go(
    config: RunConfig, layout: Layout, world: World, rows: Rows, steps: int, folder: Path
) -> list[Step]:
    """The layout's side; leaves the first gradient and the last weights in the folder, by unsharded
    name. Collective."""
    step, taken = TrainStep(config, layout, world), []
    gradients: list[Fragment] = []

    def keep(owned: dict[str, Fragment]) -> None:
        for f in owned.values():
            gradients.append(replace(f, tensors={"gradient": f.tensors["gradient"].clone()}))

    handle = step.optimizer.on_reduced_gradients(keep)
    for number in range(1, steps + 1):
        report = step(next(rows), number)
        taken.append(Step(report.loss, report.grad_norm))
        if number == 1:
            handle.remove()
            factor = max(1.0, (report.grad_norm + 1e-6) / config.optim.clip)  # unclipped again
            for f in gradients:
                f.tensors["gradient"].mul_(factor)
            dcp.save_tensors(folder / "gradient", gradients, {})
    weights = [
        replace(f, tensors={"weight": f.tensors["weight"]}) for f in step.optimizer.fragments()
    ]
    dcp.save_tensors(folder / "weight", weights, {})
    return taken


def against_plain(
    config: RunConfig,
    device: torch.device,
    rows: Rows,
    steps: int,
    folder: Path,
    taken: Sequence[Step],
) -> tuple[list[Step], list[Difference]]:
    """The plain side: its steps, and every parameter's difference, the worst first."""
    plain, shaken = PlainRun(config, device), PlainRun(config, device, ROUNDING)
    begin, began = plain.weights(), shaken.weights()
    expected: list[Step] = []
    first: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for number in range(1, steps + 1):
        batches = next(rows)
        step, gradients = plain.step(number, batches)
        _, others = shaken.step(number, batches)
        expected.append(step)
        if number == 1:
            first = gradients, others
    end, ended = plain.weights(), shaken.weights()
    saved = {what: dcp.read_metadata(folder / what) for what in ("gradient", "weight")}
    found = []
    for name in begin:
        gradient, moved = first[0][name], end[name] - begin[name]
        layout_gradient, layout_weight = (
            dcp.load_one(folder / what, f"{where}/{name}", saved[what]).to(device)
            for what, where in (("gradient", "optimizer/gradient"), ("weight", "model"))
        )
        found.append(
            Difference(
                name,
                _largest(layout_gradient - gradient, gradient),
                _length(layout_weight - end[name], moved),
                _largest(first[1][name] - gradient, gradient),
                _length((ended[name] - began[name]) - moved, moved),
            )
        )
    return expected, sorted(found, key=lambda d: d.size, reverse=True)


def _largest(difference: Tensor, of: Tensor) -> float:
    return float(difference.abs().max() / of.abs().max().clamp_min(1e-30))


def _length(difference: Tensor, of: Tensor) -> float:
    return float(difference.norm() / of.norm().clamp_min(1e-30))


def agree(taken: Sequence[Step], expected: Sequence[Step]) -> bool:
    """Whether losses and gradient norms are equal."""
    return all(
        math.isclose(a.loss, b.loss, rel_tol=LOSS)
        and math.isclose(a.grad_norm, b.grad_norm, rel_tol=LOSS)
        for a, b in zip(taken, expected, strict=True)
    )


def report(
    config: RunConfig,
    layout: Layout,
    steps: int,
    taken: Sequence[Step],
    expected: Sequence[Step],
    found: Sequence[Difference],
    *,
    everything: bool,
) -> str:
    """The tables, and the verdict."""
    m = config.model
    lines = [
        f"{layout.describe()} of {m.variant}, {m.blocks} blocks of width {m.width}, against one "
        f"plain process: {steps} steps of {config.train.global_batch} x "
        f"{config.data.sequence_length} tokens, float32",
        "",
        f"  {'step':>4} {'loss':>12} {'plain':>12} {'gradient norm':>14} {'plain':>12}",
    ]
    for number, (a, b) in enumerate(zip(taken, expected, strict=True), 1):
        lines.append(
            f"  {number:>4} {a.loss:>12.7f} {b.loss:>12.7f} "
            f"{a.grad_norm:>14.7f} {b.grad_norm:>12.7f}"
        )
    shown = found if everything else found[:10]
    wide = max(len(d.name) for d in shown)
    head = "".join(f" {what:>10}" for what in ("gradient", "rounding", "update", "rounding"))
    lines += ["", f"  {'parameter':<{wide}}{head}"]
    for d in shown:
        lines.append(
            f"  {d.name:<{wide}} {d.gradient:>10.1e} {d.rounding_gradient:>10.1e} "
            f"{d.update:>10.1e} {d.rounding_update:>10.1e}{'  DIFFERS' if d.wrong else ''}"
        )
    if len(found) > len(shown):
        lines.append(f"  and {len(found) - len(shown)} more, none larger (--all lists them)")
    wrong = [d.name for d in found if d.wrong]
    verdict = f"all {len(found)} parameters agree"
    if wrong:
        verdict = f"{len(wrong)} of {len(found)} parameters DIFFER, {wrong[0]} the most"
    elif not agree(taken, expected):
        verdict = "losses or gradient norms DIFFER, though all parameters agree"
    return "\n".join([*lines, "", verdict])
