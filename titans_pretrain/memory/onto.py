"""From the host to the device, without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(x: Tensor, device: torch.device | str | None) -> Tensor:
    """`x` on `device`; None: where it is. A GPU copies from pinned memory when its stream comes to
    it; from other memory the host would wait for all that is queued before. torch keeps a pinned
    block until its copy is done."""
    if device is None:
        return x
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)
