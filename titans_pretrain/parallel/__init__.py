"""Megatron and DeepSpeed, each behind one file."""

import os
import warnings

import torch

# Both optional: without them Megatron takes the plain torch code, which is what we compare against.
warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
warnings.filterwarnings("ignore", message="full scope is deprecated", module="megatron")
warnings.filterwarnings("ignore", message=".*_tensor. is deprecated", category=FutureWarning)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
