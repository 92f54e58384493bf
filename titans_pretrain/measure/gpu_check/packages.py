"""Which packages this Python lacks, and what cannot be checked without them.

Each need is tried by the import itself, in a process of its own: a package made for another Python
may be there and still not load.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from titans_pretrain.errors import ConfigError
from titans_pretrain.measure.gpu_check.processes import end

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
IMPORT_S = 120.0  # that the import of one need may take
# Of torch's own making, and large: a machine's own counts, whatever wheels lie about.
_NEVER = re.compile(r"torch|triton|nvidia|cuda", re.IGNORECASE)


def missing(env: Mapping[str, str]) -> dict[str, str]:
    """{need: what stands for it does not load, and why} of the needs that are not met."""
    found = {}
    for need, (modules, name) in reversed(NEEDS.items()):  # each has the ones before it within
        if not (why := _not_imported(modules, env)):
            break
        found[need] = f"{name} cannot be imported: {why}"
    return dict(reversed(found.items()))


def _not_imported(modules: Sequence[str], env: Mapping[str, str]) -> str:
    """Why a process cannot import the modules, or ""."""
    with tempfile.TemporaryFile("w+") as said:  # a pipe would have to be emptied
        process = subprocess.Popen(
            [sys.executable, "-c", f"import {', '.join(modules)}"],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait(IMPORT_S)
        except subprocess.TimeoutExpired:
            return f"not done after {IMPORT_S:g} s"
        finally:
            end(process)
        said.seek(0)
        lines = said.read().strip().splitlines()
    return "" if not code else lines[-1] if lines else f"exit code {code}"


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
