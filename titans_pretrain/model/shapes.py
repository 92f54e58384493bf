"""Parameters of a model by name and shape, from its config alone: no tensor is made."""

from __future__ import annotations

from titans_pretrain.config import ModelConfig
from titans_pretrain.memory.sizes import WIDTH
from titans_pretrain.model.counts import GATED, memory_shapes

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Path -> shape of every parameter of the unsharded model; a tied head has none. A model of
    unknown vocabulary has neither embedding nor head."""
    D = config.width
    table = {} if config.vocab_size is None else {"embedding.weight": (config.vocab_size, D)}
    shapes: Shapes = dict(table)
    block = block_shapes(config)
    for number in range(config.blocks):
        shapes |= {f"blocks.{number}.{path}": shape for path, shape in block.items()}
    shapes["final_norm.weight"] = (D,)
    if table and not config.tied_embeddings:
        shapes["head.weight"] = table["embedding.weight"]
    return shapes


def block_shapes(config: ModelConfig) -> Shapes:
    """Of one block, all being alike; paths below `blocks.N.`."""
    D, hidden = config.width, config.mlp_hidden
    mixer: Shapes = {}
    if config.variant in ("mac", "mag", "mal") and config.persistent_tokens:
        mixer["persistent"] = (config.persistent_tokens, D)
    if config.variant == "mac" and config.memory.retrieved == "learned":
        mixer["asked"] = (config.heads, config.memory.learned_queries, config.head_width)
    if config.variant != "lmm":
        mixer |= {f"attention.{path}": shape for path, shape in _attention(config).items()}
    if config.variant != "transformer":
        mixer |= {f"memory.{path}": shape for path, shape in _memory(config).items()}
    if config.variant == "mag":
        mixer["attention_norm.weight"] = (config.heads, config.head_width)
    return {
        "mixer_norm.weight": (D,),
        **{f"mixer.{path}": shape for path, shape in mixer.items()},
        "mlp_norm.weight": (D,),
        "mlp.gate.weight": (hidden, D),
        "mlp.up.weight": (hidden, D),
        "mlp.down.weight": (D, hidden),
    }


def _read(config: ModelConfig) -> int:
    """Features that a head reads between attention and the block's output."""
    return config.head_width if config.memory.projections == "block_diagonal" else config.width


def _attention(config: ModelConfig) -> Shapes:
    D, kv = config.width, config.kv_width
    shapes: Shapes = {"q.weight": (D, D), "k.weight": (kv, D), "v.weight": (kv, D)}
    if config.variant != "mag":  # there the memory's `out` serves both
        shapes["o.weight"] = (D, _read(config))
    return shapes


def _memory(config: ModelConfig) -> Shapes:
    D, H, d, L = config.width, config.heads, config.head_width, config.memory.depth
    shapes: Shapes = {}
    if config.memory.residual_norm:
        shapes |= {"inner_gain": (H, d), "inner_bias": (H, d)}
    shapes |= {f"{name}.weight": (D, _read(config)) for name in "qkv"}
    shapes |= {f"{name}_conv.weight": (D, WIDTH) for name in "qkv"}
    shapes |= {"gates.weight": (3 * H * L, _read(config)), "gates.bias": (3 * H * L,)}
    shapes |= {f"initial.{n}": (H, a, o) for n, (a, o) in enumerate(memory_shapes(config))}
    shapes["read_norm.weight"] = (H, d)
    if config.variant in GATED:
        shapes["output_gate.weight"] = (D, D)
    return shapes | {"out.weight": (D, D)}


def kind(name: str) -> str:
    """The optimizer group of a parameter: "decay" | "no_decay" | "gate" | "fast_init"."""
    if ".gates." in name:
        return "gate"
    if ".initial." in name:
        return "fast_init"
    owner, _, leaf = name.rpartition(".")
    matrix = leaf == "weight" and not owner.endswith(("norm", "_conv"))
    return "decay" if matrix else "no_decay"
