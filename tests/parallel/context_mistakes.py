"""Mistakes that context parallelism invites, made on purpose: each must be seen by the tests. More
of them are in test_seeded_bugs.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.context_runs import Rows, Run, context_run, join
from titans_pretrain.data.batch import Batch
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.parallel.context import MixerSeam
from titans_pretrain.parallel.link import Link

Patch = tuple[type, str, Callable[..., Any]]


@dataclass(frozen=True)
class Mistake:
    case: str
    patch: Patch | None = None
    seen: str = "gradients"  # by what it is seen; else words of the error
    rows: list[Rows] | None = None
    step: dict[str, Any] = field(default_factory=dict)


def _short_halo() -> Patch:
    """The oldest row of a convolution's halo is missing."""
    take = MixerSeam.take

    def short(self: Any, name: str, tie: Tensor, state: Any, blank: Any) -> tuple[Tensor, Any]:
        tie, taken = take(self, name, tie, state, blank)
        if name == "tails" and self._model[0].link.index:
            taken = tuple(torch.cat((torch.zeros_like(t[:, :1]), t[:, 1:]), 1) for t in taken)
        return tie, taken

    return MixerSeam, "take", short


def _lost_segment() -> Patch:
    """An open segment does not arrive."""
    take = MixerSeam.take

    def lost(self: Any, name: str, tie: Tensor, state: Any, blank: Any) -> tuple[Tensor, Any]:
        tie, taken = take(self, name, tie, state, blank)
        return tie, blank() if name == "segment" and self._model[0].link.index else taken

    return MixerSeam, "take", lost


def _without_tie() -> Patch:
    give = MixerSeam.give

    def untied(self: Any, what: str, tie: Tensor, state: Any, *more: Any) -> Tensor:
        give(self, what, tie, state, *more)
        return tie

    return MixerSeam, "give", untied


def _branch() -> Patch:
    """Where no document starts, the first weights are not even looked at."""
    write = MemoryLayer.write

    def branching(self: Any, q: Tensor, k: Tensor, v: Tensor, rates: Any, plan: Any, *more: Any):
        if len(plan.fresh):
            return write(self, q, k, v, rates, plan, *more)
        detached = tuple(w.detach() for w in self.first_weights())
        with mock.patch.object(self, "first_weights", lambda: detached):
            return write(self, q, k, v, rates, plan, *more)

    return MemoryLayer, "write", branching


def _local_mean(loss: Tensor, batch: Batch, labels: int) -> Tensor:
    return loss / batch.loss_mask.sum().clamp(min=1) / 6  # ranks times micro-batches


MISTAKES = {
    "short halo of a convolution": Mistake("lmm", _short_halo()),
    "lost segment": Mistake("mac", _lost_segment()),
    "mean of the own labels": Mistake("lmm", step={"weigh": _local_mean}),
    "branch instead of select": Mistake(
        "lmm-paper", _branch(), "missing", rows=[[[16 * 6]], [[16 * 6]]]
    ),
    "give without a tie": Mistake("lmm", _without_tie(), "hand-overs without a backward"),
}


def make_mistakes() -> dict[str, Run | str]:
    """On each of two ranks: the step of each mistake."""
    link, runs = join(), {}
    for name, m in MISTAKES.items():
        step = {"case": m.case, "rows": m.rows, **m.step}
        if m.seen == "missing":
            runs[name + ", right"] = context_run(link, **step)
        if m.patch is None:
            runs[name] = context_run(link, **step)
            continue
        with mock.patch.object(*m.patch):
            if m.seen.startswith("hand-overs"):
                runs[name] = _drained(link, step)
            else:
                runs[name] = context_run(link, **step)
    return runs


def _drained(link: Link, step: dict[str, Any]) -> str:
    """What `drain` says on the rank that gives. The other sends nothing back: nobody would read it,
    and gloo ends a process with unread messages as it likes."""

    def stop() -> None:
        raise RuntimeError("this rank is not asked")

    unheard = (
        (mock.patch.object(link, "send", lambda *_: None), mock.patch.object(link, "drain", stop))
        if link.index
        else ()
    )
    with ExitStack() as stack:
        for patch in unheard:
            stack.enter_context(patch)
        try:
            context_run(link, **step)
            said = ""
        except RuntimeError as e:
            said = str(e)
    dist.barrier()
    return said
