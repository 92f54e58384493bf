"""The learning rate as a pure function of the step, and the parameter groups of AdamW.

Steps are counted from 1 to `train.steps`: step s is the s-th update. Nothing is stored, so a
resumed run needs the step alone. Imports no torch: parameters pass through unread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from titans_pretrain.config import OptimConfig

if TYPE_CHECKING:
    import torch

KINDS = ("decay", "no_decay", "gate", "fast_init")


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """The rate of update `step` (1..steps); beyond `steps` the schedule's last value holds.

    Warm-up: linear, lr * step / warmup_steps, reaching the peak at step warmup_steps. Then
    - cosine:   half a cosine from the peak to min_lr, reached at the last step;
    - wsd:      the peak, then linear over the last decay_steps steps to min_lr;
    - constant: the peak.
    """
    step = min(step, steps)
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "cosine":
        span = steps - optim.warmup_steps
        share = (step - optim.warmup_steps) / span if span > 0 else 0.0
        factor = 0.5 * (1.0 + math.cos(math.pi * share))
    elif optim.schedule == "wsd" and optim.decay_steps > 0:
        factor = min(1.0, (steps - step) / optim.decay_steps)
    else:
        factor = 1.0
    return optim.min_lr + (optim.lr - optim.min_lr) * factor


def param_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    kind: Callable[[str], str],
    optim: OptimConfig,
) -> list[dict[str, Any]]:
    """Groups for AdamW, in the order of KINDS, empty ones left out.

    `kind(name)` says to which group a parameter belongs: `decay` (matrices), `no_decay` (gains,
    biases, embeddings as the model decides), `gate` (the memory's gates) or `fast_init` (learned
    initial fast weights). A group holds `params`, `weight_decay`, `lr_scale`, `lr`
    (the scaled peak), its `kind` and the `names` of its parameters in the order of `params`.
    Parameters that need no gradient are left out.
    """
    members: dict[str, list[tuple[str, torch.nn.Parameter]]] = {k: [] for k in KINDS}
    for name, parameter in named_parameters:
        found = kind(name)
        if found not in members:
            raise ValueError(f"parameter {name} is of kind {found!r}, which is none of {KINDS}")
        if parameter.requires_grad:
            members[found].append((name, parameter))
    settings = {
        "decay": (1.0, optim.weight_decay),
        "no_decay": (1.0, 0.0),
        "gate": (optim.gate_lr_scale, optim.gate_weight_decay),
        "fast_init": (optim.init_lr_scale, optim.init_weight_decay),
    }
    return [
        {
            "params": [p for _, p in members[k]],
            "names": [n for n, _ in members[k]],
            "kind": k,
            "lr": optim.lr * settings[k][0],
            "lr_scale": settings[k][0],
            "weight_decay": settings[k][1],
        }
        for k in KINDS
        if members[k]
    ]
