"""Which consecutive blocks each piece of a model gets: each pipeline stage has one, or several."""

from __future__ import annotations

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.counts import flops_per_token
from titans_pretrain.parallel.layout import split_blocks


def cut_blocks(config: ModelConfig, pieces: int, sequence_length: int) -> list[range]:
    """The blocks of each piece, in order, so that the dearest piece is as cheap as can be; FLOPs
    decide (model/counts.py). The head counts with the last piece; the embedding before the first
    one is a lookup, which takes none."""
    flops = flops_per_token(config, sequence_length)
    head = flops.pop("head")
    block = sum(flops.values()) / config.blocks
    return split_blocks([block] * config.blocks, head, pieces)
