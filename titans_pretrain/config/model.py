"""The sections `model` and `model.memory`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from titans_pretrain.config.section import (
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    nearest_divisor,
)


class MemoryConfig(Section):
    """The neural long-term memory (Titans, arXiv 2501.00663, section 3)."""

    rule: Literal["titans"] = "titans"  # memory/rules.py
    depth: Annotated[int, Field(ge=1, le=3)] = 2
    expansion: Positive = 4  # hidden width of the memory MLP = expansion * head width
    activation: Literal["gelu", "silu"] = "gelu"
    residual_norm: bool = True  # M(x) = x + LayerNorm(F(x)); false: M(x) = F(x)
    chunk: Positive = 16  # tokens whose gradients share one anchor: part of the function
    decay_to: Literal["init", "zero"] = "init"
    read: Literal["inclusive", "exclusive"] = "inclusive"  # read at W_t or at W_{t-1}
    retrieved: Literal["pool1", "pool2", "learned"] = "pool1"  # MAC: where memory tokens come from
    learned_queries: Positive = 256  # MAC with retrieved=learned: memory tokens a segment
    # MAC: between attention and the block's output a head sees all heads, or its own features only
    # (a deviation from the paper, which then takes no collective under tensor parallelism there).
    projections: Literal["dense", "block_diagonal"] = "dense"

    @property
    def pool(self) -> int | None:
        """Queries averaged into one memory token; None: learned queries, which need no token."""
        return {"pool1": 1, "pool2": 2, "learned": None}[self.retrieved]


class ModelConfig(Section):
    """A stack of blocks; `variant` picks the wiring of its token mixer."""

    variant: Literal["mac", "mag", "mal", "lmm", "transformer"] = "mac"
    blocks: Positive = 12
    width: Positive = 768
    heads: Positive = 16
    kv_heads: Positive | None = None  # attention: heads of keys and values; default: as many
    mlp_width: Positive | None = None  # SwiGLU hidden width; default 8/3 width, rounded up to 64
    vocab_size: Positive | None = None  # default: the tokenizer's size, from the manifest
    tied_embeddings: bool = False
    persistent_tokens: NonNegative = 128  # learned vectors before each document (MAC: segment)
    segment: Positive = 512  # MAC: tokens of one attention segment
    # Sliding window of attention; default: 2048 in MAG and MAL, the transformer's whole document.
    window: Positive | None = None
    rope_base: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, exclude=True)  # there is none; other values are refused
    memory: MemoryConfig = MemoryConfig()

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of attention's keys and values."""
        return (self.kv_heads or self.heads) * self.head_width

    @property
    def mlp_hidden(self) -> int:
        return self.mlp_width or -(-8 * self.width // (3 * 64)) * 64

    @property
    def attention_window(self) -> int | None:
        """Tokens that attention sees back, itself included; None: the whole document."""
        if self.variant in ("mag", "mal"):
            return self.window or 2048
        return self.window

    @property
    def retrieved_tokens(self) -> int:
        """Memory tokens of one segment of MAC."""
        pool = self.memory.pool
        return self.segment // pool if pool else self.memory.learned_queries

    @property
    def alignment(self) -> int:
        """Each packed document is padded to a multiple of so many tokens: the memory's chunk."""
        return 1 if self.variant == "transformer" else self.memory.chunk

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width}, model.heads={self.heads}; heads must divide width; "
                f"try model.heads={nearest_divisor(self.width, self.heads)}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.width/model.heads={self.head_width}; rotary embeddings need an even head "
                "width; change model.width or model.heads"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads}, model.kv_heads={self.kv_heads}; heads of queries share "
                "those of keys and values evenly: kv_heads must divide heads; "
                f"try model.kv_heads={nearest_divisor(self.heads, self.kv_heads)}"
            )
        if self.dropout:
            raise ValueError(
                f"model.dropout={self.dropout}; there is no dropout: its random states, one a rank "
                "(Megatron's RNG tracker), would have to be kept over recompute and in checkpoints "
                "for a run to resume exactly; remove model.dropout"
            )
        if self.variant != "mac" and self.memory.projections == "block_diagonal":
            raise ValueError(
                f"model.memory.projections=block_diagonal, model.variant={self.variant}; it saves "
                "the collectives between attention and memory, which MAC alone has; remove "
                "model.memory.projections, or set model.variant=mac"
            )
        chunk = self.memory.chunk
        if self.variant == "mac" and self.segment % chunk:
            raise ValueError(
                f"model.segment={self.segment}, model.memory.chunk={chunk}; a segment must be a "
                "whole number of chunks; "
                f"try model.segment={max(chunk, self.segment // chunk * chunk)}"
            )
        if self.variant == "mac" and self.memory.retrieved == "pool2" and self.segment % 2:
            raise ValueError(
                f"model.segment={self.segment}, model.memory.retrieved=pool2; queries are pooled "
                "by two; use an even model.segment"
            )
        return self
