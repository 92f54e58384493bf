"""Saves checkpoints behind the training, which stands still only while this rank's part is copied.

`Saver.save` copies what the rank owns into host memory and returns; a thread writes it, agrees with
the other ranks' threads, publishes and prunes (checkpoint.py: the same code in either mode, hence
the same bytes). These threads have a process group of their own: on that of training, their
collectives would mingle with those of the steps.

The copy and the writing are torch.distributed.checkpoint's. The thread is not: its `async_save` is
over when the tensors are written, and what makes a checkpoint count comes after that.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from titans_pretrain.errors import LostPeerError, NodeError, OutOfMemoryError, TitansError
from titans_pretrain.parallel.layout import Fragment
from titans_pretrain.phases import phase
from titans_pretrain.run import checkpoint
from titans_pretrain.run.local_disk import LocalDisk

if TYPE_CHECKING:
    from titans_pretrain.config import CheckpointConfig
    from titans_pretrain.parallel.world import World

log = logging.getLogger("titans_pretrain.run.saver")

PATIENCE = 5.0  # seconds for a save that is given up to notice it


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    step: int
    path: Path
    stalled: float  # seconds for which training stood still
    behind: float  # seconds from then until it was complete; 0 in a synchronous save
    complete: float  # Unix time at which it was

    def __str__(self) -> str:
        if not self.behind:
            return f"`{self.path}` in {self.stalled:.1f} s"
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.complete))
        return (
            f"`{self.path}` complete at {when}, {self.behind:.1f} s behind the training, which "
            f"stood still for {self.stalled:.2f} s"
        )


class _Job(threading.Thread):
    """Does `act` behind the training and keeps what it raises. A daemon: an interpreter that must
    leave does not wait for it."""

    def __init__(self, act: Callable[[], Path], step: int, began: float) -> None:
        super().__init__(name=f"save of step {step}", daemon=True)
        self.step = step
        self.saved: Saved | None = None
        self.error: BaseException | None = None
        self._act, self._copied = act, time.perf_counter()
        self.stalled = self._copied - began

    def run(self) -> None:
        with self:
            path = self._act()
            behind = time.perf_counter() - self._copied
            self.saved = Saved(self.step, path, self.stalled, behind, time.time())

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error  # raised again where training looks
        return True


class Saver:
    """Saves the checkpoints of a run; at most one at a time. Collective to make.

    Beside its partition a rank holds a copy of it in host memory (pinned, for CUDA), kept from the
    first save on, and one piece of one tensor while it is written. `mode: sync` makes no copy, nor
    does `local`, which writes to the node's own disk first (local_disk.py).

    Use as a context manager: if the block is left by an error that all ranks share, a save in
    flight is still completed; if this rank leaves alone, it is given up.

    Args:
        still_mine: raises, on rank 0, if a newer life has taken the run folder.
        told: is called with each checkpoint once it is complete, by the thread that trains.
    """

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        world: World,
        still_mine: Callable[[], None],
        told: Callable[[Saved], None],
    ) -> None:
        self._checkpoints, self._config = checkpoints, config
        self._still_mine, self._told = still_mine, told
        self._world = world.apart()
        self._stager = _stager(world.device)
        self._disk = LocalDisk(checkpoints, self._world) if config.mode == "local" else None
        if self._disk is not None:
            self._disk.clear()
        self._job: _Job | None = None
        self._trouble: TitansError | None = None  # met here, for all ranks to agree on
        self._given_up = threading.Event()
        self._late = False  # it has been said that saves take longer than the time between them

    @phase("checkpoint")
    def save(
        self, state: dict[str, Any], fragments: Sequence[Fragment], tensors: dict[str, torch.Tensor]
    ) -> float:
        """Saves the state of this moment, as checkpoint.save does; the seconds that it took here.

        Collective, but other ranks are waited for only in a synchronous save, or where an earlier
        save is still in flight. Raises what that one met, on every rank.
        """
        began = time.perf_counter()
        self._wait_for_earlier(state["step"])
        if self._config.mode == "sync":
            path = self._complete(state, self._write(state, fragments, tensors))
            stalled = time.perf_counter() - began
            self._tell(Saved(state["step"], path, stalled, 0.0, time.time()))
            return stalled
        kept = copy.deepcopy(state)
        if self._disk is not None:
            written = self._disk.write(state["step"], fragments, tensors, self._go_on)
            bring = partial(self._disk.bring, written, self._go_on)
            write = partial(
                checkpoint.assemble, self._checkpoints, kept, bring, self._world, self._still_mine
            )
        else:
            write = self._write(kept, *self._copy(fragments, tensors))
        act = partial(self._complete, kept, write)
        self._job = _Job(act, state["step"], began)
        self._job.start()
        return self._job.stalled

    def poll(self) -> TitansError | None:
        """Tells of a checkpoint that has become complete, without waiting; returns what has failed
        since the last call, for all ranks to agree on."""
        failed = None
        if self._job is not None and not self._job.is_alive():
            failed = self._finish(self._job)
        trouble, self._trouble = failed or self._trouble, None
        return trouble

    @phase("checkpoint")
    def wait(self) -> None:
        """Collective. Returns once no save is in flight; raises what any has met, on every rank."""
        if self._job is not None:
            self._job.join()
        self._world.raise_any(self.poll())

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        job = self._job
        if job is None:
            return
        alone = isinstance(error, OutOfMemoryError | LostPeerError)
        if alone or not isinstance(error, TitansError):
            self._given_up.set()
            job.join(PATIENCE)
            log.warning("the checkpoint of step %d was given up: this rank leaves alone", job.step)
            return
        with phase("checkpoint"):
            job.join()
        if job.saved is not None:
            self._finish(job)
        else:
            log.warning("the checkpoint of step %d was not saved", job.step, exc_info=job.error)

    def _copy(
        self, fragments: Sequence[Fragment], tensors: dict[str, torch.Tensor]
    ) -> tuple[list[Fragment], dict[str, torch.Tensor]]:
        """What of it is saved, in host memory (that of the last save), where training does not
        change it."""
        fragments = [fragment for fragment in fragments if fragment.first]
        ours = {"owned": [fragment.tensors for fragment in fragments], "tensors": tensors}
        host = cast(dict[str, Any], self._stager.stage(ours))
        owned = [replace(f, tensors=copied) for f, copied in zip(fragments, host["owned"])]
        return owned, host["tensors"]

    def _write(
        self, state: dict[str, Any], fragments: Sequence[Fragment], tensors: dict[str, torch.Tensor]
    ) -> partial[Path]:
        ours = (self._checkpoints, state, fragments, tensors, self._world)
        return partial(checkpoint.save, *ours, self._still_mine, self._go_on)

    def _complete(self, state: dict[str, Any], write: Callable[[], Path]) -> Path:
        path = write()
        if self._world.rank == 0:
            checkpoint.prune(self._checkpoints, self._config, state["step"])
        return path

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise InterruptedError("training has left")

    def _wait_for_earlier(self, step: int) -> None:
        job = self._job
        if job is None:
            return
        if job.is_alive() and not self._late:
            self._late = True
            log.warning(
                "the checkpoint of step %d waits for that of step %d: saving takes longer than the "
                "time between two saves (said once)",
                *(step, job.step),
            )
        job.join()
        if failed := self._finish(job):
            raise failed

    def _finish(self, job: _Job) -> TitansError | None:
        """Takes leave of a job that has ended; returns its failure, the same on every rank."""
        self._job = None
        if job.saved is None:
            if isinstance(job.error, TitansError):
                return job.error
            assert job.error is not None
            raise job.error
        self._tell(job.saved)
        return None

    def _tell(self, saved: Saved) -> None:
        log.info("checkpoint %s", saved)
        try:
            self._told(saved)
        except NodeError as e:  # of this rank alone
            self._trouble = e


def _stager(device: torch.device) -> DefaultStager:
    cuda = device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=cuda,
            use_shared_memory=False,
            use_async_staging=False,  # the next update must not begin before the copy is there
            use_non_blocking_copy=cuda,
        )
    )
