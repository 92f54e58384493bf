"""Training today gives the recorded curves: loss and gradient norm of 60 steps, to 1e-6."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.curves import (
    DOCUMENTS,
    QUANTITIES,
    STEPS,
    TOLERANCE,
    VARIANTS,
    differences,
    manifest_of,
    read,
    record_curves,
    write,
)
from tests.prepared import small_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_dataset(tmp_path_factory.mktemp("golden"), DOCUMENTS)
    assert manifest_of(folder) == read()[0], (
        "the prepared data is another one, so are all batches: look at what changed in preparing, "
        "not at the model"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_curves_are_the_recorded_ones(variant: str, data: Path, tmp_path: Path) -> None:
    _, want = read()
    got = record_curves(tmp_path, data, (variant,))
    moved = {
        quantity: f"{worst:.1e} at step {step}"
        for (_, quantity), (worst, step) in differences(want, got).items()
        if worst > TOLERANCE
    }
    assert moved == {}, "tests/golden/record.py says when to record anew"


def test_the_record_is_whole_and_falls() -> None:
    manifest, curves = read()
    assert len(manifest) == 64
    assert tuple(curves) == VARIANTS
    norms = []
    for quantities in curves.values():
        assert tuple(quantities) == QUANTITIES
        assert all(len(values) == STEPS for values in quantities.values())
        loss, norm = quantities.values()
        assert loss[0] > 6 and sum(loss[-5:]) / 5 < 5.8
        norms += norm
    assert min(norms) < 0.5 < max(norms)  # steps without and with clipping


def test_a_moved_value_is_found_and_the_file_keeps_every_digit(tmp_path: Path) -> None:
    want = {"mac": {"train/loss": [1.0, 1 / 3, 0.1]}}
    got = {"mac": {"train/loss": [1.0, 1 / 3 * (1 + 2e-6), 0.1 * (1 + 1e-7)]}}
    [(worst, step)] = differences(want, got).values()
    assert worst == pytest.approx(2e-6) and step == 2
    write("h", want, tmp_path / "x.json")
    assert read(tmp_path / "x.json") == ("h", want)
