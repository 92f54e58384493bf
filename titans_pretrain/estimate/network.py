"""Seconds of a collective between the ranks of a layout."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from titans_pretrain.config import HardwareConfig
from titans_pretrain.estimate.traffic import Group, Transfer
from titans_pretrain.parallel.layout import Layout


class Link(NamedTuple):
    """The slowest between the members of a group."""

    ranks: int
    rate: float  # bytes a second of each rank, one way
    latency: float  # seconds


class Network:
    """What joins the ranks of a layout, placed side by side on nodes as Slurm places them."""

    def __init__(self, layout: Layout, hardware: HardwareConfig) -> None:
        self._layout, self._hardware = layout, hardware
        self._links: dict[tuple[Group, bool], Link] = {}

    def seconds(self, t: Transfer) -> float:
        """Of a collective as NCCL's rings do it. A receive is the time of another rank's send."""
        if t.way == "recv":
            return 0.0
        key = t.group, t.way == "send"
        link = self._links.get(key) or self._links.setdefault(key, self._link(*key))
        ranks = link.ranks
        if ranks == 1:
            return 0.0
        if t.way == "all_reduce":
            factor = 2 * (ranks - 1) / ranks
        elif t.way == "all_gather":
            factor = (ranks - 1) / ranks
        else:  # a reduce-scatter is counted by what it leaves
            factor = ranks - 1 if t.way == "reduce_scatter" else 1
        return t.calls * (link.latency + factor * t.elements * t.element / link.rate)

    def _link(self, group: Group, neighbours: bool) -> Link:
        h = self._hardware
        ranks, within = self.members(group, neighbours)
        rate, latency = h.node_gb_per_s.value, h.node_latency_us.value
        if within < ranks:  # each of a node's members has a port of its own
            rate = min(rate, within * h.network_gb_per_s.value)
            latency = h.network_latency_us.value
        return Link(ranks, rate * 1e9 * h.links.value, latency * 1e-6)

    def members(self, group: Group, neighbours: bool = False) -> tuple[int, int]:
        """(ranks of the group, how many of them share a node); or of two neighbours in it."""
        node = self._hardware.gpus_per_node
        size, stride = self._groups[group]
        if neighbours:  # the slowest pair decides
            return 2, 2 if stride * size <= node else 1
        return size, max(1, min(size, node // stride))

    @cached_property
    def _groups(self) -> dict[Group, tuple[int, int]]:
        """Ranks of a group, and from one to the next: neighbouring ranks differ in tensor first,
        then context, data, pipeline (layout.py)."""
        c = self._layout
        return {
            "tensor": (c.tensor, 1),
            "context": (c.context, c.tensor),
            "data": (c.context * c.data_parallel, c.tensor),
            "pipeline": (c.pipeline, c.tensor * c.context * c.data_parallel),
            "model": (c.tensor * c.pipeline, 1),
            "world": (c.world_size, 1),
        }
