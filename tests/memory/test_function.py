"""What the chunked memory promises beside its values: bits, cuts, packing, poison, types."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.memory.cases import (
    GATES,
    Case,
    gaps,
    influence,
    make_case,
    random_positions,
    spread,
)
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.packing import plan_documents
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState

PER_TOKEN = ("q", "k", "v", *GATES)


def is_per_token(name: str) -> bool:
    return name.split(".")[0] in PER_TOKEN


def is_state(name: str) -> bool:
    return name.split(".")[0] in ("weights", "momentum", "anchor")


def changed(case: Case, where: tuple) -> Case:
    """The case with every per-token input replaced at `where` (an index of [N, H, T])."""
    leaves = {n: x.clone() for n, x in case.leaves.items()}
    for name, x in leaves.items():
        if is_per_token(name):
            x[where] = x[where] * 0.37 + 0.011
    return replace(case, leaves=leaves)


@pytest.mark.parametrize(
    "depth, norm, decay_to, read",
    [
        (1, False, "zero", "inclusive"),
        (2, True, "init", "exclusive"),
        (2, True, "zero", "inclusive"),
        (3, False, "init", "inclusive"),
    ],
)
def test_gradcheck(depth: int, norm: bool, decay_to: str, read: str) -> None:
    """By finite differences: independent of the oracle and of autograd."""
    positions = torch.tensor([[2, 3, 4, 5, 6, -1], [0, 1, 2, 0, 1, 2]])
    spec = MemorySpec(depth, 2, "gelu", norm, 4, decay_to, read)
    also = {"state": True, "anchor": True, "start": depth == 2}
    case = make_case(spec, 6, heads=1, width=2, seed=depth, positions=positions, **also)
    names = list(case.leaves)

    def f(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, state = replace(case, leaves=dict(zip(names, leaves))).run(chunked_memory)
        return (y, *state.weights, *state.momentum, *(state.anchor or ()))

    leaves = [x.clone().requires_grad_() for x in case.leaves.values()]
    fast = depth == 3  # random projections of the Jacobian
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_causal_to_the_bit(chunk: int) -> None:
    """Changing token j moves nothing before j, and nothing in later documents of the row."""
    positions = torch.cat([torch.arange(5, 26), torch.arange(14)]).expand(2, 35)
    spec = MemorySpec(expansion=2, chunk=chunk)
    case = make_case(spec, 35, positions=positions, state=True, anchor=True)
    with torch.no_grad():
        y, _ = case.run(chunked_memory)
        for j in (0, 1, 3, 10, 20, 21, 22, 30, 34):
            other, _ = changed(case, (slice(None), slice(None), j)).run(chunked_memory)
            assert torch.equal(other[:, :, :j], y[:, :, :j])
            assert not torch.equal(other[:, :, j], y[:, :, j])
            if j < 21:
                assert torch.equal(other[:, :, 21:], y[:, :, 21:])


def test_other_rows_do_not_matter_to_the_bit() -> None:
    positions = torch.stack([torch.arange(t, t + 30) for t in (0, 3, 9)])
    spec = MemorySpec(expansion=2, chunk=4)
    case = make_case(spec, 30, rows=3, positions=positions, state=True, anchor=True)
    here, there = case.results(chunked_memory), {}
    for row in (0, 2):
        there = changed(case, (row,)).results(chunked_memory)
        own = [n for n in here if n == "y" or n.startswith("final ")]
        own += [f"d {n}" for n in case.leaves if is_per_token(n) or is_state(n)]
        for name in own:
            assert torch.equal(here[name][1], there[name][1]), name
        assert not torch.equal(here["y"][row], there["y"][row])


def test_repeatable_to_the_bit() -> None:
    positions = random_positions(3, 50, 4, 3, carried=True)
    spec = MemorySpec(expansion=2, chunk=4)
    case = make_case(spec, 50, rows=3, positions=positions, state=True, anchor=True)
    first, second = case.results(chunked_memory), case.results(chunked_memory)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
@pytest.mark.parametrize("decay_to", ["init", "zero"])
def test_packed_documents_equal_the_documents_alone(decay_to: str, read: str) -> None:
    """Not padded to the chunk: a reset in mid-chunk starts the count again."""
    lengths = (9, 1, 17, 4, 6)
    spec = MemorySpec(expansion=2, chunk=4, decay_to=decay_to, read=read)
    total = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    case = make_case(spec, total, rows=1, positions=positions)
    packed = case.results(chunked_memory)
    noise = torch.randn(1, 2, total, 4, dtype=torch.float64, generator=_seeded(1))
    at = 0
    for n in lengths:
        cut = slice(at, at + n)
        leaves = {
            name: x[:, :, cut] if is_per_token(name) else x for name, x in case.leaves.items()
        }
        leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        y, _ = Case(spec, leaves).run(chunked_memory)
        assert spread(y.detach(), packed["y"][:, :, cut]) < 1e-10
        if at + n < total:  # the last one's state has an upstream gradient as well
            found = torch.autograd.grad((y * noise[:, :, cut]).sum(), [*leaves.values()])
            for name, g in zip(leaves, found):
                if is_per_token(name):
                    assert spread(g, packed[f"d {name}"][:, :, cut]) < 1e-10, name
        at += n


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_segments(case: Case, cuts: list[int]) -> Case:
    """The same case, but `run` goes segment by segment, the state handed on."""

    class Segmented(Case):
        def run(self, memory):  # type: ignore[no-untyped-def]
            assert self.positions is not None
            state_leaves = {n: x for n, x in self.leaves.items() if is_state(n)}
            ys = []
            for a, b in itertools.pairwise([0, *cuts, self.positions.shape[1]]):
                leaves = {
                    n: x[:, :, a:b] if is_per_token(n) else x
                    for n, x in self.leaves.items()
                    if not is_state(n)
                }
                piece = Case(self.spec, leaves | state_leaves, self.positions[:, a:b])
                y, state = piece.run(memory)
                ys.append(y)
                state_leaves = {
                    f"{kind}.{n}": x
                    for kind in ("weights", "momentum", "anchor")
                    for n, x in enumerate(getattr(state, kind) or ())
                }
            return torch.cat(ys, 2), state

    return Segmented(case.spec, case.leaves, case.positions, case.seed)


def assert_cut_anywhere(case: Case, cuts: list[int]) -> None:
    whole = case.results(chunked_memory)
    pieces = in_segments(case, cuts).results(chunked_memory)
    for name, gap in gaps(pieces, whole).items():
        assert gap < 1e-10, (name, gap, cuts)


@pytest.mark.parametrize("decay_to", ["init", "zero"])
def test_a_cut_at_any_token_goes_on_as_one_pass(decay_to: str) -> None:
    spec = MemorySpec(expansion=2, chunk=4, decay_to=decay_to)
    positions = torch.stack([torch.arange(14), torch.cat([torch.arange(6, 11), torch.arange(9)])])
    case = make_case(spec, 14, positions=positions, state=True, anchor=True)
    assert influence(case, chunked_memory) > 0.01
    for cut in range(1, 14):
        assert_cut_anywhere(case, [cut])
    assert_cut_anywhere(case, list(range(1, 14)))  # token by token: generation


@given(
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([1, 3, 4, 16]),
    cuts=st.sets(st.integers(1, 39), min_size=1, max_size=4),
    read=st.sampled_from(["inclusive", "exclusive"]),
    depth=st.integers(1, 3),
)
def test_cuts_anywhere(seed: int, chunk: int, cuts: set[int], read: str, depth: int) -> None:
    spec = MemorySpec(depth, 2, chunk=chunk, read=read)
    positions = random_positions(2, 40, chunk, seed, carried=True)
    positions[:, -1] = torch.where(positions[:, -1] >= 0, positions[:, -1], 0)  # ends on a token
    case = make_case(spec, 40, seed=seed, positions=positions, state=True, anchor=True)
    assert_cut_anywhere(case, sorted(cuts))


def test_nothing_reads_pads_or_a_discarded_state() -> None:
    """Poisoned with NaN they leave every result and gradient as it was, to the bit."""
    positions = torch.tensor([[-1, 0, 1, 2, -1, 3, 4, 5, -1], [6, 7, 8, 0, 1, -1, -1, 2, 3]])
    spec = MemorySpec(expansion=2, chunk=4)
    case = make_case(spec, 9, positions=positions, state=True, anchor=True)
    clean = case.results(chunked_memory)
    leaves = {n: x.clone() for n, x in case.leaves.items()}
    for name, x in leaves.items():
        if is_per_token(name):
            x.transpose(1, 2)[positions < 0] = torch.nan
        if is_state(name):
            x[0] = torch.nan
    poisoned = replace(case, leaves=leaves).results(chunked_memory)
    for name, x in clean.items():
        assert torch.equal(x, poisoned[name]), name
    assert clean["y"].transpose(1, 2)[positions < 0].abs().max() == 0
    assert all(clean[f"d weights.{n}"][0].abs().max() == 0 for n in range(2))


def test_a_batch_without_tokens_hands_its_state_through() -> None:
    for decay_to, state in itertools.product(("init", "zero"), (True, False)):
        positions = torch.full((2, 5), -1)
        spec = MemorySpec(expansion=2, chunk=4, decay_to=decay_to)
        case = make_case(spec, 5, positions=positions, state=state, anchor=state)
        out, expected = case.results(chunked_memory), case.results(oracle_memory)
        assert out["y"].abs().max() == 0
        for name, x in expected.items():  # the oracle adds and subtracts w_init
            assert torch.allclose(out[name], x, rtol=1e-14, atol=1e-14), name
        if state:
            assert torch.equal(out["final weights.1"], case.leaves["weights.1"])
            assert torch.equal(out["final anchor.0"], case.leaves["anchor.0"])


def test_rows_on_a_boundary_have_their_weights_for_an_anchor() -> None:
    positions = torch.stack([torch.arange(8), torch.arange(2, 10)])
    case = make_case(MemorySpec(expansion=2, chunk=4), 8, positions=positions)
    out = case.results(chunked_memory, gradients=False)
    assert torch.equal(out["final anchor.0"][0], out["final weights.0"][0])
    assert spread(out["final anchor.0"][1], out["final weights.0"][1]) > 0.01
    even = make_case(MemorySpec(expansion=2, chunk=4), 8).results(chunked_memory)
    assert "final anchor.0" not in even


def test_one_plan_serves_many_layers() -> None:
    positions = random_positions(3, 40, 4, 8, carried=True)
    spec = MemorySpec(expansion=2, chunk=4)
    case = make_case(spec, 40, rows=3, positions=positions, state=True, anchor=True)
    plan = plan_documents(positions, 4)

    def planned(*args, positions=None, state=None):  # type: ignore[no-untyped-def]
        return chunked_memory(*args, plan=plan, state=state)

    first, second = case.results(chunked_memory), case.results(planned)
    assert all(torch.equal(first[n], second[n]) for n in first)
    with pytest.raises(ValueError, match="plan anew"):
        make_case(spec, 39, rows=3).run(lambda *a, positions, state: chunked_memory(*a, plan=plan))


def test_float32_and_bfloat16() -> None:
    """States, gates and sums stay float32 whatever the type of q, k, v."""
    case = make_case(MemorySpec(chunk=16), 60, width=8, gates="hot")
    for name in ("q", "k", "v"):
        case.leaves[name] = case.leaves[name].bfloat16().double()  # exact in each of the types
    exact = case.results(chunked_memory, gradients=True)

    single = replace(case, leaves={n: x.float() for n, x in case.leaves.items()})
    half = replace(
        single,
        leaves={n: x.bfloat16() if n in "qkv" else x for n, x in single.leaves.items()},
    )
    with torch.no_grad():
        y32, state32 = single.run(chunked_memory)
        y16, state16 = half.run(chunked_memory)
    assert y32.dtype == torch.float32 and y16.dtype == torch.bfloat16
    assert spread(y32.double(), exact["y"]) < 1e-5
    assert torch.equal(y16, y32.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(state16.weights, state32.weights))
    # Gradients: each comes back in the type of its argument, close to the exact one.
    leaves = {n: x.clone().requires_grad_() for n, x in half.leaves.items()}
    y, _ = replace(half, leaves=leaves).run(chunked_memory)
    noise = torch.randn(y.shape, dtype=torch.float64, generator=_seeded(1))
    reference = {n: x.clone().requires_grad_() for n, x in case.leaves.items()}
    z, _ = replace(case, leaves=reference).run(chunked_memory)
    noise = noise.bfloat16()
    mine = torch.autograd.grad((y.double() * noise).sum(), list(leaves.values()))
    theirs = torch.autograd.grad((z * noise).sum(), list(reference.values()))
    for name, a, b in zip(leaves, mine, theirs):
        assert a.dtype == leaves[name].dtype
        assert spread(a.double(), b) < 2e-2 if name in "qkv" else 1e-4, name


def test_autocast_leaves_the_states_alone() -> None:
    case = make_case(MemorySpec(chunk=4), 20)
    single = replace(case, leaves={n: x.float() for n, x in case.leaves.items()})
    plain = single.results(chunked_memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = single.results(chunked_memory)
    assert all(torch.equal(plain[n], cast[n]) for n in plain)


def test_state_returned_is_differentiable_into_the_next_call() -> None:
    """Loss on the second segment alone reaches the first one's inputs (asserted by value above)."""
    case = make_case(MemorySpec(expansion=2, chunk=4), 8)
    leaves = {n: x.clone().requires_grad_() for n, x in case.leaves.items()}
    _, state = replace(case, leaves=leaves).run(chunked_memory)
    assert isinstance(state, MemoryState)
    total = state.momentum[0].square().sum()
    (dv,) = torch.autograd.grad(total, leaves["v"])
    assert float(dv[:, :, 0].abs().min()) > 0


def test_under_activation_checkpointing() -> None:
    positions = random_positions(2, 40, 4, 3, carried=True)
    case = make_case(MemorySpec(chunk=4), 40, positions=positions, state=True, anchor=True)

    def recomputed(*args, positions, state):  # type: ignore[no-untyped-def]
        return checkpoint(
            chunked_memory, *args, positions=positions, state=state, use_reentrant=False
        )

    first, second = case.results(chunked_memory), case.results(recomputed)
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_the_oracle_and_repeatable() -> None:
    positions = random_positions(3, 50, 16, 3, carried=True)
    spec = MemorySpec(expansion=2, chunk=16)
    case = make_case(spec, 50, rows=3, positions=positions, state=True, anchor=True)
    there = replace(
        case, leaves={n: x.cuda() for n, x in case.leaves.items()}, positions=positions.cuda()
    )

    def on_device(*args, positions, state):  # type: ignore[no-untyped-def]
        y, out = chunked_memory(*args, positions=positions, state=state)
        return y.cpu(), out.map(lambda x: x.cpu())

    first, second = there.results(on_device), there.results(on_device)
    expected = case.results(oracle_memory)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        assert spread(x.cpu(), expected[name]) < 1e-10, name
