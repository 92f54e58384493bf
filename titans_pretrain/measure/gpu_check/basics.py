"""What the check measures with torch alone: the machine, matrix products, the memory against its
oracle, and the collectives of its GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_pretrain.measure.gpu_check.child import Task
from titans_pretrain.measure.made import DTYPES, matmul_rate, timed
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.problems import (
    PROBLEMS,
    Problem,
    differences,
    memory_leaves,
    run_problem,
)
from titans_pretrain.memory.rules import MemorySpec

PACKAGES = ("numpy", "pydantic", "PyYAML", "deepspeed", "megatron-core", "triton")


def machine(task: Task, part: str) -> dict[str, Any]:
    """{"machine": names and versions, as strings}."""
    out = {"device": "CPU (no GPU was used)", "CPU cores": str(os.cpu_count())}
    out |= {"system": platform.platform(), "Python": platform.python_version()}
    out |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
    if task.cuda:
        gpu = torch.cuda.get_device_properties(0)
        out["device"] = gpu.name
        out["devices"] = str(torch.cuda.device_count())
        out["device memory"] = f"{gpu.total_memory / 2**30:.1f} GiB"
        out["compute capability"] = f"{gpu.major}.{gpu.minor}"
        out["driver"] = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        out["cuDNN"] = str(torch.backends.cudnn.version())
        out["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {"machine": out | {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _says(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return f"unknown ({command[0]} not found)"
    out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (out.stdout.strip() or out.stderr.strip() or "unknown").splitlines()[0]


# Dense tensor-core FLOP/s in bf16, by NVIDIA's data sheets; the first name that fits.
PEAKS = {
    r"B200": 2250e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"GH200|H200|H100|H800": 989e12,
    r"A100|A800": 312e12,
    r"L40S": 362e12,
    r"A40\b": 150e12,
    r"A30\b": 165e12,
    r"A10\b": 125e12,
    r"L4\b": 121e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}


def matmul(task: Task, part: str) -> dict[str, Any]:
    """Parts fp32 (TF32 off), bf16: FLOP/s of a matrix product; the device's peak, if known; and
    how far a product of integers is from the exact one."""
    device = torch.device(task.device)
    a = torch.arange(-32, 32, device=device, dtype=DTYPES[part]).repeat(64, 1)
    exact = (a.double().cpu() @ a.double().cpu().T).abs().max().item()
    found: dict[str, Any] = {"wrong": abs((a @ a.T).abs().max().item() / exact - 1)}
    found["flop_per_s"] = matmul_rate(device, DTYPES[part])
    found["peak_flop_per_s"] = None
    if task.cuda and part == "bf16":
        name = torch.cuda.get_device_name(0)
        found["peak_flop_per_s"] = next((p for n, p in PEAKS.items() if re.search(n, name)), None)
    return found


def memory(task: Task, part: str) -> dict[str, Any]:
    """Parts fp32, bf16: {"errors": {problem: by tensor}} of the chunked memory on the device."""
    _exact()
    errors = {
        name: differences(p, task.device, bf16=part == "bf16", tiny=task.dry, seed=seed)
        for seed, (name, p) in enumerate(PROBLEMS.items())
    }
    return {"errors": errors}


def _exact() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def memory_speed(task: Task, part: str) -> dict[str, Any]:
    """Part "C=16 bf16": forward and backward of one memory, chunks of 16 tokens."""
    chunk, precision = int(part.split("=")[1].split()[0]), part.split()[-1]
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
    size = f"{rows} x {tokens} tokens, {heads} heads of {width}"
    return {
        "tokens_per_s": rows * tokens / both,
        "forward_s": forward,
        "both_s": both,
        "peak_bytes": peak,
        "size": size,
    }


@cache
def _join(device: str) -> tuple[int, int]:
    """(rank, ranks) of a process group over all GPUs, or of gloo processes; of one, alone."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.HashStore() if size == 1 else None
    backend = "nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=40)
    dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=limit)
    return rank, size


def collective(task: Task, part: str) -> dict[str, Any]:
    """Part "all_reduce": whether its result is the exact one on every rank, for a small and a
    large tensor, and its time. "send": round the ranks, where there are several."""
    rank, size = _join(task.device)
    if part == "send" and size == 1:
        return {"skipped": "one rank has nobody to send to"}
    device = torch.device(task.device, rank) if task.cuda else torch.device("cpu")
    counts = (size * 3, (1 << 10 if task.dry else 1 << 24) // size * size)
    wrong = 0.0
    for count in counts:
        x = torch.arange(count, device=device, dtype=torch.float32) % 251 + rank
        got, want = _CALLS[part](x, rank, size)
        wrong = max(wrong, float((got - want).abs().max()))
    told = torch.tensor([wrong], device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    seconds, _ = timed(lambda: _CALLS[part](x, rank, size), task.device, 2 if task.dry else 5)
    return {"wrong": float(told), "ranks": size, "bytes": x.nbytes, "each_s": seconds}


def _base(x: Tensor, rank: int) -> Tensor:
    return x - rank  # what every rank's tensor is but for its number


def _all_reduce(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got = x.clone()
    dist.all_reduce(got)
    return got, size * _base(x, rank) + size * (size - 1) / 2


def _all_gather(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got = x.new_empty(size * x.numel())
    dist.all_gather_into_tensor(got, x)
    return got, torch.cat([_base(x, rank) + r for r in range(size)])


def _reduce_scatter(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got = x.new_empty(x.numel() // size)
    dist.reduce_scatter_tensor(got, x)
    return got, (size * _base(x, rank) + size * (size - 1) / 2).chunk(size)[rank]


def _broadcast(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got = x.clone()
    dist.broadcast(got, src=0)
    return got, _base(x, rank)


def _all_to_all(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got = torch.empty_like(x)
    dist.all_to_all_single(got, x)
    mine = _base(x, rank).chunk(size)[rank]
    return got, torch.cat([mine + r for r in range(size)])


def _send(x: Tensor, rank: int, size: int) -> tuple[Tensor, Tensor]:
    got, before = torch.empty_like(x), (rank - 1) % size
    both = [
        dist.P2POp(dist.isend, x, (rank + 1) % size),
        dist.P2POp(dist.irecv, got, before),
    ]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    return got, _base(x, rank) + before


_CALLS: dict[str, Callable[[Tensor, int, int], tuple[Tensor, Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "send": _send,
}
