"""What a rank does about its device before it joins the others; CUDA is stood in for."""

from __future__ import annotations

import pytest
import torch

from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.world import choose_device


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
