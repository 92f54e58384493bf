"""Parameters and floating point operations of a model, by part, from its config alone.

Letters: D width, H heads, d head width, L memory layers of widths d, m d, .., d, C chunk,
G segment, P persistent tokens, R memory tokens of a segment, T tokens of a document.
"""

from __future__ import annotations

from functools import lru_cache

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.sizes import WIDTH

GATED = ("lmm", "mal")  # variants whose memory has an output gate


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; a tied head counts 0. `fast_init`: the memory's first weights."""
    D, H, L, kv = config.width, config.heads, config.memory.depth, config.kv_width
    vocabulary = (config.vocab_size or 0) * D
    attention = memory = fast = 0
    if config.variant != "lmm":
        attention = 2 * D * (D + kv)
    if config.variant == "mag":
        attention += D - D * D  # the norm of what attention reads; the memory's `out` for both
    if config.variant != "transformer":
        maps = 5 if config.variant in GATED else 4  # q, k, v, out, and the output gate
        gates = (D + 1) * H * L * 3
        memory = maps * D * D + 3 * WIDTH * D + gates + D  # + convolutions, and the read's norm
        memory += 2 * D * config.memory.residual_norm
        fast = memory_elements(config)
    if config.memory.projections == "block_diagonal":  # attention.o; q, k, v and gates
        attention -= D * D - D * config.head_width
        memory -= (3 * D + 3 * H * L) * (D - config.head_width)
    if config.variant in ("mac", "mag", "mal"):
        memory += config.persistent_tokens * D
    if config.variant == "mac" and config.memory.retrieved == "learned":
        memory += config.memory.learned_queries * D
    return {
        "embedding": vocabulary,
        "head": 0 if config.tied_embeddings else vocabulary,
        "norms": (2 * config.blocks + 1) * D,
        "mlp": config.blocks * 3 * D * config.mlp_hidden,
        "attention": config.blocks * attention,
        "memory": config.blocks * memory,
        "fast_init": config.blocks * fast,
    }


def flops_per_token(
    config: ModelConfig, sequence_length: int, *, useful: bool = False
) -> dict[str, float]:
    """Forward FLOPs of a token by part, averaged over one document of `sequence_length` tokens.

    A multiply-add is 2; only matrix products count. By default masked scores count like others, as
    they are computed; with `useful` only the pairs of tokens that a mask lets through do. Left out
    are the memory's coefficients, which depend on neither d nor h, and the 2 x 2 products that
    carry (W, S) over a chunk. The backward pass is 2x, with block recompute 3x. The document fills
    whole chunks and segments. What persistent tokens cost once a forward counts as this document's.
    """
    D, H, C, G = config.width, config.heads, config.memory.chunk, config.segment
    T, P, spec, kv = sequence_length, config.persistent_tokens, config.memory, config.kv_width
    shapes = memory_shapes(config)
    products = sum(a * o for a, o in shapes)
    flops = {
        "mlp": 6.0 * D * config.mlp_hidden,
        "attention_maps": 0.0,
        "attention": 0.0,
        "memory_maps": 0.0,
        "memory": 0.0,
        "retrieval": 0.0,
    }
    if config.variant != "transformer":
        maps = 4 + (config.variant in GATED)
        if config.variant == "mac" and spec.retrieved != "learned":
            maps = 5  # the queries of X and of Y
        flops["memory_maps"] = 2.0 * D * (maps * D + 3 * H * spec.depth)
        # Keys forward, reads of W and S, updates of W and S; the inner backward stops at layer 2.
        # Decay toward the first weights adds their own reads.
        whole = 5 * products + sum(a * o for a, o in shapes[1:])
        whole += products * (spec.decay_to == "init")
        pairs = (C + 1) / 2 if useful else C
        flops["memory"] = H * 2.0 * (whole + pairs * sum(a + o for a, o in shapes))
    if config.variant in ("transformer", "mag", "mal"):
        window = config.attention_window or T
        seen = sum(min(t + 1, window) for t in range(T)) / T if useful else T
        flops["attention_maps"], flops["attention"] = 4.0 * D * (D + kv), 4.0 * D * seen
    if config.variant in ("mag", "mal"):
        # Persistent tokens: through the memory, in whole chunks, then keys and values.
        flops["memory"] *= 1 + -(-P // C) * C / T
        maps = 5 if config.variant == "mal" else 3  # MAG drops what is read there
        flops["memory_maps"] += 2.0 * D * (maps * D + 3 * H * spec.depth) * P / T
        flops["attention_maps"] += 4.0 * D * kv * P / T
        flops["attention"] += 4.0 * D * P
    if config.variant == "mag":
        flops["attention_maps"] -= 2.0 * D * D  # the memory's `out` serves both
    if config.variant == "mac":
        pool, R = spec.pool, config.retrieved_tokens
        seen = P + R + G
        if useful:
            past = sum((i + 1) // pool for i in range(G)) / G if pool else R
            seen = P + past + (G + 1) / 2
        # Keys and values of memory tokens, and, once a forward, of persistent ones.
        mapped = 4.0 * D * (D + kv) + 4.0 * D * kv * (R / G + P / T)
        flops["attention_maps"], flops["attention"] = mapped, 4.0 * D * seen
        flops["retrieval"] = H * 2.0 * products * R / G
        if spec.projections == "block_diagonal":  # a head's d features in place of all D
            saved = 2.0 * D * (D - config.head_width)
            flops["memory_maps"] *= config.head_width / D
            flops["memory_maps"] += saved  # but `out` is whole
            flops["attention_maps"] -= saved + 2.0 * (2.0 * D * (kv - config.head_width)) * R / G
    total = {part: config.blocks * n for part, n in flops.items()}
    total["head"] = 2.0 * D * (config.vocab_size or 0)
    return total


def memory_shapes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """The layers (a, o) of a head's memory."""
    return _shapes(config.memory.depth, config.memory.expansion, config.head_width)


def memory_elements(config: ModelConfig) -> int:
    """Fast weights of a block, all heads together."""
    return config.heads * sum(a * o for a, o in memory_shapes(config))


@lru_cache
def _shapes(depth: int, expansion: int, head_width: int) -> tuple[tuple[int, int], ...]:
    return MemorySpec(depth=depth, expansion=expansion).shapes(head_width)
