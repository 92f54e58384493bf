"""Bytes that a forward keeps for its backward, by kind, from the config alone.

Letters as in counts.py; e bytes of the model's dtype, w of what is computed widely (4, or 8 for
float64). A row is one document. What depends on neither tokens nor states is left out, but for wide
copies of weights. The attention is a fused kernel: no score is kept.
"""

from __future__ import annotations

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.sizes import TAIL, WIDTH, runs
from titans_pretrain.model.counts import memory_elements


def saved_bytes(
    config: ModelConfig,
    rows: int,
    tokens: int,
    element: int,
    *,
    blocks: int | None = None,
    head: bool = True,
    tensor: int = 1,
    sequence: bool = False,
    handed: bool = False,
) -> dict[str, float]:
    """Of one micro-batch of rows [B, T], without block recompute, on one rank.

    Args:
        tokens: T; of a context rank its share. handed: whether a rank before hands states over.
        element: e, bytes of the model's dtype.
        blocks: of a pipeline stage; default all. head: whether the stage ends in the loss.
        tensor, sequence: ranks that share the layers, and whether they split the stream.
    Returns:
        Bytes by kind: "stream" (norms and what the maps into mixers and MLPs read), "mixers",
        "mlps", "memory states" (weights and momentum at boundaries), "masks" (and rotations,
        shared by all blocks), "logits".
    """
    D, e, w = config.width, element, max(4, element)
    blocks = config.blocks if blocks is None else blocks
    n, split = rows * tokens, tensor if sequence else 1
    norm = (2 * D * w + w) / split  # input, output, scale
    # Maps read all tokens, even where the stream is divided.
    stream = 2 * (norm + D * e)
    mixer, states = _MIXERS[config.variant](config, rows, tokens, e, w)
    whole = _whole(config, n, e)
    if handed and config.variant != "transformer":
        states += 2 * memory_elements(config) * w
    copies = _copies(config, tokens) * w if e < w else 0
    turned = 0 if config.variant == "lmm" else config.head_width  # cosines and sines
    logits = norm + D * e + (config.vocab_size or 0) * w / tensor
    return {
        "stream": blocks * n * stream,
        "mixers": blocks * ((n * mixer + copies) / tensor + n * whole * (1 - 1 / tensor)),
        "mlps": blocks * n * 4 * config.mlp_hidden * e / tensor,
        "memory states": blocks * rows * states / tensor,
        "masks": _masks(config, rows, tokens, e) + n * turned * w,
        "logits": n * logits * head,
    }


def boundaries(steps: int) -> int:
    """States that the memory keeps inside so many chunks."""
    return max(0, len(runs(steps)) - 1)


def _conv(config: ModelConfig, w: int, tokens: int) -> float:
    """A token through one convolution: input, shifted rows, sum."""
    return (3 * config.width + TAIL * config.width / tokens) * w


def _written(config: ModelConfig, e: int, w: int, tokens: int) -> float:
    """A token written into the memory and read: convolutions, unit norms, gates, (q, k, v)."""
    D, H, L = config.width, config.heads, config.memory.depth
    unit = (D + 2 * H) * w
    gates = (3 + 2 + 1) * H * L * w + (D * w if e < w else 0)
    return 3 * _conv(config, w, tokens) + 2 * unit + gates + 3 * D * w


def _normed(config: ModelConfig, w: int) -> float:
    return (2 * config.width + config.heads) * w


def _copies(config: ModelConfig, tokens: int) -> float:
    """Wide copies of the weights of a mixer's memory; each call makes its own."""
    if config.variant == "transformer":
        return 0
    D, H, L = config.width, config.heads, config.memory.depth
    reads = config.head_width if config.memory.projections == "block_diagonal" else D
    call = 3 * WIDTH * D + 3 * H * L * reads + memory_elements(config) + 3 * D
    if config.variant == "mac":
        segments = -(-tokens // config.segment)
        return segments * call + memory_elements(config) + WIDTH * D
    return call * (2 if config.variant in ("mag", "mal") and config.persistent_tokens else 1)


def _whole(config: ModelConfig, n: int, e: int) -> float:
    """Of a token's bytes in a mixer those that every rank has, which shares its layers or not: what
    goes from heads to heads."""
    D, P = config.width, config.persistent_tokens
    if config.variant == "mac" and config.memory.projections == "dense":
        return (1 + config.retrieved_tokens / config.segment) * D * e  # Y, h
    return (1 + P / n) * D * e if config.variant == "mal" else 0.0  # what the memory says


def _masks(config: ModelConfig, rows: int, tokens: int, e: int) -> float:
    """What attention adds to scores: none for one document that is seen whole."""
    P, G, window = config.persistent_tokens, config.segment, config.attention_window
    if config.variant == "lmm":
        return 0
    if config.variant == "mac":
        return tokens * (P + config.retrieved_tokens + G) * e
    P = 0 if config.variant == "transformer" else P
    whole = P == 0 and (window is None or window >= tokens)
    return 0 if whole else rows * tokens * (P + tokens) * e


def _attended(config: ModelConfig, e: int, tokens: int) -> float:
    """A token through attention: q, k, v, what was read."""
    P = config.persistent_tokens if config.variant in ("mag", "mal") else 0
    kept = 2 * config.width * (1 + P / tokens)  # keys and values, written out for each head
    return (2 * config.width + kept) * e + 4 * config.heads


Kept = tuple[float, float]  # bytes of a token, in all maps and products; bytes of a row, of states


def _transformer(config: ModelConfig, rows: int, tokens: int, e: int, w: int) -> Kept:
    return _attended(config, e, tokens) + config.width * e * (config.heads > 1), 0.0


def _lmm(config: ModelConfig, rows: int, tokens: int, e: int, w: int) -> Kept:
    kept = boundaries(-(-tokens // config.memory.chunk))
    mixer = _written(config, e, w, tokens) + _normed(config, w) + 4 * config.width * e
    return mixer, 2.0 * memory_elements(config) * kept * w


def _prefixed(config: ModelConfig, rows: int, tokens: int, w: int) -> Kept:
    """Persistent tokens as part of a token, and the states; they are the same for all rows."""
    P, C = config.persistent_tokens, config.memory.chunk
    kept = boundaries(-(-tokens // C)) + (bool(P) + boundaries(-(-P // C))) / rows
    return P / (rows * tokens), 2.0 * memory_elements(config) * kept * w


def _mag(config: ModelConfig, rows: int, tokens: int, e: int, w: int) -> Kept:
    more, states = _prefixed(config, rows, tokens, w)
    mixer = (1 + more) * _written(config, e, w, tokens) + _attended(config, e, tokens)
    mixer += 2 * _normed(config, w) + 3 * config.width * w + config.width * e
    return mixer, states


def _mal(config: ModelConfig, rows: int, tokens: int, e: int, w: int) -> Kept:
    more, states = _prefixed(config, rows, tokens, w)
    lmm = _written(config, e, w, tokens) + _normed(config, w) + 4 * config.width * e
    mixer = (1 + more) * lmm + _attended(config, e, tokens)
    # What attention's maps read, and what its output's reads: with one head that is at hand.
    mixer += (1 + more + (config.heads > 1)) * config.width * e
    return mixer, states


def _mac(config: ModelConfig, rows: int, tokens: int, e: int, w: int) -> Kept:
    D, H, G, P = config.width, config.heads, config.segment, config.persistent_tokens
    R = config.retrieved_tokens / G  # memory tokens of a token
    asked = (_conv(config, w, tokens) + (D + 2 * H) * w) if config.memory.pool else 0.0
    hidden = config.memory.expansion * D * (config.memory.depth - 1)
    # Queries; before and after each activation; the norm's input and output; h.
    asked += R * (D * w + 2 * hidden * w + 2 * (D + H) * w + D * e)
    attended = (3 * D + D) * e + 2 * D * (1 + R + P / G) * e + 4 * H  # of (q, k, v) q is read
    written = _written(config, e, w, min(tokens, G)) + D * e  # Y
    out = _normed(config, w) + D * w + D * e + (D * e if e < w else 0)
    segments = -(-tokens // G)
    kept = segments * boundaries(-(-min(tokens, G) // config.memory.chunk))
    # Between segments weights and momentum. For what asks: the weights, where they are kept as
    # differences from the first ones; the first ones, where several rows have a copy each.
    asked_of = (segments - 1) * (config.memory.decay_to == "init") + (rows > 1 < H)
    states = memory_elements(config) * (2 * kept + 2 * (segments - 1) + asked_of) * w
    if config.memory.projections == "block_diagonal":  # blocks of attention's k and v, each time
        asked += 2 * D * config.head_width * e / (rows * G)
    return asked + attended + written + out, states


_MIXERS = {
    "transformer": _transformer,
    "lmm": _lmm,
    "mac": _mac,
    "mag": _mag,
    "mal": _mal,
}
