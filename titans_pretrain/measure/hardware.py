"""`titans-pretrain plan --measure FILE`: times this machine and writes its hardware file.

With CUDA a rank is a GPU; without, it is an equal share of the machine's cores, and its memory an
equal share of the host's. What one machine cannot show, such as a network, is said so in the file.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from titans_pretrain.config import HardwareConfig, ModelConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.measure.made import DTYPES, matmul_rate, timed
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.model.counts import flops_per_token

CPU_RANKS = 2
GIB = 2**30
# A layer as the 170M has it; on a CPU a small one, which takes seconds.
SIZES = {"cuda": (8, 2048, 768, 16), "cpu": (2, 256, 256, 4)}  # rows, tokens, width, heads

Told = dict[str, Any]  # a figure: value, source


def write_hardware(path: Path) -> None:
    """Measures, prints and writes. Raises ConfigError if `path` cannot be written."""
    tree: dict[str, Any] = {}
    for key, figure in measured():
        tree[key] = figure
        told = figure if isinstance(figure, str | int) else f"{figure['value']:.6g}"
        print(f"{key:<20} {told}", flush=True)
    text = yaml.safe_dump(HardwareConfig.model_validate(tree).model_dump(), sort_keys=False)
    try:
        path.write_text(f"# Measured by titans-pretrain plan --measure\n{text}", encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"--measure {path}: {e.strerror}", "the figures go there", "give another file"
        ) from e
    print(f"written: {path}")


def measured() -> Iterator[tuple[str, Any]]:
    """(key of the hardware file, its value), one after the other as they are known."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    ranks = torch.cuda.device_count() if cuda else CPU_RANKS
    if not cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    yield "name", torch.cuda.get_device_name() if cuda else f"CPU of {_cpu()}, a share of 1/{ranks}"
    yield "gpus_per_node", ranks
    memory = torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total / ranks
    yield "memory_gib", _told(memory / GIB, "as the system reports it")
    reserved = 3.0 if cuda else 0.5
    yield (
        "reserved_gib",
        _told(reserved, "assumed: CUDA and NCCL" if cuda else "assumed: libraries"),
    )
    rates = {name: matmul_rate(device, dtype) for name, dtype in DTYPES.items()}
    for name, rate in rates.items():
        yield f"{name}_tflops", _told(rate / 1e12, "measured: a large square matrix product")
    yield "memory_gb_per_s", _told(_copy(device) / 1e9, "measured: a copy, read and written")
    bus, latency = _all_reduce(ranks, cuda)
    yield "node_gb_per_s", _told(bus / 1e9, f"measured: all-reduce of {ranks} ranks, bus bandwidth")
    yield "network_gb_per_s", _told(bus / 1e9, "not measured (one machine): as inside it")
    host = _to_host(device) if cuda else _copy(device) / 2
    yield "host_gb_per_s", _told(host / 1e9, "measured: a copy to pinned host memory" if cuda else
                                 "measured: a copy in memory")  # fmt: skip
    yield "node_latency_us", _told(latency * 1e6, f"measured: all-reduce of 4 bytes, {ranks} ranks")
    yield "network_latency_us", _told(latency * 1e6, "not measured (one machine): as inside it")
    yield "launch_us", _told(_launch(device) * 1e6, "measured: sums of two small tensors in a row")
    kind = "bf16" if cuda else "fp32"
    for name, share in _shares(device, DTYPES[kind]):
        source = f"measured: in {kind}, forward, over {kind}_tflops"
        yield name, _told(min(1.0, share / rates[kind]), source)
    yield "links", _told(1.0, "the rates above are measured ones")


def _told(value: float, source: str) -> Told:
    return {"value": float(f"{value:.4g}"), "source": source}


def _cpu() -> str:
    return f"{platform.machine()} with {os.cpu_count()} cores"


def _copy(device: torch.device) -> float:
    """Bytes read and written a second."""
    a = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    seconds, _ = timed(lambda: a.copy_(b), device.type, 10)
    return 2 * a.nbytes / seconds


def _to_host(device: torch.device) -> float:
    a = torch.empty(2**28, dtype=torch.uint8, device=device)
    b = torch.empty(a.shape, dtype=a.dtype, pin_memory=True)
    seconds, _ = timed(lambda: b.copy_(a), device.type, 5)
    return a.nbytes / seconds


def _launch(device: torch.device) -> float:
    """Seconds that the host takes for one operation."""
    a, count = torch.ones(16, device=device), 2000
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(count):
            torch.add(a, a)
        took = (time.perf_counter() - began) / count
        if device.type == "cuda":
            torch.cuda.synchronize()
    return took


def _shares(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(part, FLOP/s in it) of a layer's matrix products, its attention, its memory."""
    rows, tokens, width, heads = SIZES[device.type]
    x = torch.randn(rows, tokens, width, device=device, dtype=dtype)
    weight = torch.randn(width * 8 // 3, width, device=device, dtype=dtype)

    def rate(act: Callable[[], Any], flops: float) -> float:
        with torch.no_grad():
            return flops / timed(act, device.type, 5)[0]

    yield "matmul", rate(lambda: F.linear(x, weight), 2.0 * rows * tokens * weight.numel())
    q = x.view(rows, tokens, heads, width // heads).transpose(1, 2)
    mask = torch.ones(tokens, tokens, device=device, dtype=torch.bool).tril()
    yield (
        "attention",
        rate(
            lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
            4.0 * rows * tokens * tokens * width,
        ),
    )
    spec, d = MemorySpec(), width // heads
    weights = tuple(torch.randn(heads, *s, device=device) / d**0.5 for s in spec.shapes(d))
    theta, alpha, eta = (
        torch.full((rows, heads, tokens, spec.depth), g, device=device) for g in (0.01, 0.01, 0.9)
    )
    norm = (torch.ones(heads, d, device=device), torch.zeros(heads, d, device=device))
    k = F.normalize(q.float(), dim=-1)
    model = ModelConfig(variant="lmm", blocks=1, width=width, heads=heads)
    flops = rows * tokens * flops_per_token(model, tokens)["memory"]
    act = partial(chunked_memory, k, k, k, theta, alpha, eta, weights, norm, spec)
    yield "memory", rate(act, flops)


def _all_reduce(ranks: int, cuda: bool) -> tuple[float, float]:
    """(bytes a second on each rank's link, as nccl-tests counts; seconds of a small one)."""
    if ranks == 1:  # nobody to talk to: memory's own rate
        return _copy(torch.device("cuda" if cuda else "cpu")), 1e-6
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (ranks, cuda, port, answers), nprocs=ranks)
    bus, latency = answers.get()
    return bus, latency


def _rank(rank: int, ranks: int, cuda: bool, port: int, answers: Any) -> None:
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
    large = torch.zeros(2**26 if cuda else 2**22, device=device)
    small = torch.zeros(1, device=device)
    kind = device.type
    seconds, _ = timed(lambda: dist.all_reduce(large), kind, 10)
    latency, _ = timed(lambda: dist.all_reduce(small), kind, 50)
    if rank == 0:
        answers.put((2 * (ranks - 1) / ranks * large.nbytes / seconds, latency))
    dist.destroy_process_group()
