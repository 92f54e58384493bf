"""What a plan says of one layout, to stand beside what was measured of it."""

from __future__ import annotations

from typing import Any

from titans_pretrain.config import HardwareConfig, RunConfig
from titans_pretrain.estimate.choose import judge
from titans_pretrain.parallel.layout import plan_layout


def planned(config: RunConfig, ranks: int, hardware: HardwareConfig) -> dict[str, Any]:
    """Plain values: the hardware's name, a step's seconds, whole and by part, bytes of a rank."""
    found = judge(config, plan_layout(config, ranks), hardware)
    return {
        "hardware": hardware.name,
        "step_s": found.pace.seconds,
        "parts": found.pace.parts,
        "bytes": found.held.by_kind(),
        "device_bytes": found.held.device,
    }
