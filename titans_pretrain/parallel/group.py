"""A few ranks round rank 0, and the small exchanges that a step does not wait for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from titans_pretrain.parallel.layout import Layout, Place
from titans_pretrain.parallel.world import World


@dataclass
class Group:
    """Ranks in order, rank 0 the first, and a gloo group of theirs (None: rank 0 is alone)."""

    layout: Layout
    ranks: list[int]
    process_group: Any = None
    bytes: int = 0  # that this rank has sent in `gather`

    @staticmethod
    def join(world: World, belongs: Callable[[Place], bool]) -> Group | None:
        """The ranks whose place `belongs`; None on the others. Collective over all ranks."""
        layout, made = world.layout, None
        ranks = [rank for rank in range(world.size) if belongs(layout.place(rank))]
        if len(ranks) > 1:
            # Not with local synchronisation: names then count the groups that a rank is in, of
            # which pipeline stages have different numbers.
            wait = timedelta(seconds=world.timeout_s)
            made = dist.new_group(ranks, timeout=wait, backend="gloo")
        return Group(layout, ranks, made) if world.rank in ranks else None

    def gather(self, item: Any) -> list[tuple[Place, Any]]:
        """On rank 0 each rank's place and item, in the order of ranks; on the others nothing."""
        if self.process_group is None:
            return [(self.layout.place(0), item)]
        packed = pickle.dumps(item)
        first = dist.get_rank() == 0
        told: list[Any] | None = [None] * len(self.ranks) if first else None
        dist.gather_object(packed, told, dst=0, group=self.process_group)
        if told is None:
            self.bytes += len(packed)
            return []
        return [(self.layout.place(r), pickle.loads(t)) for r, t in zip(self.ranks, told)]

    def tell(self, item: Any = None) -> Any:
        """Rank 0's item, on every rank (trusted peers: this pickles)."""
        box = [item]
        if self.process_group is not None:
            dist.broadcast_object_list(box, src=0, group=self.process_group)
        return box[0]
