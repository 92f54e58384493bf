"""Training steps of a model small enough for a CPU: the device's beside the CPU's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from titans_pretrain.config import RunConfig, TrainConfig, parse_config
from titans_pretrain.measure.gpu_check.child import Task
from titans_pretrain.measure.gpu_check.plain import PlainStep
from titans_pretrain.measure.made import made_batches

if TYPE_CHECKING:
    from titans_pretrain.parallel.world import World
    from titans_pretrain.step import TrainStep

STEPS = {False: 20, True: 6}  # compared with the CPU; in a dry run


def run_config(task: Task, variant: str, precision: str, **parallel: Any) -> RunConfig:
    if task.dry:
        sizes = {"blocks": 2, "width": 32, "heads": 2, "mlp_width": 48, "vocab_size": 62}
        length, segment, chunk = 32, 16, 8
    else:
        sizes = {"blocks": 2, "width": 128, "heads": 4, "mlp_width": 256, "vocab_size": 510}
        length, segment, chunk = 128, 64, 16
    tree = {
        "folder": "unused",
        "model": {
            "variant": variant,
            **sizes,
            "segment": segment,
            "persistent_tokens": 4,
            "memory": {"chunk": chunk},
        },
        "data": {"sources": {"made": {"path": "unused"}}, "sequence_length": length},
        "optim": {"lr": 3e-3, "warmup_steps": 4, "clip": 1.0},
        "train": {
            "steps": STEPS[False],
            "global_batch": 8,
            "micro_batch": 1 if parallel else 4,
            "precision": precision,
            "device": task.device,
            "threads": task.threads,
        },
        "parallel": parallel,
        "checkpoint": {"keep_last": 99},
    }
    return parse_config(tree, "gpu-check")


@cache
def world_of_one(device: str, threads: int) -> World:
    from titans_pretrain.parallel.world import start_world

    train = {"device": device, "threads": threads}
    return start_world(TrainConfig.model_validate(train), timeout_s=60)


def make_step(task: Task, config: RunConfig) -> tuple[World, TrainStep]:
    """Of one rank, through Megatron's schedule and DeepSpeed's ZeRO stage 1."""
    from titans_pretrain.parallel.layout import plan_layout
    from titans_pretrain.step import TrainStep

    world = world_of_one(task.device, task.threads)
    return world, TrainStep(config, plan_layout(config, world.size), world)


def train(step: Any, config: RunConfig, first: int, last: int) -> dict[str, list[float]]:
    """Losses (nats a label) and gradient norms of steps `first` to `last`, on rows that each number
    has of its own. `step`: a TrainStep, or a PlainStep."""
    done: dict[str, list[float]] = {"losses": [], "norms": []}
    for number in range(first, last + 1):
        report = step(made_batches(config, number), number)
        plain = isinstance(report, tuple)
        loss, norm = report if plain else (report.loss, report.grad_norm)
        done["losses"].append(loss)
        done["norms"].append(norm)
    return done


def steps(task: Task, part: str) -> dict[str, Any]:
    """Part "mac bf16": losses and gradient norms of the STEPS."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = run_config(task, *part.split())
    if not task.engines:
        return train(PlainStep(config, torch.device(task.device)), config, 1, STEPS[task.dry]) | {
            "plain": True
        }
    _, step = make_step(task, config)
    return train(step, config, 1, STEPS[task.dry])
