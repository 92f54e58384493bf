"""What is right only as long as its order is: which hand-over depends on which, what lies between
taking a state and giving it, and that nothing else passes between ranks meanwhile."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.model.helpers import hot_model
from tests.parallel.context_runs import (
    batch_loss,
    context_run,
    documents,
    join,
    micro_batches,
    model_config,
    unit,
)
from tests.worlds import run_world
from titans_pretrain.data.batch import Batch
from titans_pretrain.memory.layer import HeadLinear
from titans_pretrain.model.titans import Block, TitansLM
from titans_pretrain.parallel.context import ModelSeam, hand_on, shard
from titans_pretrain.parallel.link import Form, Key, Link

CASES = ("mag-window", "mal-window", "mac", "mac-blocks")


class Middle(Link):
    """Of the second of three ranks, without the others: it hears zeros. What passes is in `log`."""

    def __init__(self) -> None:
        self.index, self.size, self.segments = 1, 3, 1
        self.peers = {"forward": (0, 2), "backward": (2, 0)}
        self.steps, self.open, self.log = 0, set(), []

    def send(self, way: str, key: Key, tensors: Any) -> None:
        self._record(way, "sent", key)

    def receive(self, way: str, key: Key, form: Form, device: torch.device) -> list[Tensor]:
        self._record(way, "received", key)
        return [torch.zeros(shape, dtype=dtype) for shape, dtype in form]


def in_the_middle(case: str) -> tuple[TitansLM, Middle, Batch]:
    """A model on that rank, and its share of a document over all ranks."""
    config, link = model_config(case), Middle()
    model = hot_model(config)
    hand_on(model, link)
    [whole] = micro_batches(config, [[[12 * unit(config)]]], 12)
    return model, link, shard(whole, 1, 3)


def nodes_before(node: Any) -> set[Any]:
    """Of autograd's graph: those that backward reaches from this one."""
    found: set[Any] = set()
    left = [node]
    while left:
        new = {n for n, _ in left.pop().next_functions if n is not None} - found
        found |= new
        left += new
    return found


def cut_links(case: str) -> list[tuple[Any, Any]]:
    """Hand-overs that backward may reach before the one that followed in forward."""
    model, link, batch = in_the_middle(case)
    loss = batch_loss(model, batch)
    assert loss.grad_fn is not None
    handed = {
        (node.over.act, node.over.key): node
        for node in nodes_before(loss.grad_fn)
        if hasattr(node, "over")
    }
    acts = {"received": "take", "sent": "give"}
    order = [(acts[act], key) for _, act, key in link.log or []]
    assert len(order) == len(handed) == len(set(order)) > 2 * model.config.blocks
    return [(a, b) for a, b in pairwise(order) if handed[a] not in nodes_before(handed[b])]


@pytest.mark.parametrize("case", CASES)
def test_backward_reaches_hand_overs_in_reverse_by_data(case: str) -> None:
    """Not by the order in which one thread happens to run what is ready."""
    assert cut_links(case) == []
    with mock.patch.object(ModelSeam, "_chain", lambda self, tie: tie.new_empty(0)):
        assert (cut_links(case) == []) == (case == "mal-window")  # its parts stand in a row


# MAC's memory is written with what its attention reads of it, segment by segment.
WITHIN = {"attention.k", "attention.v", "attention.o"} | {f"memory.{n}" for n in "qkv"}
WITHIN |= {"memory.gates"}


@pytest.mark.parametrize("case", ["lmm", *CASES])
def test_only_the_memory_lies_between_taking_its_state_and_giving_it(case: str) -> None:
    """Hand-overs at a block's ends would be as right, and would keep the next rank waiting."""
    model, link, batch = in_the_middle(case)
    told: list[Any] = []
    link.log = told
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear | HeadLinear):
            module.register_forward_hook(lambda *_, name=name: told.append(name))
    batch_loss(model, batch)
    names = {what for what in told if isinstance(what, str)}
    assert any("mlp.up" in name for name in names) and any("memory.out" in n for n in names)
    taken = [(at, key) for at, (_, act, key) in marks(told) if act == "received"]
    assert len(taken) >= model.config.blocks
    for at, key in taken:
        until = told.index(("forward", "sent", key))
        between = {what.partition(".mixer.")[2] for what in told[at:until] if type(what) is str}
        assert at < until and between <= (WITHIN if key[2] == "segment" else set()), key


def marks(told: list[Any]) -> list[tuple[int, Any]]:
    return [(at, what) for at, what in enumerate(told) if not isinstance(what, str)]


def test_a_tie_without_a_gradient_is_an_error() -> None:
    """Its backward would never come by, and the neighbour would wait for it."""
    model, _, batch = in_the_middle("lmm")
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the tie needs no gradient"):
        batch_loss(model, batch)
    with torch.no_grad():
        batch_loss(model, batch)


def with_a_sum_in_each_block() -> set[str]:
    forward = Block.forward

    def summed(self: Block, x: Tensor, *more: Any) -> Any:
        dist.all_reduce(torch.zeros(1))
        return forward(self, x, *more)

    link = join()
    with mock.patch.object(Block, "forward", summed):
        run = context_run(link, "lmm", rows=documents(model_config("lmm"))[1:2], count=True)
    dist.barrier()
    return run.operators


def test_a_collective_among_context_ranks_in_the_layer_loop_is_seen() -> None:
    """By what test_context.py looks at: nothing but what a rank sends and receives."""
    assert run_world(with_a_sum_in_each_block, 2) == [{"send", "recv", "allreduce"}] * 2
