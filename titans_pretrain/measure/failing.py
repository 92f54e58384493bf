"""How a run fails when one rank meets trouble that torch tells in its own ways: one message and one
exit code, on every rank."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from types import TracebackType

import psutil
import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.errors import LostPeerError, NodeError, TitansError, this_node
from titans_pretrain.measure.out_of_memory import explain, is_out_of_memory
from titans_pretrain.parallel.peers import Peers
from titans_pretrain.parallel.world import World
from titans_pretrain.step import TrainStep

logger = logging.getLogger("titans_pretrain.measure.failing")

# What CUDA says of a broken or lost device. "unspecified launch failure" is not among them: it may
# be the program's fault, too.
_BROKEN = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "over nvlink or a hardware error",
    "CUDA error: unknown error",  # e.g. fallen off the bus
    "device(s) is/are busy or unavailable",
    "no CUDA-capable device is detected",
    "system not yet initialized",  # the fabric manager of NVSwitch
)
# What gloo, NCCL and the store say of a peer that is gone. What else NCCL fails with (a GPU taken
# twice, no room in /dev/shm, no such interface) is not another rank's end.
_GONE = (
    "closed by peer",
    "closed by remote peer",
    "reset by peer",
    "refused",
    "imed out",
    "Broken pipe",
    "remote process exit",  # ncclRemoteError, in torch's words and in NCCL's own
)


class Failing:
    """A block inside which a failed allocation becomes OutOfMemoryError on all ranks, a broken
    device NodeError with its node, and a peer that is gone its error, or LostPeerError if it left
    without a word.

    Args:
        lost: is called with the error that tells of such a peer.
    """

    def __init__(
        self, config: RunConfig, lost: Callable[[BaseException], None] = lambda error: None
    ) -> None:
        self.config, self._tell_lost = config, lost
        self.step: TrainStep | None = None  # once it is built
        self._world: World | None = None
        self._peers: Peers | None = None
        self._before = 0  # bytes that this process held before it built anything

    def joined(self, world: World) -> World:
        """From now on there are other ranks to tell."""
        self._world, self._peers = world, Peers(world)
        self._before = psutil.Process().memory_info().rss
        return world

    def __enter__(self) -> Failing:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, TitansError):
                return
            if is_out_of_memory(error):
                raise self._out_of_memory(error)
            if isinstance(error, RuntimeError) and broken_device(error):
                raise self._broken(error) from error
            if isinstance(error, RuntimeError) and _peer_gone(error):
                raise self._lost(error) from error
            if isinstance(error, Exception):
                # Now, not as the process ends: it may be ended before, waiting for other ranks.
                logger.error("this rank failed", exc_info=error)
        finally:
            if self._peers is not None:
                self._peers.close()

    def _out_of_memory(self, error: BaseException) -> TitansError:
        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        logger.warning("out of memory: %s\n%s", error, where)
        failure = explain(error, self.config, self._world, self.step, self._before)
        if self._peers is not None:
            self._peers.tell(failure)
        return failure

    def _broken(self, error: RuntimeError) -> TitansError:
        logger.warning("the device failed", exc_info=error)
        rank, device = (self._world.rank, self._world.device) if self._world else (0, "cuda")
        failure = NodeError(
            f"rank {rank}, {device} of {this_node()}: {str(error).strip().splitlines()[0]}",
            "devices work",
            "nvidia-smi and dmesg (Xid) of that node tell more; start again without it: the run "
            "goes on from its last checkpoint",
            this_node(),
        )
        if self._peers is not None:
            self._peers.tell(failure)
        return failure

    def _lost(self, error: RuntimeError) -> TitansError:
        logger.warning("lost another rank", exc_info=error)
        told = self._peers.failure(wait=2.0) if self._peers is not None else None
        if told is not None:
            return told
        self._tell_lost(error)
        return LostPeerError(
            f"lost another rank: {str(error).strip().splitlines()[0]}",
            "all ranks live as long as the run",
            "the first rank to fail says why (logs/); start again: the run goes on from its last "
            "checkpoint",
        )


def broken_device(error: RuntimeError) -> bool:
    """Whether CUDA tells of a device that is broken or lost."""
    return any(words in str(error) for words in _BROKEN)


def _peer_gone(error: RuntimeError) -> bool:
    store = isinstance(error, torch.distributed.DistError) and not isinstance(
        error, torch.distributed.DistBackendError
    )
    return store or any(words in str(error) for words in _GONE)
