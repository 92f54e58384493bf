"""`titans-pretrain plan --measure`: a hardware file of this machine that `plan` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.estimate.hardware import hardware_of, like

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.mark.slow
def test_a_measured_machine_is_one_to_plan_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    assert cli.main(["plan", "--measure", str(path)]) == 0
    found = hardware_of(str(path))
    assert found.gpus_per_node >= 1
    assert 1e-4 < found.fp32_tflops.value < 1e4
    assert 0.1 < found.launch_us.value < 1e4
    assert "not measured (one machine)" in found.network_gb_per_s.source
    assert all(0 < share.value <= 1 for share in (found.matmul, found.attention, found.memory))
    capsys.readouterr()
    assert cli.main(["plan", str(CONFIG), "model.vocab_size=512", "--gpu", str(path)]) == 0
    assert found.name in capsys.readouterr().out


def test_a_hardware_file_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from titans_pretrain.measure import hardware

    known = hardware_of("h100").model_dump()
    monkeypatch.setattr(hardware, "measured", lambda: iter(known.items()))
    assert cli.main(["plan", "--measure", str(tmp_path / "none" / "mine.yaml")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM 80 GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80 GB"),
        ("NVIDIA H200", "NVIDIA H200 SXM 141 GB"),
        ("NVIDIA L4", None),
    ],
)
def test_a_device_has_its_file(device: str, name: str | None) -> None:
    found = like(device)
    assert (found and found.name) == name
