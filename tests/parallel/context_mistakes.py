"""Mistakes that context parallelism invites, made on purpose: each must be seen by the tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parallel.context_runs import Rows, Run, context_run, join, model_config, unit
from titans_pretrain.data.batch import Batch
from titans_pretrain.memory.layer import MemoryLayer
from titans_pretrain.memory.packing import plan_documents
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


def _short_halo(what: str, dim: int) -> Patch:
    """The oldest row of a halo is missing."""
    take = MixerSeam.take

    def short(self: Any, name: str, tie: Tensor, state: Any, blank: Any) -> tuple[Tensor, Any]:
        tie, taken = take(self, name, tie, state, blank)
        if name == what and self._model[0].link.index:
            taken = tuple(
                torch.cat(
                    (torch.zeros_like(t.narrow(dim, 0, 1)), t.narrow(dim, 1, t.shape[dim] - 1)), dim
                )
                for t in taken
            )
        return tie, taken

    return MixerSeam, "take", short


def _lost_state(what: str) -> Patch:
    """The state does not arrive."""
    take = MixerSeam.take

    def lost(self: Any, name: str, tie: Tensor, state: Any, blank: Any) -> tuple[Tensor, Any]:
        tie, taken = take(self, name, tie, state, blank)
        return tie, blank() if name == what and self._model[0].link.index else taken

    return MixerSeam, "take", lost


def _early_state() -> Patch:
    """What is handed on lacks the last chunk."""
    write = MemoryLayer.write

    def early(self: Any, q: Tensor, k: Tensor, v: Tensor, rates: Any, plan: Any, *more: Any) -> Any:
        C = self.spec.chunk
        y, _ = write(self, q, k, v, rates, plan, *more)
        positions = SHARES[0][:, :-C]
        SHARES.append(SHARES[0])
        short = plan_documents(positions, C)
        cut = replace(rates, **{n: getattr(rates, n)[:, :, :-C] for n in ("theta", "alpha", "eta")})
        q, k, v = (x[:, :, :-C] for x in (q, k, v))
        return y, write(self, q, k, v, cut, short, *more)[1]

    return MemoryLayer, "write", early


SHARES: list[Tensor] = []  # positions of the share at hand


def _note(batch: Batch, link: Link) -> Batch:
    SHARES[:] = [batch.positions]
    return batch


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


def _missed_reset(batch: Batch, link: Link) -> Batch:
    """Documents that start at the edge pass for the rest of what came before."""
    positions = batch.positions.clone()
    for row in positions:
        if link.index and row[0] == 0:
            n = int((row[1:] == 0).nonzero()[0]) + 1 if (row[1:] == 0).any() else len(row)
            row[:n] = row[:n].where(row[:n] < 0, row[:n] + 4)
    return replace(batch, positions=positions)


def _local_mean(loss: Tensor, batch: Batch, labels: int) -> Tensor:
    return loss / batch.loss_mask.sum().clamp(min=1) / 6  # ranks times micro-batches


U = unit(model_config("lmm"))
MISTAKES = {
    "short halo of a convolution": Mistake("lmm", _short_halo("tails", 1)),
    "short halo of attention": Mistake("mag-window", _short_halo("keys", 2)),
    "lost state": Mistake("mal-window", _lost_state("memory")),
    "lost segment": Mistake("mac", _lost_state("segment")),
    "state before the last chunk": Mistake(
        "lmm", _early_state(), rows=[[[16 * U]]], step={"change": _note}
    ),
    "reset missed at an edge": Mistake("lmm", step={"change": _missed_reset}),
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
