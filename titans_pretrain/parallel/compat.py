"""Narrow shims around megatron-core 0.16, DeepSpeed 0.19 and torch's gloo: what lets them run where
there is no CUDA (with CUDA it does nothing), and what spares ranks work that nobody asked for.

A canary test says when an engine stops needing its shim.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d

from titans_pretrain.parallel.megatron import VocabParallelCrossEntropy, schedules

# DeepSpeed reads it when it is imported, and without it looks for a GPU and warns.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

Gloo: Any = distributed_c10d.ProcessGroupGloo  # torch's own


class _TorchOnCpu:
    """torch as Megatron's schedules see it, whose `device="cuda"` is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


@contextlib.contextmanager
def cuda_literals() -> Iterator[None]:
    """Context for one call of a Megatron schedule: where there is no CUDA, what Megatron allocates
    on it is on the CPU. What the schedule calls sees torch itself: a mode for all of torch's
    functions would cost them a sixth of a small model's step."""
    if torch.cuda.is_available():
        yield
        return
    before = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    schedules.torch = _TorchOnCpu()
    try:
        yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = before
        schedules.torch = torch


def share_gloo_devices() -> None:
    """For the process groups made from now on. torch gives each of them gloo devices of its own,
    whose threads look for news a hundred times a second; Megatron makes twenty groups a rank."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")  # read as torch does
    devices = (
        [Gloo.create_device(interface=name) for name in interfaces.split(",")]
        if interfaces
        else [Gloo.create_default_device()]
    )

    class Sharing(Gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = Gloo._Options()
            options._devices, options._timeout = devices, timeout
            options._threads = 2 * len(devices)  # as torch
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing  # type: ignore[misc]


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its CPU shared-memory collectives (minutes, at first use).

    They are an optional fast path beside gloo. Nothing else reads this table, which DeepSpeed makes
    at its first use: with one C compiler after the other, on each rank, to ask what it could build.
    """
    if torch.cuda.is_available():
        return
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def without_memory_tables() -> Iterator[None]:
    """While DeepSpeed's bf16 optimizer is made: it prints the memory in use ten times on rank 0,
    whatever the log level, and collects garbage before each (2 s, in which the others wait)."""
    from deepspeed.runtime import bf16_optimizer

    before = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda message, force=False: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = before


@contextlib.contextmanager
def wide_logits(dtype: torch.dtype) -> Iterator[None]:
    """Megatron's vocabulary-parallel cross entropy rounds logits to float32; float64 stays here."""
    if dtype != torch.float64:
        yield
        return
    before = VocabParallelCrossEntropy.calculate_logits_max

    def keep(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits, logits.max(dim=-1)[0]

    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(keep)
    try:
        yield
    finally:
        VocabParallelCrossEntropy.calculate_logits_max = staticmethod(before)
