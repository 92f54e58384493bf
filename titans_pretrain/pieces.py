"""The pieces of the model that a rank holds: built without memory, cut, placed, then filled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from titans_pretrain.config import ModelConfig
from titans_pretrain.cut import cut_blocks
from titans_pretrain.model.titans import TitansLM, draw
from titans_pretrain.parallel.layout import Layout, Shard
from titans_pretrain.parallel.plan import plan_of, styles
from titans_pretrain.parallel.tensor import fill, mark, shard_model, shards_of

EMBEDDING, HEAD = "embedding.weight", "head.weight"


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks; with what stands before them in the first, with the head in the last."""

    model: TitansLM
    first: bool
    last: bool


@dataclass(frozen=True)
class Pieces:
    """What a rank holds, in order: one piece, or `interleave` of them."""

    pieces: tuple[Piece, ...]
    root: nn.Module  # of all their parameters
    shards: dict[str, Shard]  # by the path in root
    repeated: tuple[str, ...]  # paths of what another stage holds, too, and stands for

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)


def build_pieces(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    recompute: bool,
    sequence_length: int,
) -> Pieces:
    """This rank's pieces; each parameter is the slice of what one device would have.

    Raises ConfigError where the tensor-parallel plan does not fit the model.
    """
    with torch.device("meta"):
        whole = TitansLM(config, dtype=dtype)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    style = styles(plan_of(config, sequence=layout.parallel.sequence), shapes, layout.tensor)
    names = {HEAD: EMBEDDING} if config.tied_embeddings else {}
    place, cuts = layout.place(rank), cut_blocks(config, layout.pieces, sequence_length)
    built: list[Piece] = []
    for number in range(place.pipeline, layout.pieces, layout.pipeline):
        first, last = number == 0, number == layout.pieces - 1
        with torch.device("meta"):
            model = TitansLM(config, dtype=dtype).keep(cuts[number], first=first, last=last)
            shard_model(model, layout, style, names)
        model = model.to_empty(device=device)
        model.recompute = recompute
        built.append(Piece(model, first, last))
    root = built[0].model if len(built) == 1 else nn.ModuleList(p.model for p in built)
    shards = shards_of(root, shapes, style, layout, rank, _by_root(root, names))
    mark(root, shards, style)
    fill(root, shards, lambda name, shape: draw(config, name, shape, seed))
    # A tied head on another stage than the embedding: equal values, equal gradients.
    tied = tuple(path for path in shards if path.endswith(HEAD)) if names else ()
    return Pieces(tuple(built), root, shards, tied)


def _by_root(root: nn.Module, names: dict[str, str]) -> dict[str, str]:
    """Path in root -> unsharded name."""
    if isinstance(root, TitansLM):
        return names
    found = {}
    for path, _ in root.named_parameters():
        name = path.partition(".")[2]  # without the number of the piece
        found[path] = names.get(name, name)
    return found
