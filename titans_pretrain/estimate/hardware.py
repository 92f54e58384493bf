"""Hardware files by name: configs/hardware/."""

from __future__ import annotations

from pathlib import Path

from titans_pretrain.config import HardwareConfig, load_hardware
from titans_pretrain.errors import ConfigError

HARDWARE = Path(__file__).resolve().parents[2] / "configs" / "hardware"


def known() -> list[str]:
    """Names of the hardware files that come with the stack."""
    return sorted(path.stem for path in HARDWARE.glob("*.yaml"))


def like(device: str) -> HardwareConfig | None:
    """The file of a device by the name that CUDA gives it, e.g. "NVIDIA H100 80GB HBM3"; None if
    there is none."""
    found = [name for name in known() if name.upper() in device.upper()]
    return hardware_of(found[0]) if found else None


def hardware_of(name: str) -> HardwareConfig:
    """The file of that name, or at that path. Raises ConfigError."""
    if name in known():
        return load_hardware(HARDWARE / f"{name}.yaml")
    if not Path(name).exists():
        raise ConfigError(
            f"--gpu {name}",
            f"a GPU is one of {', '.join(known())}, or a file like those of configs/hardware",
            "choose one, or write its file with --measure on such a machine",
        )
    return load_hardware(name)
