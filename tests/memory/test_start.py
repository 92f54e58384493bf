"""Documents that start from a given state: what persistent tokens leave behind."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.memory.cases import check_parity, make_case, random_positions, spread
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState, initial_state

KINDS = list(
    itertools.product(
        (1, 2, 3), (True, False), ("init", "zero"), ("inclusive", "exclusive"), (1, 4, 16)
    )
)


def spec_of(kind: tuple) -> MemorySpec:
    depth, norm, decay_to, read, chunk = kind
    return MemorySpec(depth, 2, "gelu", norm, chunk, decay_to, read)


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_memory_is_the_oracle(kind: tuple, carried: bool) -> None:
    """Resets and pads anywhere, rows without a token; with and without a carried state."""
    seed, tokens, chunk = KINDS.index(kind), 33, kind[-1]
    positions = random_positions(4, tokens, chunk, seed, carried=carried)
    also = {"state": carried, "anchor": carried, "start": True}
    case = make_case(spec_of(kind), tokens, rows=4, seed=seed, positions=positions, **also)
    check_parity(case, chunked_memory, oracle_memory)


@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] == 2])
def test_a_document_after_others_is_the_whole_sequence(kind: tuple) -> None:
    """Tokens that start from the state of a prefix go on from it: only the prefix' reads go.

    The prefix here fills whole chunks, so the count of chunks is the same either way.
    """
    prefix, tokens = 16, 21
    whole = make_case(spec_of(kind), prefix + tokens, rows=1, seed=3)
    tokenwise = ("q", "k", "v", "theta", "alpha", "eta")

    def part(where: slice) -> dict[str, torch.Tensor]:
        return {
            n: x[:, :, where] if n.split(".")[0] in tokenwise else x
            for n, x in whole.leaves.items()
        }

    y, state = whole.run(oracle_memory)
    _, before = replace(whole, leaves=part(slice(prefix))).run(chunked_memory)
    after = part(slice(prefix, None))
    for n in range(2):
        after[f"start.weights.{n}"] = before.weights[n]
        after[f"start.momentum.{n}"] = before.momentum[n]
    case = replace(whole, leaves=after)
    for positions in (None, torch.arange(tokens)[None]):
        z, end = replace(case, positions=positions).run(chunked_memory)
        assert spread(z, y[:, :, prefix:]) < 1e-10
        for a, b in zip((*end.weights, *end.momentum), (*state.weights, *state.momentum)):
            assert spread(a, b) < 1e-10


@pytest.mark.parametrize("decay_to", ["init", "zero"])
def test_the_initial_state_as_start_changes_no_bit(decay_to: str) -> None:
    spec = MemorySpec(expansion=2, chunk=4, decay_to=decay_to)
    positions = random_positions(3, 30, 4, 5, carried=False)
    plain = make_case(spec, 30, rows=3, positions=positions)
    x = plain.leaves
    first = initial_state((x["w_init.0"], x["w_init.1"]), 1, spec)
    more = {f"start.weights.{n}": first.weights[n].clone() for n in range(2)}
    more |= {f"start.momentum.{n}": first.momentum[n] for n in range(2)}
    with_start = replace(plain, leaves={**x, **more}).results(chunked_memory)
    without = plain.results(chunked_memory)
    for name, value in without.items():
        if decay_to == "init" or not name.startswith("d w_init"):
            assert torch.equal(value, with_start[name]), name
    if decay_to == "zero":  # there W_init is where documents start and nothing else
        for n in range(2):
            assert torch.equal(with_start[f"d start.weights.{n}"][0], without[f"d w_init.{n}"])
            assert not with_start[f"d w_init.{n}"].any()


@pytest.mark.parametrize("memory", [chunked_memory, oracle_memory])
def test_rows_without_a_token_stand_at_the_start(memory) -> None:  # type: ignore[no-untyped-def]
    positions = torch.tensor([[0, 1, 2], [-1, -1, -1]])
    case = make_case(MemorySpec(expansion=2, chunk=4), 3, positions=positions, start=True)
    _, state = case.run(memory)
    for n in range(2):
        assert spread(state.weights[n][1], case.leaves[f"start.weights.{n}"][0]) < 1e-14
        assert spread(state.momentum[n][1], case.leaves[f"start.momentum.{n}"][0]) < 1e-14


@pytest.mark.parametrize("memory", [chunked_memory, oracle_memory])
def test_a_start_that_does_not_fit_is_refused(memory) -> None:  # type: ignore[no-untyped-def]
    case = make_case(MemorySpec(expansion=2, chunk=4), 3, start=True)
    x = case.leaves
    two = {n: v.repeat(2, 1, 1, 1) if n.startswith("start") else v for n, v in x.items()}
    with pytest.raises(ValueError, match="documents start from one row"):
        replace(case, leaves=two).run(memory)

    def anchored(*args, start: MemoryState, **named):  # type: ignore[no-untyped-def]
        return memory(*args, start=replace(start, anchor=start.weights), **named)

    with pytest.raises(ValueError, match="without an anchor"):
        case.run(anchored)
