"""All that this stack takes of megatron-core.

Imported here, and nowhere else, because of how: Megatron decorates its fused layers, none of which
is used here, with torch.compile, which imports all of torch's compiler. Each rank of each start
would pay for that: a second and a half of processor time, and some thousand files of a shared disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

# Both optional: without them Megatron takes the plain torch code, which is what we compare against.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron")
warnings.filterwarnings("ignore", message=".*_tensor. is deprecated", category=FutureWarning)


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """In the place of torch.compile, with or without arguments."""
    same: Callable[[Any], Any] = lambda f: f  # noqa: E731
    return same if function is None else function


_compile, torch.compile = torch.compile, _as_it_is  # type: ignore[assignment]
try:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.transformer.transformer_config import TransformerConfig
finally:
    torch.compile = _compile

__all__ = [
    "ModelParallelConfig",
    "ModelType",
    "TransformerConfig",
    "VocabParallelCrossEntropy",
    "get_forward_backward_func",
    "parallel_state",
    "tensor_parallel",
]
