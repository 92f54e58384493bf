"""What a rank does about its device before it joins the others; CUDA is stood in for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.worlds import run_world
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.world import choose_device, prepare_cuda


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_rank_takes_the_device_that_all_engines_take(two_gpus: None) -> None:
    assert str(choose_device("auto", 1)) == str(choose_device("cuda", 1)) == "cuda:1"
    with pytest.raises(ConfigError, match="local rank 2, 2 CUDA devices"):
        choose_device("auto", 2)
    with pytest.raises(ConfigError, match="torch sees 2 CUDA devices") as caught:
        choose_device("cpu", 0)  # Megatron and DeepSpeed would compute on a GPU
    assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy


def prepared(set_by_user: str) -> tuple[str, str]:
    """What an operation says that has no deterministic algorithm; NCCL's setting."""
    torch._C._set_deterministic_algorithms(False)
    os.environ["NCCL_ALGO"] = set_by_user
    prepare_cuda(deterministic=True, watched=True)
    try:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    except RuntimeError as e:
        return str(e), os.environ["NCCL_ALGO"]
    return "", os.environ["NCCL_ALGO"]


def test_what_is_not_deterministic_fails_and_what_the_user_has_set_stays() -> None:
    ((told, algorithm),) = run_world(prepared, 1, "Ring")
    assert told.startswith("put_ does not have a deterministic implementation")
    assert algorithm == "Ring"


# A world on "CUDA": its process group is gloo's; something that waits as the process ends stands in
# for NCCL's own end.
LEAVES = """
import atexit, contextlib, time
from dataclasses import replace
import torch
from titans_pretrain.config import TrainConfig
from titans_pretrain.parallel.world import start_world

world = replace(start_world(TrainConfig(device="cpu", threads=1)), device=torch.device("cuda"))
atexit.register(time.sleep, 600)
with contextlib.ExitStack() as leaving:
    leaving.callback(world.shut_down)
    try:
        raise {error}
    finally:
        print("last words", end="")
"""


@pytest.mark.parametrize(("error", "code"), [("ValueError('why')", 1), ("OSError(28, 'full')", 76)])
def test_with_an_error_nothing_on_cuda_is_waited_for(error: str, code: int) -> None:
    line = [sys.executable, "-c", LEAVES.format(error=error)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (code, "last words")
    assert f"{error.partition('(')[0]}: " in done.stderr  # Python has told
