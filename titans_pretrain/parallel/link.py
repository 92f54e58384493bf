"""Links: messages of tensors along a chain of ranks, each to its neighbour."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

Key = tuple[int, str, str]  # micro-batch, mixer, what
Form = tuple[tuple[torch.Size, torch.dtype], ...]  # of the tensors of a message


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """One after another, copied."""
    return torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])


def size_of(form: Form) -> list[int]:
    """Bytes of each tensor."""
    return [shape.numel() * dtype.itemsize for shape, dtype in form]


def from_bytes(buffer: Tensor, form: Form) -> list[Tensor]:
    """The tensors of this form that `as_bytes` was given."""
    # Cloned: a wide number may not begin at any byte.
    parts = (part.clone() for part in buffer.split(size_of(form)))
    return [part.view(dtype).view(shape) for part, (shape, dtype) in zip(parts, form)]


class Link:
    """This rank's ends of the chain: it sends to its neighbours and receives from them.

    Messages have no tags: both ends work through the same hand-overs in the same order. Each way
    has a process group of its own, so that a send in one never queues behind one in the other.
    Ways: "forward" and "backward"; with segments "round 0" from the last rank to the first, and
    "round 1", .. where a rank holds several pieces of the model, which interleave their segments.

    A send returns at once, but on a device it may hold up what follows it until it is received. All
    orders but the skewed one end even so (wavefront.py, `blocking`).
    """

    def __init__(
        self, ranks: Sequence[int], groups: dict[str, dist.ProcessGroup], segments: int = 1
    ) -> None:
        self.index, self.size, self.segments = ranks.index(dist.get_rank()), len(ranks), segments
        before = ranks[self.index - 1] if self.index else None
        after = ranks[self.index + 1] if self.index + 1 < self.size else None
        # Way -> whom this rank receives from, and whom it sends to.
        around = (ranks[-1] if before is None else None, ranks[0] if after is None else None)
        self.peers = dict.fromkeys(groups, around)
        self.peers |= {"forward": (before, after), "backward": (after, before)}
        self.groups = groups
        self.steps = 0  # drained
        self.open: set[tuple[str, Key]] = set()  # takes and gives whose backward is to come
        self.bytes = 0  # sent
        self.log: list[tuple[str, str, Key]] | None = None  # (way, sent or received, key)
        self._sends: list[tuple[dist.Work, Tensor]] = []
        # Messages of a chain of one to itself.
        self._own: dict[str, deque[Tensor]] = {way: deque() for way in groups}

    @staticmethod
    def join(
        ranks: Sequence[int],
        device: torch.device,
        timeout_s: float,
        segments: int = 1,
        pieces: int = 1,
    ) -> Link:
        """The link of a chain of global ranks; collective over all ranks. segments: so many
        micro-batches one after another are stretches of the same rows. pieces: of the model on each
        rank. timeout_s: how long a message may take; no shorter than a collective may, for a rank
        waits here for all that others do before, their first kernels too. One that is lost, or
        stands still, the watchdog finds and tells of long before."""
        ways = ["forward", "backward"]
        if segments > 1:
            ways += [f"round {piece}" for piece in range(pieces)]
        wait = timedelta(seconds=timeout_s)
        # All ranks make the groups of all chains: names that count a rank's own groups would differ
        # within a chain as soon as one of its ranks had been in another group before.
        told: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(told, tuple(ranks))
        groups: dict[str, dist.ProcessGroup] = {}
        for way, chain in product(ways, sorted(set(told))):
            group = dist.new_group(list(chain), timeout=wait)
            if chain == tuple(ranks):
                groups[way] = group
        link = Link(ranks, groups, segments)
        # Connections are made at first use; made here, in one order, they are not made in a wave.
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        for way, group in groups.items() if link.size > 1 else ():
            source, target = link.peers[way]
            if source is not None:
                dist.recv(byte, source, group=group)
            if target is not None:
                dist.send(byte, target, group=group)
        return link

    def send(self, way: str, key: Key, tensors: Sequence[Tensor]) -> None:
        """Sends all tensors as one message; returns at once."""
        _, target = self.peers[way]
        buffer = as_bytes(tensors)
        self._record(way, "sent", key)
        if self.size == 1:
            self._own[way].append(buffer)
        elif len(buffer):
            self.bytes += len(buffer)
            work = dist.isend(buffer, target, group=self.groups[way])
            assert work is not None
            self._sends = [s for s in self._sends if not s[0].is_completed()]
            self._sends.append((work, buffer))

    def receive(self, way: str, key: Key, form: Form, device: torch.device) -> list[Tensor]:
        """Waits for the next message, which holds tensors of this form."""
        source, _ = self.peers[way]
        self._record(way, "received", key)
        if self.size == 1:
            buffer = self._own[way].popleft()
        else:
            buffer = torch.empty(sum(size_of(form)), dtype=torch.uint8, device=device)
            if len(buffer):
                work = dist.irecv(buffer, source, group=self.groups[way])
                assert work is not None
                work.wait()
        return from_bytes(buffer, form)

    def send_sized(self, way: str, key: Key, tensors: Sequence[Tensor]) -> None:
        """As `send`, to a rank that does not know the tensors' form."""
        buffer = as_bytes(tensors)
        self.send(way, key, [torch.tensor([len(buffer)], device=buffer.device)])
        self.send(way, key, [buffer])

    def receive_sized(self, way: str, key: Key, device: torch.device) -> Tensor:
        """Waits for the next `send_sized`; its bytes."""
        [length] = self.receive(way, key, ((torch.Size([1]), torch.int64),), device)
        form = ((torch.Size([int(length)]), torch.uint8),)
        [buffer] = self.receive(way, key, form, device)
        return buffer

    def drain(self) -> None:
        """Ends a step: waits until all sends are done. Raises RuntimeError if the backward of a
        hand-over never ran: a neighbour waits for it, or its gradient was lost."""
        for work, _ in self._sends:
            work.wait()
        self._sends, self.steps = [], self.steps + 1
        if self.open:
            waiting, self.open = sorted(self.open), set()
            raise RuntimeError(
                f"{len(waiting)} hand-overs without a backward, among them {waiting[0]}; each "
                "forward with gradients has its backward before the step ends"
            )

    def _record(self, way: str, act: str, key: Key) -> None:
        if self.log is not None:
            self.log.append((way, act, key))
