"""A document read in pieces with carried state gives what it gives in one pass."""

from dataclasses import replace

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
    labels_of,
    loss_of,
    packed,
    tokens_like,
    worst_gradient,
)
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, map_state

CUTS = [[1], [3], [4], [6], [7], [8], [13], [2, 3, 5, 6, 11, 16], [8, 16], [*range(1, 24)]]


def pieces(model: TitansLM, tokens: Tensor, positions: Tensor, cuts: list[int]) -> Tensor:
    state, logits = None, []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        part, state = model(tokens[:, begin:end], positions[:, begin:end], state)
        logits.append(part)
    return torch.cat(logits, dim=1)


def batch(align: int) -> tuple[Tensor, Tensor]:
    """Rows that end, start and pause documents at different columns."""
    positions = packed([[24], [5, 12], [8, 16], [1, 1, 9], [3]], align)[:, :24]
    return tokens_like(positions), positions


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: "-".join(map(str, cuts[:6])))
def test_pieces_equal_one_pass(case: str, cuts: list[int]) -> None:
    config = config_of(case)
    model = hot_model(config)
    tokens, positions = batch(config.alignment)
    with torch.no_grad():
        whole, _ = model(tokens, positions)
        cut = pieces(model, tokens, positions, cuts)
    assert (whole - cut)[positions >= 0].abs().max() < 1e-10


@given(
    rows=st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 40), min_size=1, max_size=6),
    case=st.sampled_from([*CASES]),
)
def test_any_pieces_of_any_rows_equal_one_pass(
    rows: list[list[int]], cuts: set[int], case: str
) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = packed(rows, config.alignment)
    tokens = tokens_like(positions)
    with torch.no_grad():
        whole, _ = model(tokens, positions)
        inside = sorted(c for c in cuts if c < positions.shape[1])
        cut = pieces(model, tokens, positions, inside)
    assert (whole - cut)[positions >= 0].abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_gradients_flow_through_the_carried_state(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    tokens, positions = batch(config.alignment)
    logits = pieces(model, tokens, positions, [3, 11, 16])
    loss = token_loss(logits, labels_of(tokens))[positions >= 0].sum()
    whole = gradients(model, loss_of(model, tokens, positions))
    assert worst_gradient(gradients(model, loss), whole) < (1e-10, "")


@pytest.mark.parametrize("case", CASES)
def test_a_lost_state_would_be_seen(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    tokens, positions = batch(config.alignment)
    with torch.no_grad():
        whole, _ = model(tokens, positions)
        _, state = model(tokens[:, :7], positions[:, :7])
        zeros = map_state(state, torch.zeros_like)
        for name, kept in state.items():  # attention's positions say which keys there are
            blank = zeros[name]
            if config.variant == "transformer":
                zeros[name] = replace(blank, positions=kept.positions)
            elif config.variant in ("mag", "mal"):
                window = replace(blank.attention, positions=kept.attention.positions)
                zeros[name] = replace(blank, attention=window)
        lost, _ = model(tokens[:, 7:], positions[:, 7:], zeros)
    assert (whole[0, 7:] - lost[0]).abs().max() > 1e-3


def test_mac_refuses_to_continue_a_document_without_its_state() -> None:
    model = hot_model(config_of("mac"))
    positions = torch.arange(5, 9)[None]
    with pytest.raises(ValueError, match="first position is 5 and no state is given"):
        model(tokens_like(positions), positions)


@pytest.mark.parametrize("case", ["lmm", "mac", "transformer-window", "mag-window", "mal-window"])
def test_the_state_of_a_long_document_does_not_grow(case: str) -> None:
    model = hot_model(config_of(case))
    sizes = []
    for length in (48, 96):
        positions = torch.arange(length)[None]
        _, state = model(tokens_like(positions), positions)
        count = 0

        def add(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        map_state(state, add)
        sizes.append(count)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", [3, 8])
def test_a_row_may_pause(case: str, cut: int) -> None:
    """One row goes on while the other holds pads alone, or ends in pads, for a call."""
    config = config_of(case)
    model = hot_model(config)
    pads = [-1] * 5
    calls = [
        torch.tensor([[*range(cut)], [*range(cut)]]),
        torch.tensor([[*range(cut, cut + 5)], pads]),
        torch.tensor([[*range(cut + 5, cut + 10)], [cut, cut + 1, -1, -1, -1]]),
        torch.tensor([[*range(cut + 10, cut + 15)], [*range(cut + 2, cut + 7)]]),
    ]
    positions = torch.cat(calls, dim=1)
    tokens = tokens_like(positions)
    widths = [c.shape[1] for c in calls]
    with torch.no_grad():
        cut_logits = pieces(model, tokens, positions, torch.tensor(widths).cumsum(0).tolist()[:-1])
        for row in (0, 1):
            real = positions[row] >= 0
            whole, _ = model(tokens[row, real][None], positions[row, real][None])
            assert (whole[0] - cut_logits[row, real]).abs().max() < 1e-10
