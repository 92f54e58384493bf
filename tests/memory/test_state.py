"""State, plan and the errors that a caller can cause."""

from dataclasses import replace

import pytest
import torch

from tests.memory.cases import make_case, spread
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.packing import plan_documents, plan_rows
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import (
    MemoryState,
    absolute_weights,
    concatenate,
    initial_state,
    memory_forward,
)

F64 = torch.float64


def test_memory_forward_by_hand() -> None:
    """x = (1, -1), F = (3, -1): mean 1, variance 4, so xhat = (1, -1) / sqrt(1 + 1e-5 / 4)."""
    spec = MemorySpec(depth=1)
    x = torch.tensor([1.0, -1.0], dtype=F64).view(1, 1, 1, 2)
    w = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=F64)[None]  # one head
    norm = (torch.tensor([[2.0, 4.0]], dtype=F64), torch.tensor([[0.5, 0.25]], dtype=F64))
    r = (1 + 1e-5 / 4) ** -0.5
    y = memory_forward(x, (w,), norm, spec).flatten()
    assert y.tolist() == pytest.approx([1 + 2 * r + 0.5, -1 - 4 * r + 0.25], rel=1e-14)
    plain = memory_forward(x, (w[None],), None, replace(spec, residual_norm=False))
    assert plain.flatten().tolist() == [3, -1]


def test_memory_forward_is_a_read_of_the_state() -> None:
    """Frozen retrieval = a read through the state that a call left behind."""
    for decay_to in ("init", "zero"):
        spec = MemorySpec(expansion=2, chunk=4, decay_to=decay_to)
        case = make_case(spec, 8)
        x = case.leaves
        _, state = case.run(chunked_memory)
        w_init = (x["w_init.0"], x["w_init.1"])
        weights = absolute_weights(state, w_init, spec)
        y = memory_forward(x["q"], weights, (x["gain"], x["bias"]), spec)
        # The same by the memory, reading before it writes.
        again = replace(spec, read="exclusive")
        per_token = ("q", "k", "v", "theta.0", "theta.1", "alpha.0", "alpha.1", "eta.0", "eta.1")
        leaves = {n: v[:, :, :1] if n in per_token else v for n, v in x.items()}
        for n in range(2):
            leaves[f"weights.{n}"], leaves[f"momentum.{n}"] = state.weights[n], state.momentum[n]
        z, _ = replace(case, spec=again, leaves=leaves, positions=torch.full((2, 1), 8)).run(
            chunked_memory
        )
        assert spread(y[:, :, :1], z) < 1e-13


def test_initial_state() -> None:
    w = (torch.ones(2, 3, 3, dtype=F64), torch.ones(2, 3, 3, dtype=F64))
    init = initial_state(w, 4, MemorySpec(expansion=1))
    assert [float(x.abs().max()) for x in (*init.weights, *init.momentum)] == [0, 0, 0, 0]
    assert init.size == 4 and init.anchor is None
    zero = initial_state(w, 4, MemorySpec(expansion=1, decay_to="zero"))
    assert torch.equal(zero.weights[0], w[0].expand(4, 2, 3, 3))
    half = initial_state((w[0].bfloat16(),), 1, MemorySpec(depth=1))
    assert half.weights[0].dtype == torch.float32
    for spec, state in ((MemorySpec(), init), (MemorySpec(decay_to="zero"), zero)):
        assert torch.equal(absolute_weights(state, w, spec)[0], w[0].expand(4, 2, 3, 3))


def test_rows_and_concatenation() -> None:
    x = torch.arange(3.0).view(3, 1, 1, 1)
    state = MemoryState((x,), (10 * x,), (100 * x,))
    assert state.rows(2).anchor[0].flatten().tolist() == [0, 100]
    assert state.rows(slice(1, None)).momentum[0].flatten().tolist() == [10, 20]
    assert state.rows(torch.tensor([2, 0])).weights[0].flatten().tolist() == [2, 0]
    both = concatenate([state.rows(1), MemoryState((x,), (x,), None)])
    assert both.anchor is not None
    assert both.anchor[0].flatten().tolist() == [0, 0, 1, 2]  # on a boundary: the weights
    assert concatenate([MemoryState((x,), (x,), None)] * 2).anchor is None
    leaf = torch.ones(1, 1, 1, 1, requires_grad=True)
    assert not MemoryState((leaf,), (leaf,), (leaf,)).detach().anchor[0].requires_grad


def test_plan_of_packed_documents() -> None:
    """Row 0: 3 tokens of a document from position 5, then 5 tokens; row 1: pad, 2 tokens, pads."""
    positions = torch.tensor([[5, 6, 7, 0, 1, 2, 3, 4], [-1, 0, 1, -1, -1, -1, -1, -1]])
    plan = plan_documents(positions, 4)
    # Chunks: (5 6 7), (0 1 2 3), (4), (0 1); the document of two chunks comes first.
    assert plan.sizes == (3, 1) and plan.offsets == (0, 3, 4)
    flat = (plan.row * 8 + plan.column).view(4, 4)
    assert plan.used is not None and plan.last is not None
    assert plan.last.tolist() == [3, 2, 1, 0]
    assert [f[u].tolist() for f, u in zip(flat, plan.used)] == [
        [3, 4, 5, 6],
        [0, 1, 2],
        [9, 10],
        [7],
    ]
    assert plan.resumed is not None and [x.tolist() for x in plan.resumed] == [[1], [0]]
    assert plan.inside is not None and [x.tolist() for x in plan.inside] == [[1], [0]]
    assert plan.fresh.tolist() == [2, 0] or sorted(plan.fresh.tolist()) == [0, 2]
    assert plan.ends[0] is not None and [x.tolist() for x in plan.ends[0]] == [[2], [1]]
    assert plan.ends[1] is not None and [x.tolist() for x in plan.ends[1]] == [[0], [0]]
    assert plan.ends_inside and plan.empty is None
    x = torch.arange(16.0).view(2, 1, 8, 1)
    packed = plan.pack(x, 0, 4, torch.float64)
    assert packed[1].flatten().tolist() == [0, 1, 2, 0]
    expected = torch.where(positions[:, None, :, None] >= 0, x, 0)
    assert torch.equal(plan.unpack(packed, torch.float32), expected)


@pytest.mark.parametrize("steps, runs", [(0, 0), (1, 1), (2, 1), (16, 4), (17, 4), (256, 16)])
def test_boundaries_kept(steps: int, runs: int) -> None:
    plan = plan_rows(1, 4 * steps, 4, torch.device("cpu"))
    groups = plan.groups
    assert [j for a, b in groups for j in range(a, b)] == list(range(steps))
    assert len(groups) == runs


@pytest.mark.parametrize("memory", [chunked_memory, oracle_memory])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": torch.tensor([[0, 1, 3, 4]] * 2)}, "position 3 follows 1"),
        ({"positions": torch.tensor([[0, 1, 2]] * 2)}, r"\(2, 3\)"),
        ({"positions": torch.tensor([[5, 6, 7, 8]] * 2)}, "carry the anchor"),
        ({"positions": None}, "pass positions"),
        ({"q": torch.zeros(2, 2, 3, 4)}, "all are"),
        ({"theta.0": torch.zeros(2, 2, 4).bfloat16()}, "float32 or float64"),
        ({"w_init.0": torch.zeros(2, 4, 7)}, "w_init"),
        ({"weights.0": torch.zeros(3, 2, 4, 8)}, "rows"),
    ],
)
def test_errors_name_the_value(memory, change: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    positions = torch.arange(4, 8).expand(2, 4)
    case = make_case(MemorySpec(expansion=2, chunk=4), 4, positions=positions, state=True)
    leaves = {n: x.float() for n, x in case.leaves.items()}
    if "theta.0" in change:
        leaves |= {n: x.bfloat16() for n, x in leaves.items() if n.startswith("theta")}
    if "positions" in change:
        case = replace(case, positions=change["positions"])
    leaves |= {n: x for n, x in change.items() if n != "positions"}
    with pytest.raises(ValueError, match=message):
        replace(case, leaves=leaves).run(memory)


def test_specs_are_checked() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        MemorySpec(depth=0)
    with pytest.raises(ValueError, match="'relu'"):
        MemorySpec(activation="relu")  # type: ignore[arg-type]
    assert MemorySpec(depth=3, expansion=4).shapes(8) == ((8, 32), (32, 32), (32, 8))


def test_a_plan_is_checked_against_the_state() -> None:
    positions = torch.arange(5, 9).expand(2, 4)
    plan = plan_documents(positions, 4)
    case = make_case(MemorySpec(expansion=2, chunk=4), 4, positions=positions, state=True)
    with pytest.raises(ValueError, match="holds no anchor"):
        case.run(lambda *a, positions, state: chunked_memory(*a, plan=plan, state=state))
