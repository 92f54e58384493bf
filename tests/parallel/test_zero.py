"""Every layout and ZeRO stage through Megatron and DeepSpeed against one plain process, in fp32."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import parity_config
from tests.parallel.through_zero import assert_equals_one_plain_process

# With heads of 4 features, as in the float64 tests, and the usual rate of 1e-2, the plain process
# itself, its weights changed by 1e-7, goes 3e-3 of its way elsewhere in 20 steps; so it is 3e-5.
WELL_CONDITIONED = {"model__width": 64, "model__heads": 4, "optim__lr": 3e-3}

# Ranks and degrees.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2 Z1": (2, {"zero": {"stage": 1}}),
    "DP2 Z2": (2, {"zero": {"stage": 2}}),
    "DP2 Z3": (2, {"zero": {"stage": 3}}),
    "DP2 Z1 offloaded": (2, {"zero": {"stage": 1, "offload": True}}),
    "DP2 Z2 offloaded": (2, {"zero": {"stage": 2, "offload": True}}),
    "DP2 Z3 offloaded": (2, {"zero": {"stage": 3, "offload": True}}),
    "DP2 Z2 overlapped": (2, {"zero": {"stage": 2, "overlap": True, "bucket": 5000}}),
    "TP2 DP2 Z1": (4, {"tensor": 2}),
    "TP2 DP2 Z2": (4, {"tensor": 2, "zero": {"stage": 2}}),
    "TP2+SP DP2 Z3": (4, {"tensor": 2, "sequence": True, "zero": {"stage": 3}}),
    "PP2 x 2": (2, {"pipeline": 2, "interleave": 2}),
    "PP2 DP2": (4, {"pipeline": 2}),
    "TP2 PP2+SP": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "CP2 PP2": (4, {"context": 2, "pipeline": 2}),
}


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mag", "mal"])
def test_twenty_steps_of_every_variant_under_zero_3(variant: str) -> None:
    config = parity_config(variant, {"zero": {"stage": 3}}, **WELL_CONDITIONED)
    assert_equals_one_plain_process(config, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_mac(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    assert_equals_one_plain_process(parity_config("mac", parallel, **WELL_CONDITIONED), ranks)
