"""All that this stack takes of megatron-core, imported here alone (for uncompiled.py's reason)."""

from __future__ import annotations

import warnings

from titans_pretrain.parallel.uncompiled import without_compiler

# Both optional: without them Megatron takes the plain torch code, which is what we compare against.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron")
warnings.filterwarnings("ignore", message=".*_tensor. is deprecated", category=FutureWarning)


with without_compiler():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "ModelParallelConfig",
    "ModelType",
    "TransformerConfig",
    "VocabParallelCrossEntropy",
    "get_forward_backward_func",
    "parallel_state",
    "schedules",
    "tensor_parallel",
]
