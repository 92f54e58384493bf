"""Parts of what a memory did, put together."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from titans_pretrain.memory import tally
from titans_pretrain.memory.diagnostics import stability_radius
from titans_pretrain.memory.tally import GATES, MOST, Spans, Tally, figures

CHUNK = 4


def no_spans(heads: int, layers: int) -> Spans:
    g = {"gates": torch.ones(1, 3, heads, layers), "drift": torch.ones(1, heads)}
    flags = {name: torch.ones(1, dtype=torch.bool) for name in ("begun", "last")}
    one = torch.ones(1, dtype=torch.long)
    return Spans(place=one, tokens=one, momentum=g["drift"], **flags, **g)


def tally_of(gates: Tensor, surprises: Tensor, spans: Spans | None = None) -> Tally:
    spans = no_spans(*gates.shape[2:]) if spans is None else spans
    return Tally.of(gates, surprises, spans, CHUNK, cut=False)


def values(tokens: int, heads: int, layers: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    gates = torch.rand(3, tokens, heads, layers, generator=g, dtype=torch.float64)
    return gates, torch.rand(2, tokens, heads, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [50, 3000])
def test_heads_come_to_the_same_however_they_are_divided(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantiles to the last bit, also where they are of a sample: it is the same one."""
    monkeypatch.setattr(tally, "MOST", 1000)
    gates, surprises = values(tokens, 8, 2)
    whole, by_head = figures([[tally_of(gates, surprises)]])
    for groups in (2, 8):
        pairs = zip(gates.chunk(groups, 2), surprises.chunk(groups, 2), strict=True)
        parts = [[tally_of(*pair)] for pair in pairs]
        found, heads = figures(parts)
        assert found == pytest.approx(whole, rel=1e-12)
        at = [name for name in whole if "/p" in name]
        assert len(at) == 9 and [found[name] for name in at] == [whole[name] for name in at]
        for name, values_ in by_head.items():
            assert heads[name] == pytest.approx(values_, rel=1e-12)


def test_quantiles_are_exact_of_few_values_and_near_of_many() -> None:
    gates, surprises = values(MOST // 8, 4, 2)
    few, _ = figures([[tally_of(gates, surprises)]])
    assert few["theta/p10"] == gates[0].flatten().quantile(0.1).item()
    gates, surprises = values(20 * MOST // 8, 4, 2)
    one = tally_of(gates, surprises)
    many, heads = figures([[one]])
    assert one.gates[0].numel() * 1.25 > MOST / 2 and one.gates[0].numel() < 1.01 * MOST
    for i, name in enumerate(GATES):
        for q in (10, 50, 90):
            assert many[f"{name}/p{q}"] == pytest.approx(q / 100, abs=0.02)
        assert heads[name] == pytest.approx(gates[i].mean((0, 2)).tolist(), rel=1e-12)


def test_tokens_of_several_parts_count_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MOST", 1000)
    gates, surprises = values(2500, 4, 1)
    whole, by_head = figures([[tally_of(gates, surprises)]])
    sizes = [100, 2000, 400]
    pairs = zip(gates.split(sizes, 1), surprises.split(sizes, 1), strict=True)
    found, heads = figures([[tally_of(*pair) for pair in pairs]])
    for name in ("theta/mean", "surprise", "gain"):
        assert found[name] == pytest.approx(whole[name], rel=1e-12)
    assert heads["surprise"] == pytest.approx(by_head["surprise"], rel=1e-12)
    assert found["eta/p50"] == pytest.approx(whole["eta/p50"], abs=0.05)


def spans_of(*told: tuple[int, int, int, int, float]) -> Spans:
    """(place, begun, last, tokens, value) of each; one head, one layer. The value is each gate's
    mean, the drift and (ten times) the momentum."""
    place, begun, last, tokens, value = (torch.tensor(x) for x in zip(*told, strict=True))
    sums = (value * tokens)[:, None, None, None].expand(-1, 3, 1, 1)
    drift = value[:, None]
    return Spans(place, begun.bool(), last.bool(), tokens, sums, drift, 10 * drift)


def test_a_span_that_goes_on_elsewhere_is_one() -> None:
    first = spans_of((1, 0, 1, 4, 0.5), (2, 0, 0, 2, 0.1), (2, 0, 1, 6, 0.2))
    second = spans_of((1, 1, 1, 12, 0.1), (2, 0, 1, 3, 0.3))
    gates, surprises = values(1, 1, 1)
    parts = [[Tally.of(gates, surprises, s, CHUNK, cut=True) for s in (first, second)]]
    whole = Spans.join([t.open for t in parts[0]]).whole()
    assert whole.place.tolist() == [1, 2, 2] and whole.tokens.tolist() == [16, 6, 3]
    assert (whole.gates[:, 0, 0, 0] / whole.tokens).tolist() == pytest.approx([0.2, 0.2, 0.3])
    found, heads = figures(parts)
    # Of four spans: the first by what its second part left, one that no other part could share.
    assert found["drift"] == pytest.approx((0.1 + 0.1 + 0.2 + 0.3) / 4)
    assert found["momentum"] == pytest.approx(10 * found["drift"])
    gate = torch.tensor(0.3)
    radius = stability_radius(gate, gate, gate, chunk=CHUNK).item()
    assert heads["radius"] == pytest.approx([radius])


def test_what_a_rank_sends_is_small() -> None:
    """Of a layer of 16 heads and 32,768 tokens 0.2 MB, once in `log.memory_every` steps. Gradients
    of its q, k and v alone, of width 1024 and in 2 bytes, are 30 times that in every step."""
    gates = torch.rand(3, 1 << 15, 16, 2)
    one = tally_of(gates, torch.rand(2, 1 << 15, 16), no_spans(16, 2))
    assert one.gates.shape == (3, 1025, 16)  # MOST values of each gate, and one more of each head
    tensors = 3 * 1025 * 16 * 4 + 5 * 16 * 8 + 16 * (8 + 8 + 4)
    assert one.bytes == tensors == 197_760
    assert tensors < len(pickle.dumps(one)) < tensors + 8192 < 3 * 1024 * 1024 * 2 / 30
