"""What `titans-pretrain gpu-check` measures. Each section runs in a process of its own, which
appends one JSON line a case to a file; the judging is gpu_check.py's.

    python -m titans_pretrain.measure.gpu_check_cases '{"section": "steps", "cases": [...], ...}'
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from titans_pretrain.config import RunConfig, TrainConfig, parse_config
from titans_pretrain.measure.made import made_batches, timed
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.problems import (
    PROBLEMS,
    Problem,
    differences,
    memory_leaves,
    run_problem,
)
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.world import World, start_world
from titans_pretrain.run import checkpoint
from titans_pretrain.run.saver import Saver
from titans_pretrain.step import TrainStep

STEPS, HALF = 20, 3  # steps compared with the CPU; steps before a save, and after it


@dataclass(frozen=True)
class Task:
    """One section: which cases, where, how large."""

    section: str  # a key of MEASURES
    cases: list[str]
    device: str  # "cpu" or "cuda"
    dry: bool  # tiny sizes
    folder: str  # for checkpoints
    results: str  # file of JSON lines
    threads: int


def measure_memory(task: Task, case: str) -> dict[str, Any]:
    """Case "packed bf16": {"errors": by tensor}; case "machine": names and versions."""
    if case == "machine":
        return {"machine": machine(task.device)}
    name, _, precision = case.rpartition(" ")
    seed, bf16 = list(PROBLEMS).index(name), precision == "bf16"
    found = differences(PROBLEMS[name], task.device, bf16=bf16, tiny=task.dry, seed=seed)
    return {"errors": found}


# Training: one model small enough for a CPU, one that gives a device some work.
def run_config(task: Task, variant: str, precision: str, *, large: bool = False) -> RunConfig:
    if task.dry:
        sizes = {"blocks": 2, "width": 32, "heads": 2, "mlp_width": 48, "vocab_size": 61}
        length, batch, segment = 32, 8, 16
    elif large:
        sizes = {"blocks": 4, "width": 512, "heads": 8, "vocab_size": 8192}
        length, batch, segment = 2048, 8, 512
    else:
        sizes = {"blocks": 2, "width": 128, "heads": 4, "mlp_width": 256, "vocab_size": 509}
        length, batch, segment = 128, 8, 64
    tree = {
        "folder": "unused",
        "model": {
            "variant": variant,
            **sizes,
            "segment": segment,
            "persistent_tokens": 4,
            "memory": {"chunk": 8 if task.dry else 16},
        },
        "data": {"sources": {"made": {"path": "unused"}}, "sequence_length": length},
        "optim": {"lr": 3e-3, "warmup_steps": 4, "clip": 1.0},
        "train": {
            "steps": STEPS,
            "global_batch": batch,
            "micro_batch": batch // 2,
            "precision": precision,
            "device": task.device,
            "threads": task.threads,
        },
    }
    return parse_config(tree, "gpu-check")


@cache
def _world(device: str, threads: int) -> World:
    train = {"device": device, "threads": threads}
    return start_world(TrainConfig.model_validate(train), timeout_s=60)


def make_step(task: Task, config: RunConfig) -> tuple[World, TrainStep]:
    world = _world(task.device, task.threads)
    return world, TrainStep(config, plan_layout(config, world.size), world)


def train(config: RunConfig, step: TrainStep, first: int, last: int) -> dict[str, Any]:
    reports = [step(made_batches(config, s), s) for s in range(first, last + 1)]
    return {"losses": [r.loss for r in reports], "norms": [r.grad_norm for r in reports]}


def measure_steps(task: Task, case: str) -> dict[str, Any]:
    """Case "mac bf16": losses (nats a label) and gradient norms of STEPS steps."""
    config = run_config(task, *case.split())
    _, step = make_step(task, config)
    return train(config, step, 1, STEPS)


def measure_run(task: Task, case: str) -> dict[str, Any]:
    """Case "straight mac bf16": twice HALF steps, saved after each; "again": the same anew;
    "resumed": HALF steps from straight's first save. "content": sha256 of the state at the end.

    Under "straight/deterministic" etc. torch is asked for deterministic algorithms.
    """
    kind, variant, precision = case.split()
    kind, _, mode = kind.partition("/")
    config = run_config(task, variant, precision)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(bool(mode), warn_only=True)
        world, step = make_step(task, config)
        folder = Path(task.folder) / f"{mode or 'default'}-{variant}-{precision}"
        first = 1
        if kind == "resumed":
            found = checkpoint.Found(
                checkpoint.folder_of(folder / "straight", HALF),
                checkpoint.verify(checkpoint.folder_of(folder / "straight", HALF), world),
            )
            rng = {"rng/cpu": torch.get_rng_state()}
            fragments = step.optimizer.fragments()
            checkpoint.load(found, config.model.model_dump(mode="json"), fragments, rng)
            torch.set_rng_state(rng["rng/cpu"])
            step.optimizer.weights_loaded(HALF)
            first = HALF + 1
        done: dict[str, Any] = {"losses": [], "norms": []}
        while first <= 2 * HALF:
            last = HALF if first == 1 else 2 * HALF
            for what, values in train(config, step, first, last).items():
                done[what] += values
            path = save(folder / kind, config, world, step, last)
            first = last + 1
        torch.use_deterministic_algorithms(False)
    ops = sorted({str(w.message).split(" does not")[0] for w in told if "determinis" in str(w)})
    return {**done, "content": checkpoint.content_sha256(path), "not_deterministic": ops}


def save(folder: Path, config: RunConfig, world: World, step: TrainStep, done: int) -> Path:
    state = {"step": done, "life": 1, "data": {"next_step": done + 1}}
    state["config"] = config.model_dump(mode="json")
    rng = {"rng/cpu": torch.get_rng_state()}
    saver = Saver(folder, config.checkpoint, world, lambda: None, lambda saved: None)
    saver.save(state, step.optimizer.fragments(), rng)
    saver.wait()
    return checkpoint.folder_of(folder, done)


def measure_speed(task: Task, case: str) -> dict[str, Any]:
    """Case "mac bf16": whole training steps; "memory C=16 bf16": forward and backward of one."""
    gc.collect()  # the case before
    before = torch.cuda.memory_allocated() if task.device == "cuda" else 0
    found = (memory_speed if case.startswith("memory") else step_speed)(task, case)
    if found["peak_bytes"] is not None:
        found["peak_bytes"] -= before
    return found


def step_speed(task: Task, case: str) -> dict[str, Any]:
    config = run_config(task, *case.split(), large=True)
    _, step = make_step(task, config)
    batches, count = made_batches(config, 1), 1 if task.dry else 5
    tokens = config.train.global_batch * config.data.sequence_length
    done = iter(range(1, STEPS))
    seconds, peak = timed(lambda: step(batches, next(done)), task.device, count)
    m, parameters = config.model, sum(p.numel() for p in step.model.parameters())
    size = f"{parameters / 1e6:.1f}M parameters, {m.blocks} x {m.width}, "
    size += f"{config.train.global_batch} x {config.data.sequence_length} tokens a step"
    return {"tokens_per_s": tokens / seconds, "seconds": seconds, "peak_bytes": peak, "size": size}


def memory_speed(task: Task, case: str) -> dict[str, Any]:
    chunk, precision = int(case.split("=")[1].split()[0]), case.split()[-1]
    rows, heads, tokens, width = (1, 2, 128, 8) if task.dry else (4, 8, 2048, 64)
    p = Problem(rows, heads, tokens, width, MemorySpec(chunk=chunk))
    leaves = {n: x.to(task.device, torch.float32) for n, x in memory_leaves(p, 0).items()}
    if precision == "bf16":
        leaves |= {n: leaves[n].bfloat16() for n in "qkv"}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def run() -> None:
        y, _ = run_problem(chunked_memory, p, leaves, None)
        if torch.is_grad_enabled():
            torch.autograd.grad(y.float().square().sum(), list(leaves.values()))

    count = 1 if task.dry else 5
    with torch.no_grad():
        forward, _ = timed(run, task.device, count)
    both, peak = timed(run, task.device, count)
    size = f"{rows} x {tokens} tokens, {heads} heads of {width}; forward alone {forward:.4f} s"
    speed = {"tokens_per_s": rows * tokens / both, "forward_seconds": forward}
    return {**speed, "seconds": both, "peak_bytes": peak, "size": size}


def machine(device: str) -> dict[str, Any]:
    """Names and versions, as strings."""
    out = {"device": "CPU (no GPU was used)", "cpu cores": str(os.cpu_count())}
    out |= {"system": platform.platform(), "python": platform.python_version()}
    names = ("torch", "deepspeed", "megatron-core", "numpy", "titans-pretrain")
    out |= {name: version(name) for name in names}
    out["CUDA of torch"] = str(torch.version.cuda)
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        out["device"] = gpu.name
        out["device memory"] = f"{gpu.total_memory / 2**30:.1f} GiB"
        out["compute capability"] = f"{gpu.major}.{gpu.minor}"
        out["driver"] = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        out["cuDNN"] = str(torch.backends.cudnn.version())
        out["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    on = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    out["TF32"] = f"{'on' if on else 'off'} (this check turns it off)"
    return out


def _says(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"unknown ({command[0]} not found)"
    out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (out.stdout.strip() or out.stderr.strip() or "unknown").splitlines()[0]


MEASURES: dict[str, Callable[[Task, str], dict[str, Any]]] = {
    "memory": measure_memory,
    "steps": measure_steps,
    "run": measure_run,
    "speed": measure_speed,
}


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    torch.set_num_threads(task.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with Path(task.results).open("a", encoding="utf-8") as out:
        for case in task.cases:
            began = time.perf_counter()
            result = MEASURES[task.section](task, case)
            line = {"case": case, "took_s": round(time.perf_counter() - began, 2), **result}
            out.write(json.dumps(line) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
