"""The language model: embedding -> blocks -> norm -> head; initialisation; decay groups.

Parameter names are stable: blocks sit in a dict by their global number, so that a pipeline stage
that keeps some of them keeps their names. A stage without `embedding` takes hidden states
[B, T, D] in place of tokens; one without `head` returns them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from titans_pretrain.config import ModelConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.memory.observe import unobserved
from titans_pretrain.model.blocks import RMSNorm, SwiGLU
from titans_pretrain.model.seams import ModelSeam
from titans_pretrain.model.variants import VARIANTS, ModelState


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) (Titans, section 4.4; Llama's macro block)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        D, eps = config.width, config.norm_eps
        self.mixer_norm = RMSNorm(D, eps, device=device, dtype=dtype)
        self.mixer = VARIANTS[config.variant].mixer(config, device=device, dtype=dtype)
        self.mlp_norm = RMSNorm(D, eps, device=device, dtype=dtype)
        self.mlp = SwiGLU(D, config.mlp_hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor, plan: Any, state: Any, carry: bool) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), plan, state, carry)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class TitansLM(nn.Module):
    """A causal language model; `config.variant` picks the token mixer.

    `recompute`: keep only each block's input for backward and run the block again there.
    Raises ConfigError when the vocabulary's size is not resolved.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set",
                "a model is built for one vocabulary",
                "set model.vocab_size, or take it from the data's manifest",
            )
        D, V = config.width, config.vocab_size
        self.config = config
        self.recompute = False
        self.seam = ModelSeam()
        self.embedding: nn.Module | None = nn.Embedding(V, D, device=device, dtype=dtype)
        self.blocks = nn.ModuleDict(
            {str(i): Block(config, device=device, dtype=dtype) for i in range(config.blocks)}
        )
        self.final_norm: nn.Module | None = RMSNorm(D, config.norm_eps, device=device, dtype=dtype)
        self.head: nn.Module | None = nn.Linear(D, V, bias=False, device=device, dtype=dtype)
        self._tie()
        for name, module in self.named_modules():
            if isinstance(module, MemoryLayer):
                module.name = name

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: ModelState | None = None,
        *,
        carry: bool = True,
    ) -> tuple[Tensor, ModelState | None]:
        """Logits of the next token, and the streaming state after the last token.

        tokens, positions [B, T] int64; positions -1 at pads, where the logits mean nothing.
        Positions are read on the CPU: leave them there when the tokens are elsewhere.
        state: what the last call returned for the same rows; rows whose first position is above 0
        continue exactly. carry=False returns None for the state and saves the work of forming it.
        Returns logits [B, T, V] and the state.
        """
        x = tokens if self.embedding is None else self.embedding(tokens)
        before = self.seam.before(positions)
        plan = VARIANTS[self.config.variant].plan(self.config, positions, state, x, before)
        after: dict[str, Any] = {}
        for name, block in self.blocks.items():
            kept = None if state is None else state[name]
            if self.recompute and torch.is_grad_enabled():
                x, after[name] = checkpoint(
                    block,
                    x,
                    plan,
                    kept,
                    carry,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=self._contexts,
                )
            else:
                x, after[name] = block(x, plan, kept, carry)
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.head is not None:
            x = self.head(x)
        return x, after if carry else None

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """In which a block is computed, and computed again for backward: its memory has been
        observed by then."""
        first, again = self.seam.contexts()
        return first, _unseen(again)

    def keep(self, blocks: range, *, first: bool, last: bool) -> TitansLM:
        """Forgets what is not in the piece of these blocks: what stands before them, unless it is
        the `first` piece, and what follows them, unless it is the `last`. Names stay."""
        for name in [name for name in self.blocks if int(name) not in blocks]:
            del self.blocks[name]
        if not first:
            self.embedding = None
        if not last:
            self.final_norm = self.head = None
        return self

    def _tie(self) -> None:
        if self.config.tied_embeddings and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TitansLM:
        super()._apply(fn, recurse)
        self._tie()  # to_empty gives each module a parameter of its own
        return self


@contextmanager
def _unseen(inside: AbstractContextManager[Any]) -> Iterator[None]:
    with inside, unobserved():
        yield


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to every tensor of a streaming state, e.g. `Tensor.detach`."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_state(value, change) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map_state(value, change) for value in state)
    if is_dataclass(state) and not isinstance(state, type):
        values = {f.name: map_state(getattr(state, f.name), change) for f in fields(state)}
        return type(state)(**values)
    return state


def initialise(model: TitansLM, seed: int) -> None:
    """Fills every parameter with `draw`: the same values on any device, in any order of modules.

    Works after building on the meta device and `to_empty`.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(model.config, name, tuple(parameter.shape), seed))


def draw(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The first value of the parameter `name`, whole, in float32 on the CPU.

    The generator is seeded by sha256 of "seed:name", so a shard is a slice of what one device has.

    | parameter                  | law                                                          |
    |----------------------------|--------------------------------------------------------------|
    | norms' gains               | 1                                                            |
    | memory's inner gain, bias  | 0.1, 0                                                       |
    | memory's first weights     | Xavier uniform a head                                        |
    | gates' biases              | theta a quarter of its ceiling, alpha 0.003, eta 0.6         |
    | convolutions               | uniform in +-1/2 (1 / sqrt(taps))                            |
    | learned queries            | normal, std 1 (only their direction counts)                  |
    | attention.o, memory.out,   |                                                              |
    |   mlp.down                 | normal, std sqrt(2 / (5 fan_in)) / sqrt(2 blocks)            |
    | memory.out of MAL          | normal, std sqrt(2 / (5 fan_in)): attention reads it, not    |
    |                            | the residual stream                                          |
    | all else, last axis fan_in | normal, std sqrt(2 / (5 fan_in)) (arXiv 1910.05895)          |

    The memory's LayerNorm multiplies each inner gradient by gain / std(F). With gain 1 and a last
    layer a tenth of Xavier that is about 130, an inner step overshoots far beyond the bound that
    theta is made for, and the outer gradient of a two-block MAC has norm 1e4 to 1e5 instead of 2.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    owner, _, leaf = name.rpartition(".")
    empty = torch.empty(shape)
    if owner.endswith("norm"):
        return empty.fill_(1)
    if leaf == "inner_gain":
        return empty.fill_(0.1)
    if leaf == "inner_bias":
        return empty.fill_(0)
    if owner.endswith(".initial"):
        bound = math.sqrt(6 / (shape[-2] + shape[-1]))
        return empty.uniform_(-bound, bound, generator=generator)
    if owner.endswith(".gates") and leaf == "bias":  # [H, L, 3]: theta, alpha, eta
        return torch.tensor([0.25, 0.003, 0.6]).logit().repeat(shape[0] // 3)
    if owner.endswith("_conv"):
        return empty.uniform_(-0.5, 0.5, generator=generator)
    if leaf == "asked":
        return empty.normal_(generator=generator)
    std = math.sqrt(2 / (5 * shape[-1]))
    inner = config.variant == "mal" and owner.endswith("memory.out")
    if owner.endswith((".o", ".down", ".out")) and not inner:
        std /= math.sqrt(2 * config.blocks)
    return empty.normal_(0, std, generator=generator)
