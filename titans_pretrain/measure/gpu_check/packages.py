"""Which packages this Python lacks, and what cannot be checked without them.

Each need is tried by the import itself, in a process of its own: a package made for another Python
may be there and still not load.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from titans_pretrain.errors import ConfigError

# What a group needs -> the modules that it imports, and what they stand for.
NEEDS = {
    "torch": (("titans_pretrain.memory.problems", "titans_pretrain.measure.made"), "torch"),
    "models": (
        ("titans_pretrain.config", "titans_pretrain.model.titans"),
        "the configuration (pydantic, PyYAML)",
    ),
    "engines": (
        ("titans_pretrain.step", "titans_pretrain.run.saver"),
        "Megatron-core and DeepSpeed",
    ),
}
# Of torch's own making, and large: a machine's own counts, whatever wheels lie about.
_NEVER = re.compile(r"torch|triton|nvidia|cuda", re.IGNORECASE)


def missing(env: Mapping[str, str]) -> dict[str, str]:
    """{need: what stands for it does not load, and why} of the needs that are not met."""
    found = {}
    for need, (modules, name) in reversed(NEEDS.items()):  # each has the ones before it within
        command = [sys.executable, "-c", f"import {', '.join(modules)}"]
        tried = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if tried.returncode:
            lines = tried.stderr.strip().splitlines()
            why = lines[-1] if lines else f"exit code {tried.returncode}"
            found[need] = f"{name} cannot be imported: {why}"
        else:
            break
    return dict(reversed(found.items()))


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Unpacks those wheels whose package is not installed into `folder`; their names.

    Pure Python runs under any Python; what was compiled for another one does not load, and is told
    by `missing`. Raises ConfigError.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ConfigError(
            f"--wheels {wheels}: no wheels",
            "packages that are not installed are taken from there",
            "give the folder that holds the .whl files (README, Without network)",
        )
    taken = []
    for file in files:
        name = file.name.split("-")[0].replace("_", "-")
        if _NEVER.match(name) or _installed(name):
            continue
        try:
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(folder)
        except (OSError, zipfile.BadZipFile) as e:
            raise ConfigError(
                f"--wheels {wheels}: {file.name}: {e}", "wheels can be unpacked", "copy it again"
            ) from e
        taken.append(file.name)
    return taken


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
