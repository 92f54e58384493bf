"""The golden curves: 60 steps of each variant through the real training path, one rank, one thread.

In fp32, compared at a relative 1e-6: a few roundings. A changed formula, initial value, rate or
batch is far above it; the kernels of another CPU type stay below it, as measured (LOG.md). They do
because of the rate: at 3e-3 single batches of MAG are so badly conditioned that their gradient norm
moves by 4e-6 from one CPU type to another, though the difference does not grow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.prepared import small_run
from tests.worlds import run_world
from titans_pretrain.config import parse_config
from titans_pretrain.data.manifest import load_manifest
from titans_pretrain.errors import EXIT_DONE
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import read_records

FILE = Path(__file__).with_name("curves.json")
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")
QUANTITIES = ("train/loss", "train/grad_norm")
DOCUMENTS = 60  # of the shipped corpus (tests/prepared.py); 60 steps read them nearly twice
STEPS = 60
TOLERANCE = 1e-6  # relative

Curves = dict[str, dict[str, list[float]]]  # variant -> quantity -> a value a step


def golden_run(folder: Path, data: Path, variant: str) -> dict[str, Any]:
    """The tree of one golden run: packed documents cut by rows, resets, accumulation, clipping."""
    changes: dict[str, Any] = {
        "model__variant": variant,
        "model__persistent_tokens": 4,
        "data__sequence_length": 128,
        "optim__lr": 1e-3,
        "optim__clip": 0.5,
        "train__steps": STEPS,
        "train__micro_batch": 4,
        "train__seed": 0,
        "validation__every": 0,
    }
    if variant in ("mag", "mal"):
        changes["model__window"] = 24
    return small_run(folder, data, **changes)


def train(tree: dict[str, Any]) -> int:
    from titans_pretrain.train import run_training

    return run_training(parse_config(tree, "golden"))


def record_curves(folder: Path, data: Path, variants: tuple[str, ...] = VARIANTS) -> Curves:
    """Trains each variant below `folder`, each in a process of its own."""
    curves: Curves = {}
    for variant in variants:
        tree = golden_run(folder / variant, data, variant)
        assert run_world(train, 1, tree) == [EXIT_DONE]
        records = list(read_records(RunFolder(folder / variant).metrics))
        assert [r["step"] for r in records] == list(range(1, STEPS + 1))
        curves[variant] = {q: [r["values"][q] for r in records] for q in QUANTITIES}
    return curves


def differences(want: Curves, got: Curves) -> dict[tuple[str, str], tuple[float, int]]:
    """(variant, quantity) -> the largest relative difference, and its step (from 1)."""
    found = {}
    for variant, quantities in got.items():
        for quantity, values in quantities.items():
            pairs = zip(want[variant][quantity], values, strict=True)
            relative = [abs(b - a) / abs(a) for a, b in pairs]
            worst = max(relative)
            found[variant, quantity] = (worst, relative.index(worst) + 1)
    return found


def manifest_of(data: Path) -> str:
    """Hash of the prepared data: the order of batches hangs on it."""
    return load_manifest(data).hash


def write(manifest: str, curves: Curves, file: Path = FILE) -> None:
    """As JSON, a line a curve, every digit kept."""
    lines = [
        f'  "{v} {q}": {json.dumps(values)}' for v, qs in curves.items() for q, values in qs.items()
    ]
    file.write_text(f'{{\n  "manifest": "{manifest}",\n' + ",\n".join(lines) + "\n}\n")


def read(file: Path = FILE) -> tuple[str, Curves]:
    """(manifest hash, curves) as recorded."""
    tree = json.loads(file.read_text())
    manifest = tree.pop("manifest")
    curves: Curves = {}
    for name, values in tree.items():
        variant, quantity = name.split(" ")
        curves.setdefault(variant, {})[quantity] = values
    return manifest, curves
