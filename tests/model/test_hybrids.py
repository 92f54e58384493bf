"""What is MAG's and MAL's own: documents start from what persistent tokens leave."""

import pytest
import torch

from tests.model.helpers import config_of, hot_model, losses_of, packed, tokens_like
from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.layer import MemoryLayer

CASES = ("mag", "mag-window", "mal", "mal-window")


@pytest.mark.parametrize("case", CASES)
def test_what_persistent_tokens_leave_is_heard(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that started from the first weights instead would be seen."""
    config = config_of(case)
    model = hot_model(config)
    positions = packed([[9, 5], [13]], config.alignment)
    tokens = tokens_like(positions)
    losses = losses_of(model, tokens, positions)
    begin = MemoryLayer.begin
    monkeypatch.setattr(MemoryLayer, "begin", lambda m, x: (begin(m, x)[0], m.start(1)))
    moved = losses_of(model, tokens, positions) - losses
    assert moved.abs().sum() > 0.01 * losses.sum()


@pytest.mark.parametrize("case", CASES)
def test_the_window_never_hides_persistent_tokens(case: str) -> None:
    """A token far beyond the window still hears all of P, through attention alone."""
    model = hot_model(config_of(case, blocks=1, window=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gates." in name:  # theta and alpha 0: the memory carries nothing of P
                p.view(-1, 3, *p.shape[1:])[:, :2] = -1e3 if name.endswith("bias") else 0
    positions = torch.arange(19)[None]
    logits, _ = model(tokens_like(positions), positions)
    (g,) = torch.autograd.grad(logits[0, -1].sum(), model.blocks["0"].mixer.persistent)
    assert (g.abs().amax(1) > 1e-6).all()


def test_default_windows() -> None:
    for variant, default in (("mag", 2048), ("mal", 2048), ("transformer", None)):
        assert ModelConfig(variant=variant, window=7).attention_window == 7
        assert ModelConfig(variant=variant).attention_window == default
