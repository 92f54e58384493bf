"""Context parallelism: each rank of a chain computes one share of every row's tokens.

Rank r has columns [r T/R, (r+1) T/R) of each row [B, T]. What mixers carry on from token to token,
rank r takes from rank r - 1 and gives to rank r + 1, layer by layer; in backward the gradients go
the other way. Layers run as a wave along the chain: a rank waits once for the ranks before it.

Only floats travel. Every integer comes from a rank's own positions: a document that began on an
earlier rank has a first position above 0, and what lies j tokens back is visible iff j <= position.

A sequence too long for that may come as several micro-batches, one after another: its segments.
What the last rank carries on then goes round to the first rank, without a gradient: of all mixers
as one message, where both begin the next segment. Sent mixer by mixer, as the last rank leaves
each, it would be received only after what the first rank waits for meanwhile: a send that holds up
what follows it would hold up all of them for ever.

Gradients of a rank are those of its own labels' losses, through all ranks: they are summed over
the chain, as over data-parallel ranks, before they are used. No reduction over the chain may run
inside backward: a rank would wait in it before it has sent what the others wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titans_pretrain.data.batch import Batch
from titans_pretrain.parallel.link import Form, Key, Link, as_bytes, from_bytes, size_of


def shard(batch: Batch, index: int, size: int) -> Batch:
    """The columns of rank `index` of a chain of `size`. Raises ValueError if they do not divide."""
    T = batch.tokens.shape[1]
    if T % size:
        raise ValueError(
            f"rows of {T} tokens over {size} context-parallel ranks; all ranks have equally many"
        )
    mine = slice(index * (T // size), (index + 1) * (T // size))
    rows = ("tokens", "labels", "positions", "loss_mask")
    return replace(batch, **{name: getattr(batch, name)[:, mine] for name in rows})


@dataclass(frozen=True)
class _HandOver:
    """One take or give, as its two autograd functions need it."""

    link: Link
    act: str
    key: Key
    form: Form

    def begin(self) -> None:
        self.link.open.add((self.act, self.key))

    def end(self) -> None:
        self.link.open.remove((self.act, self.key))


class _Take(torch.autograd.Function):
    """Receives a state; in backward sends its gradient. Passes chain and tie through."""

    @staticmethod
    def forward(ctx: Any, over: _HandOver, chain: Tensor, tie: Tensor) -> tuple[Tensor, ...]:
        ctx.over = over
        state = over.link.receive("forward", over.key, over.form, tie.device)
        return chain.view_as(chain), tie.view_as(tie), *state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_chain, d_tie, *d_state = gradients  # zeros where nothing was read: the form is fixed
        ctx.over.end()
        ctx.over.link.send("backward", ctx.over.key, d_state)
        return None, d_chain, d_tie


class _Give(torch.autograd.Function):
    """Sends a state; in backward receives its gradient. Passes chain and tie through."""

    @staticmethod
    def forward(
        ctx: Any, over: _HandOver, chain: Tensor, tie: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.over = over
        over.link.send("forward", over.key, state)
        return chain.view_as(chain), tie.view_as(tie)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_chain: Tensor, d_tie: Tensor) -> tuple[Tensor | None, ...]:
        over = ctx.over
        over.end()
        d_state = over.link.receive("backward", over.key, over.form, d_tie.device)
        return None, d_chain, d_tie, *d_state


class ModelSeam(nn.Module):
    """A model's seam between context ranks; counts its forwards in a step, one a micro-batch.

    `chain` passes through every hand-over of a forward: it makes their order in backward the
    reverse of that in forward by data, also between branches that do not depend on one another.
    """

    plain: tuple[Any, ...] = ()  # the seam that it replaces; in a tuple: no submodule

    def __init__(self, link: Link, piece: int = 0) -> None:
        super().__init__()
        self.link, self.round = link, f"round {piece}"
        self.step, self.micro_batch = link.steps, -1
        self.chain: Tensor | None = None
        self.recomputed = False  # the block at hand will be computed again for its backward
        self.again = False  # it is: what it took is at hand, and nothing is sent
        self.kept: dict[Key, list[Tensor]] = {}
        self.leaving: dict[Key, Tensor] = {}  # what goes round with the next segment, in bytes
        self.arrived: Tensor | None = None  # what came round and is not yet taken, in bytes

    def before(self, positions: Tensor) -> Tensor | None:
        """positions [B, T] of this rank's share -> of all tokens before it in these rows."""
        if self.step != self.link.steps:
            self.step, self.micro_batch = self.link.steps, -1
            self.kept.clear()
            self.leaving.clear()
        self.micro_batch += 1
        self.chain = self.arrived = None
        if self.leaving:
            _, first, _ = next(iter(self.leaving))
            key = (self.micro_batch, first, "round")
            self.link.send_sized(self.round, key, list(self.leaving.values()))
            self.leaving.clear()
        shares = self.segment * self.link.size + self.link.index
        columns = shares * positions.shape[1]
        if not columns:
            return None
        return (positions[:, :1].cpu() - torch.arange(columns, 0, -1)).clamp(min=-1)

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """In which a block is computed, and computed again for backward."""
        return self._first(), self._second(self.micro_batch)

    @contextmanager
    def _first(self) -> Iterator[None]:
        self.recomputed = True
        try:
            yield
        finally:
            self.recomputed = False

    @contextmanager
    def _second(self, micro_batch: int) -> Iterator[None]:
        now = self.micro_batch
        self.micro_batch, self.again = micro_batch, True
        try:
            yield
        finally:
            self.micro_batch, self.again = now, False

    @property
    def segment(self) -> int:
        """Which stretch of its rows the micro-batch at hand is."""
        return self.micro_batch % self.link.segments

    def gives_on(self, way: str) -> bool:
        """Whether what this rank gives goes this way; it goes one way at most."""
        if way == self.round and self.segment + 1 == self.link.segments:
            return False
        return self.link.peers[way][1] is not None

    def take(
        self, name: str, what: str, tie: Tensor, state: Any, blank: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        link, key = self.link, (self.micro_batch, name, what)
        if not self.segment and not link.index:
            return tie, state
        like = blank()
        if self.again:
            return tie, _rebuilt(like, self.kept.pop(key))
        tensors = _tensors(like)
        if link.index:
            over = self._over("take", key, tie, tensors)
            self.chain, tie, *taken = _Take.apply(over, self._chain(tie), tie)
        else:
            taken = self._came_round(name, _form(tensors), tie.device)
        if self.recomputed:
            self.kept[key] = [t.detach().requires_grad_(t.requires_grad) for t in taken]
        return tie, _rebuilt(like, taken)

    def give(
        self,
        name: str,
        what: str,
        tie: Tensor,
        state: Any,
        early: Callable[[bool], None] | None = None,
    ) -> Tensor:
        if self.again:
            return tie
        tensors, key = _tensors(state), (self.micro_batch, name, what)
        if self.gives_on(self.round):
            self.leaving[key] = as_bytes(tensors)
        if self.gives_on("forward"):
            over = self._over("give", key, tie, tensors)
            self.chain, tie = _Give.apply(over, self._chain(tie), tie, *tensors)
            if early is not None and tie.requires_grad:
                # A hook on what give returns runs in backward before give waits. Blocks that are
                # computed again are short of memory: then only as much as costs none.
                whole = not self.recomputed
                tie.register_hook(lambda _: early(whole))
        return tie

    def _came_round(self, name: str, form: Form, device: torch.device) -> list[Tensor]:
        """The next tensors of what the last rank left of the segment before."""
        if self.arrived is None:  # the first mixer
            key = (self.micro_batch, name, "round")
            self.arrived = self.link.receive_sized(self.round, key, device)
        n = sum(size_of(form))
        mine, self.arrived = self.arrived[:n], self.arrived[n:]
        return from_bytes(mine, form)

    def _over(self, act: str, key: Key, tie: Tensor, tensors: list[Tensor]) -> _HandOver:
        over = _HandOver(self.link, act, key, _form(tensors))
        if torch.is_grad_enabled():
            if not tie.requires_grad:
                raise RuntimeError(
                    f"{act} {key}: the tie needs no gradient, so backward would never come by here "
                    "and a neighbour would wait for ever; compute without gradients, or train what "
                    "comes before"
                )
            over.begin()
        return over

    def _chain(self, tie: Tensor) -> Tensor:
        return tie.new_empty(0) if self.chain is None else self.chain


class MixerSeam(nn.Module):
    """A mixer's seam between context ranks: the model's, under the mixer's name."""

    plain: tuple[Any, ...] = ()  # as in ModelSeam

    def __init__(self, model: ModelSeam, name: str) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: no submodule, for it serves all mixers
        self.name = name

    @property
    def gives(self) -> bool:
        """Whether anyone reads what is given."""
        (model,) = self._model
        return model.gives_on("forward") or model.gives_on(model.round)

    def take(
        self, what: str, tie: Tensor, state: Any, blank: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """The tie, and the state that the tokens before left; a row's first tokens keep `state`."""
        (model,) = self._model
        return model.take(self.name, what, tie, state, blank)

    def give(
        self, what: str, tie: Tensor, state: Any, early: Callable[[bool], None] | None = None
    ) -> Tensor:
        """The tie; whoever has the tokens after takes the state. early: what backward does before
        it waits for the state's gradient."""
        (model,) = self._model
        return model.give(self.name, what, tie, state, early)


def hand_on(model: nn.Module, link: Link, piece: int = 0) -> None:
    """Puts the link into a model's seams: from then on its forwards are over this rank's share of
    each row. Once a model; those of one rank (virtual pipeline stages, `piece`) share the link.

    Every forward with gradients needs its backward, then `link.drain()` ends the step.
    """
    names = [name for name, _ in model.named_modules() if name.endswith(".seam")]
    assert names and isinstance(getattr(model, "seam", None), nn.Module), "a model without seams"
    seam = ModelSeam(link, piece)
    seam.plain, model.seam = (model.seam,), seam
    for name in names:
        mixer = name.removesuffix(".seam")
        own = MixerSeam(seam, mixer)
        own.plain = (model.get_submodule(name),)
        model.get_submodule(mixer).seam = own


@contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """In which a model is as it was before `hand_on`: this rank computes whole rows by itself."""
    replaced = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModelSeam | MixerSeam)
    }
    for name, seam in replaced.items():
        model.set_submodule(name, seam.plain[0])
    try:
        yield
    finally:
        for name, seam in replaced.items():
            model.set_submodule(name, seam)


def _form(tensors: Sequence[Tensor]) -> Form:
    return tuple((t.shape, t.dtype) for t in tensors)


def _tensors(state: Any) -> list[Tensor]:
    """The tensors of a state in order: itself, or those of tuples and dataclasses."""
    if isinstance(state, Tensor):
        return [state]
    if state is None:
        return []
    return [t for part in _parts(state) for t in _tensors(part)]


def _rebuilt(like: Any, tensors: list[Tensor]) -> Any:
    """A state of the same form as `like`, of these tensors."""
    left = iter(tensors)

    def build(part: Any) -> Any:
        if isinstance(part, Tensor):
            return next(left)
        if part is None:
            return None
        made = [build(p) for p in _parts(part)]
        return tuple(made) if isinstance(part, tuple) else type(part)(*made)

    return build(like)


def _parts(state: Any) -> list[Any]:
    if isinstance(state, tuple):
        return list(state)
    assert is_dataclass(state), type(state)
    return [getattr(state, f.name) for f in fields(state)]
