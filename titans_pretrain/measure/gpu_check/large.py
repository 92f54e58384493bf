"""Training steps of the paper's sizes: how fast, and in how much memory."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titans_pretrain.config import RunConfig, load_config
from titans_pretrain.estimate.beside import planned
from titans_pretrain.estimate.hardware import like
from titans_pretrain.measure.footprint import held_bytes, working_bytes
from titans_pretrain.measure.gpu_check.child import Task
from titans_pretrain.measure.gpu_check.plain import PlainStep
from titans_pretrain.measure.gpu_check.plan import ZERO
from titans_pretrain.measure.made import made_batches
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.model.counts import flops_per_token, parameter_count

if TYPE_CHECKING:
    from titans_pretrain.parallel.world import World

WARM_UP, TIMED = 2, 3
# Bytes a parameter beside activations: bf16 weight, fp32 gradient, master and two moments, and the
# buffers of a reduction.
HELD_BYTES = 24
CONFIGS = Path(__file__).parents[3] / "configs"
DRY_ROWS = 2
TINY = {
    "model.heads": 2,
    "model.width": 32,
    "model.mlp_width": 48,
    "model.vocab_size": 61,
    "model.segment": 16,
    "model.persistent_tokens": 4,
    "model.memory.chunk": 8,
    "data.sequence_length": 32,
}


def train(task: Task, part: str) -> dict[str, Any]:
    """Part "170m mac": a step's seconds, losses, bytes; {"skipped": why} if it does not fit."""
    size, variant = part.split()
    return _measure(task, size, variant, {"stage": 1})


def zero(task: Task, part: str) -> dict[str, Any]:
    """Part "stage 3, offload": likewise of 170m mac over all ranks. Collective."""
    return _measure(task, "170m", "mac", ZERO[part])


def large_config(
    task: Task, size: str, variant: str, zero: dict[str, Any], rows: int | None = None
) -> RunConfig:
    """The config of that size as it is trained, one micro-batch of `rows` a step on each rank, with
    a rate at which a repeated batch is learned at once."""
    path = CONFIGS / f"titans-{size}.yaml"
    given = load_config(path)
    rows = rows or (DRY_ROWS if task.dry else given.train.micro_batch)
    tiny = {**TINY, "model.blocks": 2 if size == "170m" else 3} if task.dry else {}
    overrides = {
        **tiny,
        "model.variant": variant,
        "optim.lr": 3e-4,
        "optim.min_lr": 0.0,
        "optim.warmup_steps": 0,
        "train.micro_batch": rows,
        "train.global_batch": rows * task.ranks,
        "train.device": task.device,
        "train.threads": task.threads,
        "parallel.zero.stage": zero["stage"],
        "parallel.zero.offload": str(zero.get("offload", False)).lower(),
    }
    return load_config(path, [f"{k}={v}" for k, v in overrides.items()])


def _measure(task: Task, size: str, variant: str, zero: dict[str, Any]) -> dict[str, Any]:
    let_go(task)
    config = large_config(task, size, variant, zero)
    world = _world(task, config) if task.engines else None
    free = _free_bytes(task, world)
    needed = needed_bytes(config)
    while needed > free and config.train.micro_batch > 1:
        config = large_config(task, size, variant, zero, rows=config.train.micro_batch // 2)
        needed = needed_bytes(config)
    if needed > free:
        why = f"it needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return {"skipped": f"{why} (one row of {config.data.sequence_length} tokens)"}
    began = time.perf_counter()
    step, held, close = _build(task, config, world)
    built_s = time.perf_counter() - began
    found = _describe(task, config, needed, built_s) | _steps(task, step, held)
    close()
    hardware = like(torch.cuda.get_device_name()) if task.cuda else None
    if hardware is not None and task.engines:
        found["plan"] = planned(config, task.ranks, hardware)
    return found


def let_go(task: Task) -> None:
    """Frees what the part before held: cycles of objects, some of which torch's own hold together,
    so that they fall apart one after another; and torch keeps what is freed."""
    while gc.collect():
        pass
    if task.cuda:
        torch.cuda.empty_cache()


def _free_bytes(task: Task, world: World | None) -> float:
    """Of the device that has least: all ranks decide alike. Collective."""
    if not task.cuda:
        return math.inf
    free = float(torch.cuda.mem_get_info()[0])
    return free if world is None else -world.max([-free])[0]


def needed_bytes(config: RunConfig) -> int:
    """Peak bytes on a device, predicted: what is held, and what a micro-batch makes."""
    parameters = sum(parameter_count(config.model).values())
    return HELD_BYTES * parameters + working_bytes(config)


_worlds: list[World] = []


def _world(task: Task, config: RunConfig) -> World:
    """The world of this process: data parallel alone in each part, so that one serves all."""
    from titans_pretrain.parallel.layout import plan_layout
    from titans_pretrain.parallel.world import start_world

    if not _worlds:
        _worlds.append(start_world(config.train, plan_layout(config, task.ranks), timeout_s=90))
    return _worlds[0]


Step = Callable[[int], tuple[float, float]]  # number -> loss, gradient norm


def _build(
    task: Task, config: RunConfig, world: World | None
) -> tuple[Step, Callable[[], dict[str, int]], Callable[[], None]]:
    """(a step on the same rows each time, the bytes held by kind, what lets go of them)."""
    if world is None:
        plain = PlainStep(config, torch.device(task.device))
        rows = made_batches(config, 1)
        return (lambda number: plain(rows, number)), plain.held_bytes, lambda: None
    from titans_pretrain.parallel.layout import plan_layout
    from titans_pretrain.step import TrainStep

    layout = plan_layout(config, task.ranks)
    step = TrainStep(config, layout, world)
    batches = made_batches(config, 1, world.place.data, layout.data_parallel)

    def go(number: int) -> tuple[float, float]:
        report = step(batches, number)
        return report.loss, report.grad_norm

    return go, lambda: held_bytes(step), step.optimizer.engine.destroy


def _describe(task: Task, config: RunConfig, needed: int, built_s: float) -> dict[str, Any]:
    length = config.data.sequence_length
    return {
        "plain": not task.engines,
        "ranks": task.ranks,
        "parameters": sum(parameter_count(config.model).values()),
        "rows": config.train.micro_batch,
        "tokens": config.train.global_batch * length,
        "flops": 3 * config.train.global_batch * length * _forward_flops(config),
        "recompute": config.train.recompute,
        "predicted_bytes": needed,
        "built_s": round(built_s, 2),
    }


def _forward_flops(config: RunConfig) -> float:
    return sum(flops_per_token(config.model, config.data.sequence_length).values())


def _steps(task: Task, step: Step, held: Callable[[], dict[str, int]]) -> dict[str, Any]:
    wait = torch.cuda.synchronize if task.cuda else lambda: None
    done, seconds = [], []
    for number in range(1, WARM_UP + TIMED + 1):
        if number == WARM_UP + 1 and task.cuda:
            torch.cuda.reset_peak_memory_stats()
        wait()
        began = time.perf_counter()
        done.append(step(number))
        wait()
        seconds.append(time.perf_counter() - began)
    kinds = held()
    if task.cuda:
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
    else:  # counted, in one more step
        with LiveBytes() as live:
            done.append(step(WARM_UP + TIMED + 1))
        peak, reserved = sum(kinds.values()) + live.peak, None
    losses, norms = ([values[i] for values in done] for i in range(2))
    finite = all(math.isfinite(x) for x in (*losses, *norms))
    return {
        "seconds": seconds[WARM_UP:],
        "warm_up_s": seconds[:WARM_UP],
        "losses": losses if finite else [str(x) for x in losses],
        "norms": norms if finite else [str(x) for x in norms],
        "finite": finite,
        "held_bytes": kinds,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
    }
