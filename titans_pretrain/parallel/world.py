"""Ranks, devices, seeds and the small collectives of a step."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from titans_pretrain.config import ParallelConfig, TrainConfig
from titans_pretrain.errors import ConfigError, TitansError, exit_code_of
from titans_pretrain.parallel.compat import share_gloo_devices
from titans_pretrain.parallel.layout import Layout, Place
from titans_pretrain.parallel.megatron import parallel_state
from titans_pretrain.parallel.rendezvous import launched, meet, told_to_all

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank's place, and the collectives that the training loop itself needs."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    threads: int
    layout: Layout
    timeout_s: float = 1800.0  # of a collective
    group: Any = None  # the process group of these collectives; None: that of training

    @property
    def place(self) -> Place:
        """This rank's coordinates."""
        return self.layout.place(self.rank)

    def apart(self) -> World:
        """Collective. The same ranks on a process group of their own (gloo), whose collectives may
        go on in another thread beside those of training."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        return replace(self, device=torch.device("cpu"), group=group)

    @property
    def host(self) -> str:
        return socket.gethostname()

    @property
    def device_kind(self) -> str:
        """What this rank computes on: on another kind sums come in another order."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}"

    def sum(self, values: list[float]) -> list[float]:
        """Sums a few numbers over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t, op=op, group=self.group)
        return t.tolist()

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's `item`, on every rank (trusted peers: this pickles)."""
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_by_data(self, item: Any) -> list[Any]:
        """One `item` of each data-parallel rank, on every rank."""
        told = self.gather_objects(item)
        by_data = {self.layout.place(rank).data: it for rank, it in enumerate(told)}
        return [by_data[data] for data in range(self.layout.data_parallel)]

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's `item` on every rank."""
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, act: Callable[[], T]) -> T:
        """Runs `act` on every rank; if it fails on any, every rank raises the first one's error."""
        failure: TitansError | None = None
        result: Any = None
        try:
            result = act()
        except TitansError as e:
            failure = e
        for told in self.gather_objects(failure):
            if told is not None:
                raise failure or told
        return result

    def raise_any(self, failure: TitansError | None) -> None:
        """Raises on every rank what any of them met; the first rank's, where several did. It costs
        one number where none did."""
        if not self.max([float(failure is not None)])[0]:
            return

        def act() -> None:
            if failure is not None:
                raise failure

        self.agree(act)

    def only_first(self, act: Callable[[], T]) -> T:
        """Runs `act` on rank 0; its result, or its error, on every rank."""
        result = self.agree(act if self.rank == 0 else lambda: None)
        return self.broadcast_object(result)

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def shut_down(self) -> None:
        """Leaves the other ranks. On CUDA with an error in hand, as the process ends: NCCL would
        wait, here and in its own end, for what others no longer send, and they may be stuck."""
        error = sys.exc_info()[1]
        if error is not None and self.device.type == "cuda":
            atexit.register(_end, exit_code_of(error))
            return
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(code: int) -> None:
    """As Python's own end would be, without that of the libraries."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody listens, or it is closed
            stream.flush()
    os._exit(code)


def choose_device(asked: str, local_rank: int) -> torch.device:
    """cpu or cuda:local_rank. Raises ConfigError if CUDA is asked for where there is none, or the
    CPU where the engines, which look for themselves, would take CUDA."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" and count > 0:
        raise ConfigError(
            f"train.device=cpu: torch sees {count} CUDA devices",
            "what runs on the CPU sees no GPU: Megatron-core and DeepSpeed would take it",
            "set CUDA_VISIBLE_DEVICES= (nothing) in the environment, as `train` does by itself",
        )
    if count == 0:
        if asked == "cuda":
            raise ConfigError(
                "train.device=cuda: torch sees no CUDA device",
                "each rank needs a CUDA device of its own",
                "set train.device=cpu, or install torch with CUDA (README, installation)",
            )
        return torch.device("cpu")
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank}, {count} CUDA devices on {socket.gethostname()}",
            "each rank needs a CUDA device of its own",
            f"start at most {count} ranks on this machine",
        )
    return torch.device("cuda", local_rank)


def context_ranks() -> list[int]:
    """The global ranks that share this rank's rows, in order of their tokens."""
    ranks: list[int] = parallel_state.get_context_parallel_global_ranks()
    return ranks


def world_size() -> int:
    """Ranks that the environment promises; without WORLD_SIZE this process is alone. Raises
    ConfigError where it makes no sense."""
    return launched().size


def start_world(
    train: TrainConfig,
    layout: Layout | None = None,
    timeout_s: float = 1800,
    said: str = "",
    watched: bool = False,
) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT describe.

    Without WORLD_SIZE this process is a world of one. gloo on a CPU, NCCL on CUDA (with gloo for
    CPU tensors); Megatron's groups of `layout` on top (default: data parallel alone). Raises
    ConfigError where they say too little, and on every rank where one has no device, or ranks
    differ in what was `said` to them: the run's config and options. `watched`: something else ends
    a rank that hangs, wherever it does.
    """
    env = os.environ
    here = launched()
    rank, size, local_rank = here.rank, here.size, here.local_rank
    layout = layout or Layout(size, ParallelConfig(), size, 1)
    with told_to_all():
        device = choose_device(train.device, local_rank)
    threads = train.threads or max(1, len(os.sched_getaffinity(0)) // here.local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        prepare_cuda(train.deterministic, watched)
    torch.set_num_threads(threads)
    if env.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    # DeepSpeed reads these even where the process group is already there.
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = str(rank), str(size), str(local_rank)
    torch.manual_seed(train.seed)
    share_gloo_devices()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=size,
        store=meet(here, said, timeout_s),
        timeout=timedelta(seconds=timeout_s),
    )
    interleave = layout.parallel.interleave
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        interleave if interleave > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=False,  # a second one of each that divides data; nobody asks
    )
    return World(rank, size, local_rank, here.local_size, device, threads, layout, timeout_s)


def prepare_cuda(deterministic: bool, watched: bool) -> None:
    """Before the process group is made, whose NCCL reads these. What the user has set stays."""
    env = os.environ
    env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic:
        # Not `warn_only`: with it, attention's backward keeps to the algorithm that is not. The
        # public call does the same, and imports a part of torch's compiler: a second.
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch._C._set_deterministic_fill_uninitialized_memory(False)  # nothing here reads it
        env.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")  # sums in the switch, in any order
    if watched:
        # NCCL's watchdog aborts the process at an error, before the error is told where it was met.
        # Left to `watched`: without one it is what ends a collective that never ends.
        env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        env.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
