"""Hands model and optimizer to DeepSpeed ZeRO and gives names to what it owns.

Stages 1 and 2 flatten each parameter group and give every data-parallel rank one contiguous part of
it, with fp32 master weights and AdamW moments; stage 3 gives every rank a part of each parameter.
This file is the only one that knows DeepSpeed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from titans_pretrain.config import ZeroConfig
from titans_pretrain.parallel import compat  # it says on what DeepSpeed runs
from titans_pretrain.parallel.layout import Fragment, Shard
from titans_pretrain.parallel.megatron import parallel_state
from titans_pretrain.parallel.uncompiled import without_compiler
from titans_pretrain.phases import phase

with without_compiler():
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # initialize() would
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.utils import groups as deepspeed_groups
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import set_z3_leaf_module

MOMENTS = ("exp_avg", "exp_avg_sq")

# Stage -> where DeepSpeed's optimizer computes the gradient norm, and one that is not finite.
NO_NORM = {2: ("scaled_global_norm", math.inf), 3: ("_get_norm_groups", [torch.tensor(math.inf)])}


class MegatronUnit:
    """The `mpu` interface that DeepSpeed expects, over Megatron's parallel_state.

    It must not expose `initialize_sequence_parallel`: DeepSpeed would take that as its own.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_") and hasattr(parallel_state, name):
            return getattr(parallel_state, name)
        raise AttributeError(name)

    def get_model_parallel_world_size(self) -> int:
        return (
            parallel_state.get_tensor_model_parallel_world_size()
            * parallel_state.get_pipeline_model_parallel_world_size()
        )

    def get_model_parallel_rank(self) -> int:
        return (
            parallel_state.get_pipeline_model_parallel_rank()
            * parallel_state.get_tensor_model_parallel_world_size()
            + parallel_state.get_tensor_model_parallel_rank()
        )

    def get_data_parallel_group(self) -> Any:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return torch.distributed.get_process_group_ranks(self.get_data_parallel_group())


def fuses(model: nn.Module, zero: ZeroConfig) -> bool:
    """Whether AdamW updates in one kernel: where its moments are on a GPU."""
    return next(model.parameters()).device.type == "cuda" and not zero.offload


def copy_among_data_parallel(ranks: int) -> None:
    """Collective. Has stage 3's copies divided among so many neighbours in a data-parallel group.

    DeepSpeed would take neighbours in the world, and with tensor parallelism put parts of different
    tensors together; a group that is already there it leaves.
    """
    members, mine = MegatronUnit().get_data_parallel_group_ranks(), torch.distributed.get_rank()
    first = members.index(mine) // ranks * ranks
    deepspeed_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = torch.distributed.new_group(
        members[first : first + ranks], use_local_synchronization=True
    )


class ZeroOptimizer:
    """ZeRO over the model that this rank holds: reduce, clip, step; and every owned piece by its
    unsharded name.

    Args:
        model: parameters in fp32 or bf16; gradients are accumulated by plain backwards
            (Megatron's schedule drives them) in fp32.
        shards: what each parameter of the model is of the unsharded one, by its path in the model.
        groups: AdamW parameter groups (`params`, `lr`, `weight_decay`, ...).
        zero: stage, offload, buckets.
        betas, eps: AdamW's.
        clip: largest global gradient norm.
        micro_batch: rows of one forward (DeepSpeed only reports with it).
        first: whether, of the ranks that hold equal copies, this rank's stands for all: it alone
            saves what is not divided among tensor-parallel ranks.
        repeated: paths of parameters that another pipeline stage holds, too, and stands for.
        units: modules whose parameters stage 3 gathers all at once. What a block calls, and how
            often, depends on the documents: gathered call by call, ranks would wait for ever.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: Mapping[str, Shard],
        groups: list[dict[str, Any]],
        *,
        zero: ZeroConfig,
        betas: tuple[float, float],
        eps: float,
        clip: float,
        micro_batch: int,
        first: bool = True,
        repeated: Sequence[str] = (),
        units: Iterable[nn.Module] = (),
    ) -> None:
        compat.skip_shared_memory_build()
        deepspeed_logger.setLevel(logging.ERROR)
        self.stage = zero.stage
        self._parameters = dict(model.named_parameters())
        self._shards, self._first, self._repeated = shards, first, frozenset(repeated)
        for path in repeated:  # DeepSpeed's mark: not counted again in the gradient norm
            self._parameters[path].ds_pipe_replicated = True  # type: ignore[attr-defined]
        if zero.stage == 3:
            for unit in units:
                set_z3_leaf_module(unit, True)
        self._bf16 = next(model.parameters()).dtype == torch.bfloat16
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,
            # The caller owns accumulation: backwards only add, `step()` reduces once.
            "managed_gradient_accumulation": False,
            "gradient_clipping": clip,
            "zero_optimization": self._zero_settings(zero),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in each step
        }
        if self._bf16:
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
            config["communication_data_type"] = zero.reduce
            if zero.stage == 1:
                config["bf16"]["immediate_grad_update"] = True
        if zero.copy_within > 1:
            copy_among_data_parallel(zero.copy_within)
        # On a GPU one kernel a group, without copies of its moments; on a CPU as torch chooses.
        fused = fuses(model, zero)
        self.adamw = torch.optim.AdamW(
            groups, lr=groups[0]["lr"], betas=betas, eps=eps, fused=fused or None
        )
        with compat.without_memory_tables():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.adamw,
                config=config,
                mpu=MegatronUnit(),
                dist_init_required=False,
            )
        # AdamW makes its moments at the first step, DeepSpeed links them after it. Made now, they
        # can be loaded into before, and each state has one lifetime.
        self._flats: list[torch.Tensor] = (  # fp32 masters
            self.engine.optimizer.fp32_partitioned_groups_flat
            if zero.stage == 3
            else [flat for g in self.adamw.param_groups for flat in g["params"]]
        )
        for flat in self._flats:
            where = flat.device if fused else "cpu"  # as AdamW would make it
            self.adamw.state[flat] = {"step": torch.tensor(0.0, device=where)} | {
                moment: torch.zeros_like(flat) for moment in MOMENTS
            }
        if zero.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._phase = phase("reduce")
        self._name_phases()

    def _zero_settings(self, zero: ZeroConfig) -> dict[str, Any]:
        # DeepSpeed allocates a whole bucket in each step: 2 GB by default.
        held = sum(p.numel() for p in self._parameters.values())
        bucket = min(zero.bucket, held)
        settings: dict[str, Any] = {
            "stage": zero.stage,
            "overlap_comm": zero.overlap,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if zero.offload:
            settings["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": torch.cuda.is_available(),
            }
        if zero.stage == 3:
            settings["stage3_param_persistence_threshold"] = zero.whole_below
        if zero.copy_within > 1:
            settings["zero_hpz_partition_size"] = zero.copy_within
        return settings

    def _name_phases(self) -> None:
        """Tells where the engine's step is: reduce, clip, optimizer (a group), .., gather."""
        reduce = self.engine.allreduce_gradients

        def reduce_gradients(*args: Any, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            self._phase.become("clip")

        def updated(adamw: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            done = [flat for group in adamw.param_groups for flat in group["params"]]
            last = any(flat is self._flats[-1] for flat in done)
            self._phase.become("gather" if last else "clip")

        self.engine.allreduce_gradients = reduce_gradients
        self.adamw.register_step_pre_hook(lambda *_: self._phase.become("optimizer"))
        self.adamw.register_step_post_hook(updated)

    def step(self, rates: list[float]) -> float:
        """Reduces gradients over data-parallel ranks, clips, updates. One call an optimizer step.

        Args:
            rates: the learning rate of each parameter group.
        Returns:
            The global gradient norm before clipping; inf if it was not finite: then DeepSpeed
            dropped the gradients and changed neither weight nor moment.
        """
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate
        return self._step()

    def drop(self) -> None:
        """Forgets the gradients of this step instead of updating with them. Collective.

        DeepSpeed itself drops what has no finite norm, and knows what is to be cleared: so it is
        given none. Weights, moments and AdamW's count stay as they are.
        """
        optimizer = self.engine.optimizer
        if self.stage < 2:
            for _, gradient in self.local_gradients()[:1]:
                gradient.fill_(math.inf)
            norm = self._step()
        else:
            name, none = NO_NORM[self.stage]
            setattr(optimizer, name, lambda *args, **kwargs: none)
            try:
                norm = self._step()
            finally:
                delattr(optimizer, name)  # the class's own again
        if math.isfinite(norm):
            raise RuntimeError(f"a step that was to be dropped was taken (gradient norm {norm})")

    def _step(self) -> float:
        self._phase = phase("reduce")
        if self.stage == 1 and not self.local_gradients():  # another optimizer of DeepSpeed's?
            raise RuntimeError(f"no parameter has a gradient in {self._accumulator}")
        with self._phase:
            self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            # Offloaded, DeepSpeed keeps a dropped step's reduced bf16 gradients and would add to
            # them.
            sums = getattr(self.engine.optimizer, "averaged_gradients", {})
            sums.update(dict.fromkeys(sums))
        return norm

    @property
    def _accumulator(self) -> str:
        """Stage 1: the attribute of a parameter that holds its accumulated gradient."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):  # not where the optimizer's state is offloaded
            return "_hp_grad"
        return "grad_accum" if optimizer.use_grad_accum_attribute else "grad"

    def local_gradients(self) -> list[tuple[str, torch.Tensor]]:
        """This rank's accumulated fp32 gradients by their paths, before reduction. Stages 2 and 3
        keep none: they reduce in each backward."""
        if self.stage > 1:
            return []
        name, parameters = self._accumulator, self._parameters.items()
        found = ((path, p, getattr(p, name)) for path, p in parameters)
        return [(path, g.view(p.shape)) for path, p, g in found if g is not None]

    def gradient_buffers(self) -> list[torch.Tensor]:
        """What gradients are accumulated in, over a step's backwards."""
        optimizer = self.engine.optimizer
        if self.stage == 1:
            return [gradient for _, gradient in self.local_gradients()]
        if self.stage == 2:
            groups = (optimizer.averaged_gradients or {}).values()
            return [t for group in groups for t in group or () if t is not None]
        return [optimizer.grad_partitions_flat_buffer]

    def on_reduced_gradients(self, see: Callable[[dict[str, Fragment]], None]) -> Any:
        """Calls `see` in each step with the reduced, clipped fp32 gradients this rank owns.

        `see` gets {unsharded name: Fragment with tensors {"gradient": 1-D}}; it may be called once
        for each parameter group. Returns a handle with `remove()`.
        """

        def look(adamw: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            gradients = {
                id(flat): flat.grad for g in adamw.param_groups for flat in g["params"]
            }  # flat fp32 partitions of the groups in this call
            seen = {}
            for fragment, flat, offset in self._owned():
                gradient = gradients.get(id(flat))
                if gradient is not None:
                    piece = gradient.narrow(0, offset, fragment.numel)
                    seen[fragment.name] = replace(fragment, tensors={"gradient": piece})
            see(seen)

        return self.adamw.register_step_pre_hook(look)

    @property
    def masters(self) -> list[torch.Tensor]:
        """This rank's flat fp32 weights, by group."""
        return list(self._flats)

    def fragments(self) -> list[Fragment]:
        """The pieces this rank owns: views of master weights and moments, no copies."""
        return [fragment for fragment, _, _ in self._owned()]

    def _owned(self) -> Iterator[tuple[Fragment, torch.Tensor, int]]:
        """(fragment, its flat fp32 partition, offset therein) of each parameter owned in part."""
        for path, parameter in self._parameters.items():
            where = self._partition(parameter)
            if where is None:
                continue
            flat, offset, start, numel = where
            state = self.adamw.state[flat]
            tensors = {"weight": flat.detach().narrow(0, offset, numel)}
            for moment in MOMENTS:
                tensors[moment] = state[moment].narrow(0, offset, numel)
            shard = self._shards[path]
            first = self._first or (shard.parts > 1 and shard.dim is not None)
            first = first and path not in self._repeated
            yield Fragment(shard, start, numel, tensors, first), flat, offset

    def _partition(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int, int, int] | None:
        """(flat fp32 partition, offset therein, first element owned, how many) of a parameter, or
        None where this rank owns nothing of it."""
        if self.stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            return self._flats[mapping.param_group_index], here.start, there.start, here.numel
        optimizer = self.engine.optimizer
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = optimizer._get_param_partition_rank(parameter) * size
        owned = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return (self._flats[group], offset, start, owned) if owned > 0 else None

    def weights_loaded(self, step: int) -> None:
        """After loading into `fragments()`: sets AdamW's step and gathers the model's weights."""
        for flat in self._flats:
            self.adamw.state[flat]["step"].fill_(step)
        optimizer = self.engine.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        # As its step does: what was gathered is given up, changed, gathered again.
        optimizer._partition_all_parameters()
        for group in range(len(self._flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
