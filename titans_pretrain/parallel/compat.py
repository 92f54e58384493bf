"""Narrow shims that let megatron-core 0.16 and DeepSpeed 0.19 run where there is no CUDA.

With CUDA each of them does nothing. A canary test says when an engine stops needing its shim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaLiteralToCpu(TorchFunctionMode):
    """Rewrites a literal `device="cuda"`, which Megatron's schedules hard-code."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def cuda_literals() -> AbstractContextManager[Any]:
    """Context for one call of a Megatron schedule."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CudaLiteralToCpu()


def skip_shared_memory_build() -> None:
    """Keeps DeepSpeed from compiling its CPU shared-memory collectives (minutes, at first use).

    They are an optional fast path beside gloo; nothing else reads this entry.
    """
    if torch.cuda.is_available():
        return
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
