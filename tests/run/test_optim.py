"""Learning rates against hand values; parameter groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans_pretrain.config import OptimConfig
from titans_pretrain.run.optim import learning_rate, param_groups


def test_cosine_with_warm_up_hits_the_hand_values():
    o = OptimConfig(lr=1e-3, min_lr=1e-4, schedule="cosine", warmup_steps=10)
    rates = {s: learning_rate(s, o, 110) for s in range(1, 111)}
    assert rates[1] == pytest.approx(1e-4, rel=1e-12)
    assert rates[5] == pytest.approx(5e-4, rel=1e-12)
    assert rates[10] == 1e-3  # the peak, once
    assert rates[35] == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert rates[60] == pytest.approx(5.5e-4, rel=1e-12)  # half way down
    assert rates[110] == pytest.approx(1e-4, rel=1e-12)
    assert learning_rate(500, o, 110) == rates[110]
    assert sorted(rates.values(), key=lambda r: -r)[0] == rates[10]


def test_wsd_holds_the_peak_and_then_falls_in_a_line():
    o = OptimConfig(lr=2e-3, min_lr=0.0, schedule="wsd", warmup_steps=4, decay_steps=10)
    rates = [learning_rate(s, o, 50) for s in range(1, 51)]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3], rel=1e-12)
    assert rates[4:40] == [2e-3] * 36
    assert rates[40:] == pytest.approx([2e-3 * k / 10 for k in range(9, -1, -1)], abs=1e-18)


def test_wsd_without_decay_and_constant_hold_the_peak_to_the_end():
    wsd = OptimConfig(lr=0.5, min_lr=0.1, schedule="wsd", warmup_steps=2)
    constant = OptimConfig(lr=0.5, min_lr=0.1, schedule="constant", warmup_steps=2)
    for o in (wsd, constant):
        assert [learning_rate(s, o, 5) for s in range(1, 6)] == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    o = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=100)
    assert [learning_rate(s, o, 3) for s in (1, 2, 3)] == [0.01, 0.02, 0.03]
    assert learning_rate(3, OptimConfig(lr=1.0, warmup_steps=3), 3) == 1.0


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(1, 300),
    st.integers(0, 300),
    st.integers(0, 300),
    st.floats(0, 1),
)
def test_rates_stay_between_zero_and_the_peak_and_never_jump(schedule, steps, warm, decay, floor):
    warm, decay = min(warm, steps), min(decay, steps - min(warm, steps))
    o = OptimConfig(lr=1.0, min_lr=floor, schedule=schedule, warmup_steps=warm, decay_steps=decay)
    rates = [learning_rate(s, o, steps) for s in range(1, steps + 1)]
    assert all(0 <= r <= 1 for r in rates)
    assert all(r >= floor - 1e-12 for r in rates[warm:])
    falls = [b - a for a, b in zip(rates[warm:], rates[warm + 1 :])]
    assert all(d <= 1e-12 for d in falls)


def _parameters():
    names = ["embed.weight", "block.norm.gain", "block.mlp.weight", "block.gate.weight", "w0"]
    return [(n, torch.nn.Parameter(torch.ones(2) * i)) for i, n in enumerate(names)]


KIND = {
    "embed.weight": "no_decay",
    "block.norm.gain": "no_decay",
    "block.mlp.weight": "decay",
    "block.gate.weight": "gate",
    "w0": "fast_init",
}


def test_groups_hold_each_parameter_once_with_its_own_rate_and_decay():
    o = OptimConfig(
        lr=1e-2,
        weight_decay=0.1,
        gate_lr_scale=0.5,
        gate_weight_decay=0.01,
        init_lr_scale=3.0,
        init_weight_decay=0.02,
    )
    groups = param_groups(_parameters(), KIND.__getitem__, o)
    told = {g["kind"]: (g["names"], g["lr"], g["weight_decay"]) for g in groups}
    assert told == {
        "decay": (["block.mlp.weight"], 1e-2, 0.1),
        "no_decay": (["embed.weight", "block.norm.gain"], 1e-2, 0.0),
        "gate": (["block.gate.weight"], 5e-3, 0.01),
        "fast_init": (["w0"], 3e-2, 0.02),
    }
    assert [len(g["params"]) for g in groups] == [1, 2, 1, 1]
    assert [g["lr_scale"] for g in groups] == [1.0, 1.0, 0.5, 3.0]


def test_empty_groups_and_frozen_parameters_are_left_out_and_unknown_kinds_named():
    parameters = _parameters()
    parameters[3][1].requires_grad_(False)
    groups = param_groups(parameters, KIND.__getitem__, OptimConfig())
    assert [g["kind"] for g in groups] == ["decay", "no_decay", "fast_init"]
    with pytest.raises(ValueError, match=r"embed\.weight is of kind 'matrix'"):
        param_groups(parameters, lambda name: "matrix", OptimConfig())
