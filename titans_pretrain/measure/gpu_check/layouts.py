"""A small model over all ranks, divided in one way: its steps beside those of one process."""

from __future__ import annotations

from typing import Any

from titans_pretrain.measure.gpu_check.child import Task
from titans_pretrain.measure.gpu_check.small import run_config
from titans_pretrain.measure.made import made_batches
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.world import start_world
from titans_pretrain.step import TrainStep

STEPS = 6


def layout(task: Task, part: str) -> dict[str, Any]:
    """Part "tensor": losses and gradient norms of mac in fp32, its layers over two ranks each;
    data parallelism takes the rest. Collective."""
    divided = {"zero": {"stage": 1}} if part == "data" else {part: 2}
    config = run_config(task, "mac", "fp32", **divided)
    layout = plan_layout(config, task.ranks)
    world = start_world(config.train, layout, timeout_s=60)
    try:
        step = TrainStep(config, layout, world)
        place = world.place.data
        reports = [
            step(made_batches(config, number, place, layout.data_parallel), number)
            for number in range(1, STEPS + 1)
        ]
    finally:
        world.shut_down()
    said = {"losses": [r.loss for r in reports], "norms": [r.grad_norm for r in reports]}
    return {**said, "ranks": task.ranks, "layout": layout.describe()}
