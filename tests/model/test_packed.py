"""Documents that share rows give what each gives alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.model.helpers import (
    CASES,
    config_of,
    gradients,
    hot_model,
    loss_of,
    packed,
    tokens_like,
    worst_gradient,
)
from titans_pretrain.model.titans import TitansLM

ROWS = [[5, 1, 11], [17], [2, 2, 8, 4], [8, 8], [3]]


def documents(positions: Tensor) -> list[tuple[int, slice]]:
    """(row, columns) of each."""
    found = []
    for row, line in enumerate(positions.tolist()):
        starts = [c for c, p in enumerate(line) if p == 0]
        for start in starts:
            end = start
            while end + 1 < len(line) and line[end + 1] == line[end] + 1:
                end += 1
            found.append((row, slice(start, end + 1)))
    return found


def check_equal_alone(model: TitansLM, positions: Tensor) -> None:
    tokens = tokens_like(positions)
    logits, _ = model(tokens, positions)
    together = gradients(model, loss_of(model, tokens, positions))
    alone = {name: torch.zeros_like(g) for name, g in together.items()}
    for row, columns in documents(positions):
        mine, at = tokens[row : row + 1, columns], positions[row : row + 1, columns]
        expected, _ = model(mine, at)
        assert (logits[row, columns] - expected[0]).abs().max() < 1e-10
        for name, g in gradients(model, loss_of(model, mine, at)).items():
            alone[name] += g
    assert worst_gradient(together, alone) < (1e-10, "")


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_the_documents_alone(case: str) -> None:
    config = config_of(case)
    check_equal_alone(hot_model(config), packed(ROWS, config.alignment))


@given(
    rows=st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=4), min_size=1, max_size=3),
    case=st.sampled_from([c for c in CASES if c.startswith("ma")]),
)
def test_any_packing_equals_the_documents_alone(rows: list[list[int]], case: str) -> None:
    config = config_of(case, blocks=1)
    check_equal_alone(hot_model(config), packed(rows, config.alignment))


@pytest.mark.parametrize("case", CASES)
def test_a_missed_reset_would_be_seen(case: str) -> None:
    """The same tokens as one document differ: the comparison above can fail."""
    config = config_of(case)
    model = hot_model(config)
    positions = packed([[8, 8]], 8)
    tokens = tokens_like(positions)
    apart = gradients(model, loss_of(model, tokens, positions))
    joined = gradients(model, loss_of(model, tokens, torch.arange(16)[None]))
    assert worst_gradient(apart, joined)[0] > 1e-3


@pytest.mark.parametrize("case", ["transformer", "lmm", "mac", "mac-learned", "mag", "mal-bare"])
def test_pads_alone_give_every_parameter_a_gradient_of_zeros(case: str) -> None:
    """Ranks add their gradients up: none may be missing where a rank happens to have pads alone."""
    model = hot_model(config_of(case))
    positions = torch.full((2, 8), -1)
    logits, _ = model(tokens_like(positions), positions, carry=False)
    torch.where(positions[..., None] >= 0, logits, 0).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
