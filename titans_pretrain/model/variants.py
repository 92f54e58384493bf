"""The wirings: what mixes tokens inside a block, one entry in VARIANTS each.

A variant is two things: `plan`, which reads the documents off the positions once a forward, and
`mixer`, a module `(x, plan, state, carry) -> (x, state)` on the pre-normed block input [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.hybrids import MagMixer, MalMixer
from titans_pretrain.model.mac import MacMixer
from titans_pretrain.model.mixers import LmmMixer, ModelState, TransformerMixer, memory_layer

__all__ = ["VARIANTS", "ModelState", "Variant"]


def mac_mixer(config: ModelConfig, **where: Any) -> MacMixer:
    return MacMixer(config, memory_layer(config, output_gate=False, **where), **where)


@dataclass(frozen=True)
class Variant:
    mixer: Callable[..., nn.Module]  # (config, device=, dtype=)
    # (config, positions, state, a tensor of the device and dtype that blocks work in, and of tokens
    # before whose state is handed over the positions, or None)
    plan: Callable[..., Any]


VARIANTS: dict[str, Variant] = {
    "transformer": Variant(TransformerMixer, TransformerMixer.plan),
    "lmm": Variant(LmmMixer, LmmMixer.plan),
    "mac": Variant(mac_mixer, MacMixer.plan),
    "mag": Variant(MagMixer, MagMixer.plan),
    "mal": Variant(MalMixer, MalMixer.plan),
}
