"""Divides a plain model among the ranks of a tensor-parallel group, from outside.

The model is built whole on the meta device; the plan says what each parameter becomes. Linear
layers and the embedding become Megatron's; what belongs to heads is cut and stays as it is, and so
the memory's inner loop runs on its rank without a word to others.

Between layers tokens are whole [B, T, D], or under sequence parallelism [B, T / ranks, D]. Inside a
mixer or MLP they are whole: one collective leads in, one leads out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_pretrain.parallel import compat
from titans_pretrain.parallel.layout import Layout, Shard
from titans_pretrain.parallel.megatron import ModelParallelConfig, parallel_state
from titans_pretrain.parallel.megatron import tensor_parallel as megatron
from titans_pretrain.parallel.plan import AXIS, ENTRANCES, Style


def _time_first(x: Tensor) -> Tensor:
    """[B, T, D] <-> [T, B, D]: Megatron splits and gathers tokens along the first axis."""
    return x.transpose(0, 1).contiguous()


class Columns(megatron.ColumnParallelLinear):
    """This rank's outputs; the input has been led in already."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Rows(megatron.RowParallelLinear):
    """The sum over the ranks of what their inputs give; the stream's share of it where tokens are
    split between layers."""

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return _time_first(super().forward(_time_first(x))[0])
        return super().forward(x)[0]


class RowsInside(megatron.RowParallelLinear):
    """The sum over the ranks, of which each then has use for a part: gradients are summed, too."""

    def forward(self, x: Tensor) -> Tensor:
        return megatron.copy_to_tensor_model_parallel_region(super().forward(x)[0])


class Vocabulary(megatron.VocabParallelEmbedding):
    """Rows of tokens [B, T], each looked up where it is held."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        return _time_first(x) if self.reduce_scatter_embeddings else x


class _GatherHeads(nn.Module):
    """Features of this rank's heads -> of all heads, which each rank then uses in part."""

    def forward(self, x: Tensor) -> Tensor:
        return megatron.all_gather_last_dim_from_tensor_parallel_region(x)


class _ScatterHeads(nn.Module):
    """Features of all heads -> of this rank's heads. The sum of gradients is the input's own."""

    def forward(self, x: Tensor) -> Tensor:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return x.chunk(ranks, dim=-1)[parallel_state.get_tensor_model_parallel_rank()]


class _Entrance:
    """Leads the stream into a module: whole tokens forward, summed gradients backward."""

    def __init__(self, sequence: bool) -> None:
        self.sequence = sequence

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if self.sequence:
            x = _time_first(megatron.gather_from_sequence_parallel_region(_time_first(x)))
        else:
            x = megatron.copy_to_tensor_model_parallel_region(x)
        return x, *rest


def shard_model(
    model: nn.Module, layout: Layout, styles: Mapping[str, Style], names: Mapping[str, str]
) -> None:
    """Puts this rank's pieces in place of the model's parameters; on the meta device, before
    values. `styles` may speak of more parameters than this piece of the model has; `names`: path ->
    unsharded name, where they differ."""
    tensor, sequence = layout.tensor, layout.parallel.sequence
    if tensor == 1:
        return
    dtype = next(model.parameters()).dtype
    settings = {
        "tensor_model_parallel_size": tensor,
        "params_dtype": dtype,
        "use_cpu_initialization": True,  # allocate on the current device, here meta
        "perform_initialization": False,
    }
    inside = ModelParallelConfig(**settings)
    stream = ModelParallelConfig(**settings, sequence_parallel=sequence)
    for path in [name for name, _ in model.named_parameters(remove_duplicate=False)]:
        style, (module, leaf) = styles[names.get(path, path)], _owner(model, path)
        new: nn.Module | None = None
        if isinstance(module, nn.Linear) and style in ("col", "vocab"):
            sizes = (module.in_features, module.out_features)
            common = {"bias": False, "gather_output": False, "disable_grad_reduce": True}
            new = Columns(*sizes, config=inside, init_method=_leave, **common)
        elif isinstance(module, nn.Linear) and style in ("row", "row_inside"):
            kind, config = (Rows, stream) if style == "row" else (RowsInside, inside)
            common = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
            sizes = (module.in_features, module.out_features)
            new = kind(*sizes, config=config, init_method=_leave, **common)
        elif isinstance(module, nn.Embedding):
            new = Vocabulary(
                module.num_embeddings,
                module.embedding_dim,
                init_method=_leave,
                reduce_scatter_embeddings=sequence,
                config=stream,
            )
        if new is not None:
            model.set_submodule(path.rpartition(".")[0], new)
            continue
        axis = AXIS[style]
        if axis is not None:
            old = module._parameters[leaf]
            assert old is not None
            piece = old.detach().narrow(axis, 0, old.shape[axis] // tensor)
            module._parameters[leaf] = nn.Parameter(torch.empty_like(piece))
    for path, module in list(model.named_modules()):
        if any(fnmatchcase(path, entrance) for entrance in ENTRANCES):
            module.register_forward_pre_hook(_Entrance(sequence))
        if hasattr(module, "gather_heads"):
            module.gather_heads, module.scatter_heads = _GatherHeads(), _ScatterHeads()


def shards_of(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    styles: Mapping[str, Style],
    layout: Layout,
    rank: int,
    names: Mapping[str, str],
) -> dict[str, Shard]:
    """Path in this rank's piece of the model -> the piece of the unsharded parameter it is.

    Args:
        shapes: of the unsharded parameters.
        names: path -> unsharded name, where they differ.
    """
    place = layout.place(rank)
    found = {}
    for path, _ in model.named_parameters():
        name = names.get(path, path)
        axis = AXIS[styles[name]]
        found[path] = Shard(name, shapes[name], axis, place.tensor, layout.tensor)
    return found


def mark(model: nn.Module, shards: Mapping[str, Shard], styles: Mapping[str, Style]) -> None:
    """Tells engines which parameters are pieces, and sums gradients of which each rank has a part.

    After `to_empty`, which makes parameters anew.
    """
    for path, parameter in model.named_parameters():
        shard = shards[path]
        if shard.parts == 1:
            continue
        parameter.tensor_model_parallel = shard.dim is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if shard.dim is None else shard.dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
        if styles[shard.name] == "replicate_sum_grad":
            parameter.register_hook(_summed)


def _summed(gradient: Tensor) -> Tensor:
    """The sum of the ranks' parts, formed in float32 at least."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    dist.all_reduce(wide, group=parallel_state.get_tensor_model_parallel_group())
    return wide.to(gradient.dtype)


def vocabulary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each label in nats, from logits [B, T, V / ranks]: [B, T]."""
    if logits.dtype != torch.bfloat16:  # Megatron works in place on what is wide already
        logits = logits.clone()
    with compat.wide_logits(logits.dtype):
        return megatron.vocab_parallel_cross_entropy(logits, labels)


def vocabulary_penalty(logits: Tensor) -> Tensor:
    """(log sum exp logits)^2 of logits [B, T, V / ranks]: [B, T]."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = (logits - highest[..., None]).exp().sum(-1)
    total = megatron.reduce_from_tensor_model_parallel_region(total)
    return (highest + total.log()).square()


def _leave(weight: Tensor) -> Tensor:
    return weight


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    holder, _, leaf = path.rpartition(".")
    return model.get_submodule(holder), leaf


Draw = Callable[[str, tuple[int, ...]], Tensor]  # unsharded name and shape -> its first value


@torch.no_grad()
def fill(model: nn.Module, shards: Mapping[str, Shard], draw: Draw) -> None:
    """First values: each parameter drawn whole, one after the other, and cut."""
    for path, parameter in model.named_parameters():
        shard = shards[path]
        parameter.copy_(shard.of(draw(shard.name, shard.shape)))
