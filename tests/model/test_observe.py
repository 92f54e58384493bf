"""What observe_memory reports against the token-by-token memory."""

import pytest
import torch

from tests.model.helpers import config_of, hot_model, packed, tokens_like
from titans_pretrain.memory import layer as layer_module
from titans_pretrain.memory.observe import observe_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.state import memory_forward


def test_figures_of_one_document_equal_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("lmm", blocks=1)
    model = hot_model(config)
    positions = torch.arange(10)[None]
    calls = []
    chunked = layer_module.chunked_memory

    def keep(*args, **kwargs):
        calls.append(args)
        return chunked(*args, **kwargs)

    monkeypatch.setattr(layer_module, "chunked_memory", keep)
    with torch.no_grad(), observe_memory() as seen:
        model(tokens_like(positions), positions)
    _, k, v, theta, alpha, eta, w_init, norm, spec = calls[0]
    state, surprise = None, []
    for t in range(10):
        at = (slice(None), slice(None), slice(t, t + 1))
        weights = w_init
        if state is not None:
            weights = tuple(w + d for w, d in zip(w_init, state.weights, strict=True))
        surprise.append(2 * (memory_forward(k[at], weights, norm, spec) - v[at]).norm(dim=-1))
        parts = (x[at] for x in (k, k, v, theta, alpha, eta))
        _, state = oracle_memory(
            *parts, w_init, norm, spec, positions=torch.tensor([[t]]), state=state
        )
    figures = seen.figures["blocks.0.mixer.memory"]
    close = {"rel": 1e-5}
    assert figures["surprise"] == pytest.approx(torch.stack(surprise).mean().item(), **close)
    untrained = 2 * (memory_forward(k, w_init, norm, spec) - v).norm(dim=-1)  # [1, H, T]
    assert figures["surprise_untrained"] == pytest.approx(untrained.mean().item(), **close)
    assert figures["surprise"] != pytest.approx(figures["surprise_untrained"], rel=0.01)
    assert figures["alpha/mean"] == pytest.approx(alpha.mean().item(), **close)
    assert figures["theta/p50"] == pytest.approx(theta.quantile(0.5).item(), **close)
    assert figures["eta/p90"] == pytest.approx(eta.quantile(0.9).item(), **close)
    gain = 1 - torch.cat(surprise, 2).mean((0, 2)) / untrained.mean((0, 2))
    expected = 1 - torch.cat(surprise, 2).mean() / untrained.mean()
    assert figures["gain"] == pytest.approx(expected.item(), abs=1e-6)
    heads = seen.heads["blocks.0.mixer.memory"]
    assert heads["gain"] == pytest.approx(gain.tolist(), abs=1e-6)
    assert heads["surprise_untrained"] == pytest.approx(untrained.mean((0, 2)).tolist(), **close)
    assert heads["alpha"] == pytest.approx(alpha.mean((0, 2, 3)).tolist(), **close)
    assert len(set(heads["theta"])) == len(heads["radius"]) == 2
    assert max(heads["radius"]) == figures["radius"]
    flat = [torch.cat([x[0].flatten(1) for x in y], 1) for y in (state.weights, state.momentum)]
    first = torch.cat([w.flatten(1) for w in w_init], 1)
    assert figures["drift"] == pytest.approx(
        (flat[0].norm(dim=1) / first.norm(dim=1)).mean().item(), **close
    )
    moved = flat[0].norm(dim=1) / first.norm(dim=1)
    assert heads["drift"] == pytest.approx(moved.tolist(), **close)
    assert figures["momentum"] == pytest.approx(flat[1].norm(dim=1).mean().item(), **close)
    assert 0 < figures["radius"] < 1


@pytest.mark.parametrize("case", ["mac", "mag", "mal"])
def test_every_memory_reports_and_pads_do_not_count(case: str) -> None:
    model = hot_model(config_of(case))
    positions = packed([[5, 9], [3]], 8)
    with torch.no_grad(), observe_memory() as seen:
        model(tokens_like(positions), positions)
    assert list(seen.figures) == ["blocks.0.mixer.memory", "blocks.1.mixer.memory"]
    longer = torch.cat((positions, torch.full((2, 16), -1)), 1)
    with torch.no_grad(), observe_memory() as again:
        model(torch.cat((tokens_like(positions), torch.zeros(2, 16, dtype=torch.long)), 1), longer)
    for name, figures in seen.figures.items():
        assert figures == pytest.approx(again.figures[name], rel=1e-5)
        for figure, by_head in seen.heads[name].items():
            assert by_head == pytest.approx(again.heads[name][figure], rel=1e-5)


def test_nothing_is_recorded_outside() -> None:
    model = hot_model(config_of("lmm"))
    positions = torch.arange(4)[None]
    with observe_memory() as seen:
        pass
    model(tokens_like(positions), positions)
    assert seen.figures == seen.heads == {}
