"""The parts of an estimated step, each beside something that is known without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parallel.parity import parity_config
from titans_pretrain.config import HardwareConfig, ModelConfig, RunConfig
from titans_pretrain.estimate import pace as paces
from titans_pretrain.estimate.hardware import hardware_of, known
from titans_pretrain.estimate.network import Network
from titans_pretrain.estimate.portion import ends, portion_of
from titans_pretrain.estimate.traffic import Transfer
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, initialise
from titans_pretrain.parallel.layout import Layout, plan_layout
from titans_pretrain.parallel.wavefront import Chain, Order, Task, simulate

H100 = hardware_of("h100")
VIEWS = {
    *("_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "new_empty_strided"),
    *("_reshape_alias", "is_same_size", "unflatten"),
}


class Launched(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def launched(variant: str, blocks: int, tokens: int, **changes: Any) -> tuple[int, int]:
    """Operations of a model's forward and backward."""
    config = ModelConfig(
        variant=variant, blocks=blocks, width=32, heads=2, vocab_size=50, mlp_width=32,
        persistent_tokens=16, **changes,
    )  # fmt: skip
    model = TitansLM(config, dtype=torch.bfloat16)
    initialise(model, 0)
    rows, positions = torch.zeros(2, tokens, dtype=torch.int64), torch.arange(tokens).expand(2, -1)
    model(rows, positions, carry=False)  # plans are made once
    with Launched() as forward:
        logits, _ = model(rows, positions, carry=False)
    with Launched() as backward:
        logits.float().sum().backward()
    return forward.count, backward.count


@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("transformer", {}),
        ("lmm", {}),
        ("lmm", {"memory": {"chunk": 64}}),
        ("mac", {"segment": 128}),
        ("mac", {"segment": 64}),
        ("mag", {"window": 64}),
        ("mal", {"window": 64}),
    ],
    ids=str,
)
def test_launches_of_a_block_are_those_of_torch(
    variant: str, changes: dict[str, Any], tokens: int
) -> None:
    one, two = (launched(variant, blocks, tokens, **changes) for blocks in (1, 2))
    found = [b - a for a, b in zip(one, two)]
    config = ModelConfig(variant=variant, width=32, heads=2, persistent_tokens=16, **changes)
    assert paces.launches(config, tokens) == pytest.approx(found, rel=0.05)


def of(hardware: HardwareConfig = H100, ranks: int = 1, **changes: Any) -> paces.Pace:
    config = big(**changes)
    return paces.pace(ends(config, plan_layout(config, ranks)), hardware)


def big(parallel: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Of sizes where products, not launches, take the time."""
    sizes = {
        "model__blocks": 8,
        "model__width": 2048,
        "model__heads": 16,
        "model__mlp_width": 5504,
        "model__vocab_size": 32000,
        "model__memory__chunk": 128,
        "model__segment": 512,
        "data__sequence_length": 4096,
        "train__micro_batch": 16,
        "train__global_batch": 64,
        "train__precision": "bf16",
    }
    return parity_config(changes.pop("variant", "lmm"), parallel or {}, **{**sizes, **changes})


def test_a_transformer_without_overheads_takes_its_flops_over_the_peak() -> None:
    perfect = {"value": 1.0, "source": "for the test"}
    free = {"value": 1e-9, "source": "for the test"}
    fast = {"value": 1e9, "source": "for the test"}
    tree = H100.model_dump() | dict.fromkeys(("matmul", "attention"), perfect)
    tree |= {"launch_us": free, "memory_gb_per_s": fast}
    found = of(HardwareConfig.model_validate(tree), variant="transformer", model__window=None)
    flops = (
        64 * 4096 * 3 * (8 * (8 * 2048**2 + 6 * 2048 * 5504 + 4 * 2048 * 4096) + 2 * 2048 * 32000)
    )
    assert found.seconds == pytest.approx(flops / 989e12, rel=1e-3)
    assert found.tokens_per_s == pytest.approx(64 * 4096 / found.seconds)
    # Of masked scores half are wasted, which model FLOPs do not count.
    assert found.mfu == pytest.approx(1 - 12 * 8 * 2048 * 2048 * 64 * 4096 / flops, rel=1e-2)


def test_small_chunks_are_bound_by_launches_and_rows_then_cost_nothing() -> None:
    small = {"model__width": 512, "model__heads": 8, "model__memory__chunk": 16}
    one, four = (of(train__micro_batch=m, **small) for m in (1, 4))
    assert one.parts["launches"] > 0.8 * one.seconds
    assert one.seconds == pytest.approx(4 * four.seconds, rel=0.1)


def test_recompute_costs_a_forward() -> None:
    plain, again = of(), of(train__recompute="blocks")
    names = ("matrix products", "attention", "memory", "memory traffic", "launches")
    work, more = (sum(p.parts.get(name, 0.0) for name in names) for p in (plain, again))
    assert more / work == pytest.approx(4 / 3, rel=0.02)


def test_offload_costs_the_link_to_the_host_and_overlap_hides_transfers() -> None:
    plain, offloaded = (
        of(ranks=8, parallel={"zero": {"offload": o}}, train__micro_batch=8) for o in (False, True)
    )
    config = big({"zero": {"offload": True}}, train__micro_batch=8)
    layout = plan_layout(config, 8)
    owned = portion_of(config, layout, 0).engine.optimizer / 12
    more = offloaded.parts["reduce and gather"] - plain.parts["reduce and gather"]
    assert more == pytest.approx(6 * owned / 50e9)  # fp32 gradients there, bf16 weights back
    assert offloaded.parts["update"] / plain.parts["update"] == pytest.approx(3350 / 50)
    stage = {"stage": 2, "overlap": False}
    bare, hidden = (
        of(ranks=64, parallel={"zero": {**stage, "overlap": o}}, train__micro_batch=1)
        for o in (False, True)
    )
    part = "reduce and gather"
    assert hidden.parts[part] == pytest.approx(0.1 * bare.parts[part])


def test_a_pipeline_s_bubble_is_the_textbook_s() -> None:
    """(stages - 1) / micro-batches of the work, divided by the pieces on a stage."""
    for interleave in (1, 2):
        found = of(
            ranks=4, parallel={"pipeline": 4, "interleave": interleave}, train__micro_batch=4
        )
        outside = ("bubble", "reduce and gather", "update")
        work = sum(v for k, v in found.parts.items() if k not in outside)
        assert found.parts["bubble"] / work == pytest.approx(3 / 16 / interleave)


@pytest.mark.parametrize(("order", "segments"), [("FB", 1), ("FFBB", 1), ("FFBB", 2)])
def test_the_wave_is_the_simulator_s(order: Order, segments: int) -> None:
    parallel = {"context": 4, "order": order, "segments": segments}
    config = big(parallel, train__micro_batch=8)
    layout = plan_layout(config, 4)
    free = H100.model_copy(update={"node_latency_us": H100.launch_us, "node_gb_per_s": _fast()})
    block = paces.block(portion_of(config, layout, 0), free)
    tasks = [
        Task((whole - inside) / 2, inside, (whole - inside) / 2)
        for whole, inside in (
            (block.forward, block.memory_forward),
            (block.backward, block.memory_backward),
        )
    ]
    passes = layout.micro_batches * segments
    chain = Chain(4, passes, 8, *tasks, order=order, segments=segments)
    waiting = simulate(chain).seconds - passes * 8 * block.whole
    found = paces.pace(ends(config, layout), free).parts["wave"]
    assert found == pytest.approx(waiting, rel=0.02)


def _fast() -> Any:
    return H100.node_gb_per_s.model_copy(update={"value": 1e9})


def test_a_ring_moves_what_the_textbook_says_and_the_slowest_link_decides() -> None:
    """All-reduce: 2 (n - 1) / n of the bytes through each link, as nccl-tests count."""
    config = big()
    inside, across = (Network(Layout(n, config.parallel, n, 1), H100) for n in (8, 64))
    gigabyte = Transfer("all_reduce", "data", "gradients", 1, 2.5e8, 4)
    seconds = inside.seconds(gigabyte)
    assert seconds == pytest.approx(1e-5 + 2 * 7 / 8 * 1e9 / (450e9 * 0.8))
    seconds = across.seconds(gigabyte)  # eight ports of 50 GB/s a node
    assert seconds == pytest.approx(2.5e-5 + 2 * 63 / 64 * 1e9 / (400e9 * 0.8))
    gathered = gigabyte._replace(way="all_gather")
    assert inside.seconds(gathered) < seconds


def test_ranks_of_a_group_share_a_node_as_the_layout_places_them() -> None:
    parallel = {"tensor": 4, "context": 2, "pipeline": 2}
    config = big(parallel)
    layout = plan_layout(config, 64)  # nodes of 8: tensor x context
    groups = {
        name: Network(layout, H100).members(name)  # type: ignore[arg-type]
        for name in ("tensor", "context", "data", "pipeline", "world")
    }
    assert groups == {
        "tensor": (4, 4),
        "context": (2, 2),
        "data": (8, 2),
        "pipeline": (2, 1),
        "world": (64, 8),
    }


@pytest.mark.parametrize("name", known())
def test_every_hardware_file_names_a_source_for_each_figure(name: str) -> None:
    found = hardware_of(name).model_dump()
    figures = {k: v for k, v in found.items() if isinstance(v, dict)}
    assert len(figures) == 15
    assert all(len(figure["source"]) > 20 for figure in figures.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_loss_moves_of_a_logit_is_counted(precision: str) -> None:
    """Reads and writes of all tensors with a logit for each token and piece, but in products; the
    loss picks one logit of a row."""
    tokens, vocabulary = 64, 1024
    moved, still = 0, ("mm", "nll_loss_forward", "_unsafe_view")

    class Moved(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal moved
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if not func.is_view and name not in still:
                for tensor in tree_leaves((args, out)):
                    if isinstance(tensor, torch.Tensor) and tensor.numel() == tokens * vocabulary:
                        moved += tensor.nbytes
            return out

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x = torch.zeros(1, tokens, 8, dtype=dtype, requires_grad=True)
    head = torch.zeros(vocabulary, 8, dtype=dtype, requires_grad=True)
    with Moved():
        logits = torch.nn.functional.linear(x, head)
        token_loss(logits, torch.zeros(1, tokens, dtype=torch.int64)).sum().backward()
    assert moved / (tokens * vocabulary) == paces.OF_A_LOGIT[precision]
