"""Hands model and optimizer to DeepSpeed ZeRO-1 and gives names to what it owns.

DeepSpeed flattens each parameter group and gives every data-parallel rank one contiguous part of
it, with fp32 master weights and AdamW moments. This file is the only one that knows DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from megatron.core import parallel_state
from torch import nn

from titans_pretrain.parallel import compat
from titans_pretrain.parallel.layout import Fragment
from titans_pretrain.phases import phase

MOMENTS = ("exp_avg", "exp_avg_sq")


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


class ZeroOptimizer:
    """ZeRO-1 over one model: reduce, clip, step; and every owned piece by its unsharded name.

    Args:
        model: parameters in fp32 or bf16; gradients are accumulated by plain backwards
            (Megatron's schedule drives them) in fp32.
        groups: AdamW parameter groups (`params`, `lr`, `weight_decay`, ...).
        betas, eps: AdamW's.
        clip: largest global gradient norm.
        micro_batch: rows of one forward (DeepSpeed only reports with it).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        clip: float,
        micro_batch: int,
    ) -> None:
        compat.skip_shared_memory_build()
        deepspeed_logger.setLevel(logging.ERROR)
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,
            # The caller owns accumulation: backwards only add, `step()` reduces once.
            "managed_gradient_accumulation": False,
            "gradient_clipping": clip,
            "zero_optimization": {
                "stage": 1,
                "overlap_comm": False,
                # DeepSpeed allocates a whole bucket in each step: 2 GB by default.
                "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in model.parameters())),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        }
        if bf16:
            config["bf16"] = {"enabled": True, "immediate_grad_update": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.adamw = torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=betas, eps=eps)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.adamw,
                config=config,
                mpu=MegatronUnit(),
                dist_init_required=False,
            )
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._parameters = dict(model.named_parameters())
        self._bf16 = bf16
        # AdamW makes its moments at the first step, DeepSpeed links them after it. Made now, they
        # can be loaded into before, and each state has one lifetime.
        self._flats = [
            flat for g in self.adamw.param_groups for flat in g["params"]
        ]  # fp32 masters
        for flat in self._flats:
            self.adamw.state[flat] = {"step": torch.tensor(0.0)} | {
                moment: torch.zeros_like(flat) for moment in MOMENTS
            }
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self._phase = phase("reduce")
        self._name_phases()

    def _name_phases(self) -> None:
        """Tells where the engine's step is: reduce, clip, optimizer (a group), .., gather."""
        reduce = self.engine.allreduce_gradients

        def reduce_gradients(*args: Any, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            self._phase.become("clip")

        def updated(adamw: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            last = adamw.param_groups[-1]["params"][-1] is self._flats[-1]
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
        self._phase = phase("reduce")
        with self._phase:
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def local_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's accumulated gradients by name, before reduction."""
        for name, parameter in self._parameters.items():
            gradient = getattr(parameter, "_hp_grad", None) if self._bf16 else parameter.grad
            if gradient is not None:
                yield name, gradient.view(parameter.shape)

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

    def fragments(self) -> list[Fragment]:
        """The pieces this rank owns: views of master weights and moments, no copies."""
        return [fragment for fragment, _, _ in self._owned()]

    def _owned(self) -> Iterator[tuple[Fragment, torch.Tensor, int]]:
        """(fragment, its flat fp32 partition, offset therein) of each parameter owned in part."""
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            flat = self._flats[mapping.param_group_index]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            state = self.adamw.state[flat]
            tensors = {"weight": flat.detach().narrow(0, here.start, here.numel)}
            for moment in MOMENTS:
                tensors[moment] = state[moment].narrow(0, here.start, here.numel)
            shape = tuple(parameter.shape)
            yield Fragment(name, shape, there.start, there.numel, tensors), flat, here.start

    def weights_loaded(self, step: int) -> None:
        """After loading into `fragments()`: sets AdamW's step and gathers the model's weights."""
        for flat in self._flats:
            self.adamw.state[flat]["step"].fill_(step)
        self.engine.optimizer.update_lp_params()
