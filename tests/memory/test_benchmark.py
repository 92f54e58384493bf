"""The benchmark runs, and what it compares with is the same memory."""

import re

import pytest
import torch

from tests.memory.cases import GATES, gaps, make_case
from titans_pretrain.memory.benchmark import main, per_token_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec


@pytest.mark.parametrize("decay_to", ["init", "zero"])
def test_weights_per_token_is_the_oracle(decay_to: str) -> None:
    case = make_case(MemorySpec(expansion=2, chunk=4, decay_to=decay_to), 11)

    def without_state(*args, positions, state):  # type: ignore[no-untyped-def]
        return per_token_memory(*args)

    found = gaps(case.results(without_state), case.results(oracle_memory))
    assert max(found.values()) < 1e-10, found
    assert any(n.startswith(f"d {GATES[0]}") for n in found)


def test_quick(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["--quick"]) == 0
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines[2:]] == ["chunked", "weights", "oracle "]
    slower = [[float(x) for x in re.findall(r"x(\d+\.\d+)", line)] for line in lines[2:]]
    assert slower[0] == [1, 1, 1]
    assert all(ratio > 1 for row in slower[1:] for ratio in row)  # time, time, peak bytes
