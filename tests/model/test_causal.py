"""No logit depends on a later token, to the last bit."""

import pytest
import torch

from tests.model.helpers import CASES, VOCAB, config_of, hot_model, packed, tokens_like

# Segment and chunk edges of the cases lie at multiples of 1, 2, 3, 4, 6 and 8.
PERTURBED = [0, 1, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 18]


@pytest.mark.parametrize("case", CASES)
def test_a_token_changes_nothing_before_it_and_something_from_it_on(case: str) -> None:
    model = hot_model(config_of(case))
    positions = torch.arange(19).expand(2, -1)
    tokens = tokens_like(positions)
    with torch.no_grad():
        before, _ = model(tokens, positions)
        for j in PERTURBED:
            other = tokens.clone()
            other[:, j] = (other[:, j] + 1) % VOCAB
            after, _ = model(other, positions)
            assert torch.equal(before[:, :j], after[:, :j]), j
            assert (before[:, j] - after[:, j]).abs().max() > 1e-6, j
            if j < 18:
                assert (before[:, j + 1 :] - after[:, j + 1 :]).abs().max() > 1e-6, j


@pytest.mark.parametrize("case", CASES)
def test_a_token_changes_neither_other_documents_nor_other_rows(case: str) -> None:
    config = config_of(case)
    model = hot_model(config)
    positions = packed([[5, 9, 3], [17]], config.alignment)
    tokens = tokens_like(positions)
    start = int((positions[0] == 0).nonzero()[1])  # the middle document's
    with torch.no_grad():
        before, _ = model(tokens, positions)
        tokens[0, start] = (tokens[0, start] + 1) % VOCAB
        tokens[positions < 0] = 1  # what pads hold means nothing
        after, _ = model(tokens, positions)
    mine = torch.zeros_like(positions, dtype=torch.bool)
    mine[0, start : start + 9] = True
    others = ~mine & (positions >= 0)
    assert torch.equal(before[others], after[others])
    assert ((before - after)[mine].abs().amax(-1) > 1e-6).any()
    assert torch.isfinite(after).all()
