"""The chunked memory is the oracle: outputs, final states and every gradient, in float64."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.cases import check_parity, influence, make_case, random_positions
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import RULES, MemorySpec

KINDS = list(
    itertools.product(
        (1, 2, 3), ("gelu", "silu"), (True, False), ("init", "zero"), ("inclusive", "exclusive")
    )
)


def spec_of(kind: tuple, chunk: int) -> MemorySpec:
    depth, activation, norm, decay_to, read = kind
    return MemorySpec(depth, 2, activation, norm, chunk, decay_to, read)


def test_the_rules_are_the_ones_tested_here() -> None:
    assert list(RULES) == ["titans"]


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows(kind: tuple, chunk: int) -> None:
    """No state, no resets, no pads; the last chunk is ragged."""
    seed = KINDS.index(kind)
    case = make_case(spec_of(kind, chunk), {1: 17, 4: 23, 16: 45, 64: 77}[chunk], seed=seed)
    assert influence(case, chunked_memory) > 0.01
    check_parity(case, chunked_memory, oracle_memory)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_with_carried_state(kind: tuple, chunk: int) -> None:
    """Resets and pads anywhere; rows go on inside a chunk from weights, momentum and anchor."""
    seed = 100 + KINDS.index(kind)
    tokens = {1: 18, 4: 29, 16: 50, 64: 90}[chunk]
    positions = random_positions(3, tokens, chunk, seed, carried=True)
    case = make_case(
        spec_of(kind, chunk),
        tokens,
        rows=3,
        seed=seed,
        positions=positions,
        state=True,
        anchor=True,
    )
    assert influence(case, chunked_memory) > 0.01
    check_parity(case, chunked_memory, oracle_memory)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 15])
@pytest.mark.parametrize("start", [None, 0, 4 * 64, 7])
def test_short_rows(chunk: int, tokens: int, start: int | None) -> None:
    """Fewer tokens than a chunk, down to one: the steps of generation."""
    positions = None if start is None else (start + torch.arange(tokens)).expand(2, tokens)
    for read in ("inclusive", "exclusive"):
        spec = MemorySpec(expansion=2, chunk=chunk, read=read)
        case = make_case(
            spec,
            tokens,
            seed=tokens,
            positions=positions,
            state=start is not None,
            anchor=start is not None and bool(start % chunk),
        )
        check_parity(case, chunked_memory, oracle_memory)


@given(
    kind=st.sampled_from(KINDS),
    chunk=st.sampled_from([1, 2, 4, 5, 16, 64]),
    tokens=st.integers(1, 72),
    rows=st.integers(1, 4),
    state=st.booleans(),
    carried=st.booleans(),
    pads=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_anything(
    kind: tuple,
    chunk: int,
    tokens: int,
    rows: int,
    state: bool,
    carried: bool,
    pads: bool,
    seed: int,
) -> None:
    positions = random_positions(rows, tokens, chunk, seed, carried=carried, pads=pads)
    case = make_case(
        spec_of(kind, chunk),
        tokens,
        rows=rows,
        seed=seed,
        positions=positions,
        state=state,
        anchor=state,
    )
    check_parity(case, chunked_memory, oracle_memory)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_at_initialisation_no_exception_is_needed(depth: int, chunk: int) -> None:
    """Decay to init, gates as a layer starts with: 1e-10 holds without looking at rounding."""
    for seed, norm in itertools.product(range(3), (True, False)):
        spec = MemorySpec(depth, 2, "gelu", norm, chunk, "init", "inclusive")
        tokens = 80
        positions = random_positions(2, tokens, chunk, seed, carried=True)
        case = make_case(
            spec,
            tokens,
            seed=seed,
            positions=positions,
            state=True,
            anchor=True,
            gates="initial",
        )
        assert check_parity(case, chunked_memory, oracle_memory) == []


def test_gates_of_zero_and_one() -> None:
    """Products of gates are multiplied up, never divided: exact at the ends of their range."""
    for eta, alpha in itertools.product((0.0, 1.0), (0.0, 1.0)):
        case = make_case(MemorySpec(expansion=2, chunk=4), 11, seed=5)
        for n in range(2):
            case.leaves[f"eta.{n}"].fill_(eta)
            case.leaves[f"alpha.{n}"].fill_(alpha)
            case.leaves[f"theta.{n}"].fill_(0.01)
        check_parity(case, chunked_memory, oracle_memory)
