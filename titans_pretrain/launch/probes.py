"""What the preflight measures on one node, on one device, and over the network.

Each function runs in a process of its own, which is killed where it takes too long, and returns
plain numbers; nothing here judges them. Rates: GB and MB are 10^9 and 10^6 bytes, FLOP 2 n^3 of a
product.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "deepspeed", "megatron-core", "numpy")
_CHUNK, _CHUNKS, _WRITING = 4 << 20, 16, 2.0  # bytes; of them; seconds after which it is enough
_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}  # of an all-reduce
_REPEATS = 5
_WIDTH = {"cuda": 8192, "cpu": 512}  # of a matrix
_MULTIPLYING = 0.4  # seconds


def disk(folder: Path) -> dict[str, Any]:
    """Room, and the rate at which one file is written, down to the disk. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"speed.{os.environ.get('RANK', 0)}"
    free = shutil.disk_usage(folder).free
    block, began, written = os.urandom(_CHUNK), time.perf_counter(), 0
    try:
        with path.open("wb", buffering=0) as file:
            while written < _CHUNK * _CHUNKS and time.perf_counter() - began < _WRITING:
                written += file.write(block)
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    rate = written / (time.perf_counter() - began)
    return {"path": str(folder), "free_gb": free / 1e9, "mb_per_s": rate / 1e6}


def code() -> str:
    """sha256 (its beginning) of the package's modules as they are imported here."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def machine(device: str) -> dict[str, Any]:
    """GPUs (0 where `device`, of the config, is cpu), their driver and errors, versions."""
    import torch

    found: dict[str, Any] = {"gpus": 0, "versions": {"python": platform.python_version()}}
    versions = found["versions"] | {name: version(name) for name in LIBRARIES}
    if device != "cpu" and torch.cuda.is_available():
        found["gpus"] = torch.cuda.device_count()
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        asked = _nvidia_smi("driver_version", "ecc.errors.uncorrected.volatile.total")
        if asked:
            versions["driver"] = asked[0][0]
            found["ecc"] = [int(ecc) if ecc.isdigit() else 0 for _, ecc in asked]
    found["versions"] = versions
    return found


def _nvidia_smi(*what: str) -> list[list[str]]:
    """A row a GPU; nothing where there is no nvidia-smi, or it does not know."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(what)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []


def matmul(cuda: bool, local_rank: int) -> dict[str, Any]:
    """The rate of a square matrix product: bf16 on a GPU, by the clock; fp32 on one thread of a
    CPU, by processor time, so that others on the same cores do not count."""
    import torch

    found: dict[str, Any] = {}
    if cuda:
        device, dtype, n = torch.device("cuda", local_rank), torch.bfloat16, _WIDTH["cuda"]
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info()
        found["free_of_total"] = free / total
    else:
        device, dtype, n = torch.device("cpu"), torch.float32, _WIDTH["cpu"]
        torch.set_num_threads(1)
    a = torch.ones(n, n, device=device, dtype=dtype)
    found["wrong"] = int((torch.mm(a, a) != n).sum())
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if cuda else (_nothing, _busy)
    for _ in range(3):
        out = torch.mm(a, b)
    wait()
    began, count = clock(), 0
    while clock() - began < _MULTIPLYING:
        for _ in range(10):
            torch.mm(a, b, out=out)
        wait()
        count += 10
    found["tflops"] = 2.0 * n**3 * count / (clock() - began) / 1e12
    return found


def _nothing() -> None:
    return None


def _busy() -> float:
    return time.thread_time()


def all_reduce(
    master: tuple[str, int],
    name: str,
    ranks: Sequence[int],
    rank: int,
    local_rank: int,
    cuda: bool,
    seconds: float,
) -> dict[str, Any]:
    """Bus bandwidth (as nccl-tests define it) of an all-reduce over `ranks`, which meet at the
    store of `master` under `name`. Raises RuntimeError where a rank does not answer within
    `seconds`, or a sum is wrong."""
    import torch
    import torch.distributed as dist

    kind, limit, size = "cuda" if cuda else "cpu", timedelta(seconds=seconds), len(ranks)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    host, port = master
    if host == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore(name, store),
        rank=ranks.index(rank),
        world_size=size,
        timeout=limit,
    )
    x = torch.full((_BYTES[kind] // 4,), float(rank + 1), device=device)
    dist.all_reduce(x)  # builds the connections; exact: whole numbers
    wrong = int((x != sum(ranks) + size).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {x.numel()} sums are wrong on rank {rank}")
    wait = torch.cuda.synchronize if cuda else _nothing
    wait()
    began = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(x.fill_(1.0))
    wait()
    each = (time.perf_counter() - began) / _REPEATS
    return {"gb_per_s": 2 * (size - 1) / size * x.nbytes / each / 1e9 if size > 1 else 0.0}
