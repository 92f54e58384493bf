"""Random problems for the memory, and how far a device's results are from the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState

Memory = Callable[..., tuple[Tensor, MemoryState]]


@dataclass(frozen=True)
class Problem:
    """The sizes of a problem, what is special about its positions, and the memory."""

    rows: int
    heads: int
    tokens: int
    width: int
    spec: MemorySpec
    packed: bool = False  # resets and pads
    carried: bool = False  # rows go on, most of them inside a chunk


PROBLEMS = {
    "whole rows": Problem(2, 4, 128, 32, MemorySpec(chunk=16)),
    "ragged": Problem(2, 2, 101, 64, MemorySpec(chunk=32)),
    "packed": Problem(4, 2, 150, 32, MemorySpec(chunk=16), packed=True),
    "packed and carried": Problem(4, 2, 150, 32, MemorySpec(chunk=64), packed=True, carried=True),
    "one carried token": Problem(4, 4, 1, 64, MemorySpec(chunk=16), carried=True),
    "depth 3, no norm, to zero, exclusive": Problem(
        2, 2, 77, 32, MemorySpec(3, 2, "silu", False, 16, "zero", "exclusive"), True, True
    ),
}


def made_tiny(p: Problem) -> Problem:
    """The same kind of problem for a moment on a CPU."""
    return replace(p, heads=2, tokens=-(-p.tokens // 4), width=8)


def memory_leaves(p: Problem, seed: int) -> dict[str, Tensor]:
    """Random arguments of a memory in float64: unit q and k, gates within the stable range."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    token, spec = (p.rows, p.heads, p.tokens), p.spec
    x = {n: torch.nn.functional.normalize(normal(*token, p.width), dim=-1) for n in "qk"}
    x["v"] = normal(*token, p.width)
    x["eta"] = 0.95 * uniform(*token, spec.depth)
    limit = ((1 - x["eta"]) / spec.chunk).clamp(max=1 / 16)
    x["theta"] = limit * (0.5 + 0.5 * uniform(*token, spec.depth))
    x["alpha"] = 0.2 * uniform(*token, spec.depth)
    if spec.residual_norm:
        x["gain"], x["bias"] = 1 + 0.2 * normal(p.heads, p.width), 0.2 * normal(p.heads, p.width)
    for n, (a, o) in enumerate(spec.shapes(p.width)):
        w = x[f"w_init.{n}"] = (2 / (a + o)) ** 0.5 * normal(p.heads, a, o)
        if p.carried:
            base = w if spec.decay_to == "zero" else torch.zeros_like(w)
            for what, offset in (("weights", base), ("momentum", 0 * w), ("anchor", base)):
                x[f"{what}.{n}"] = offset + 0.1 * w.std() * normal(p.rows, *w.shape)
    return x


def memory_positions(p: Problem, seed: int) -> Tensor | None:
    """[N, T]: documents of random lengths and pads; all rows but the last may go on."""
    if not (p.packed or p.carried):
        return None
    g = torch.Generator().manual_seed(seed)
    out = torch.full((p.rows, p.tokens), -1)
    for n in range(p.rows):
        at = p.spec.chunk + 3 * n + 1 if p.carried and n < p.rows - 1 else 0
        for t in range(p.tokens):
            luck = float(torch.rand((), generator=g))
            if p.packed and luck < 0.1:
                continue
            at = 0 if p.packed and t and luck > 15 / 16 else at
            out[n, t] = at
            at += 1
    return out


def run_problem(
    memory: Memory, p: Problem, x: dict[str, Tensor], positions: Tensor | None
) -> tuple[Tensor, MemoryState]:
    """`memory` on the arguments of `memory_leaves`, on whatever device and of whatever type."""
    w_init, weights, momentum, anchor = (
        tuple(x[f"{what}.{n}"] for n in range(p.spec.depth) if f"{what}.{n}" in x)
        for what in ("w_init", "weights", "momentum", "anchor")
    )
    return memory(
        *(x[n] for n in ("q", "k", "v", "theta", "alpha", "eta")),
        w_init,
        (x["gain"], x["bias"]) if p.spec.residual_norm else None,
        p.spec,
        positions=positions,
        state=MemoryState(weights, momentum, anchor) if p.carried else None,
    )


def memory_results(
    memory: Memory, p: Problem, leaves: dict[str, Tensor], positions: Tensor | None, bf16: bool
) -> dict[str, Tensor]:
    """y, the final state and, under a fixed random upstream gradient, that of every argument."""
    x = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    y, end = run_problem(memory, p, x, positions)
    out = {"y": y}
    for what in ("weights", "momentum", "anchor"):
        out |= {f"final {what}.{n}": w for n, w in enumerate(getattr(end, what) or ())}
    g, upstream = torch.Generator().manual_seed(1), []
    for tensor in out.values():
        noise = torch.randn(tensor.shape, generator=g)
        upstream.append((noise.bfloat16() if bf16 else noise).to(tensor))
    gradients = torch.autograd.grad(list(out.values()), list(x.values()), upstream)
    out |= {f"d {name}": d for name, d in zip(x, gradients, strict=True)}
    return {name: t.detach().double().cpu() for name, t in out.items()}


def differences(p: Problem, device: str, *, bf16: bool, tiny: bool, seed: int) -> dict[str, float]:
    """max |chunked - oracle| / max |oracle| of each tensor: y, the final state, every gradient.

    The chunked memory runs on `device` in float32, with bf16 on q, k, v and y in bfloat16; the
    oracle on the CPU in float64, with bf16 from the same rounded q, k, v. Not finite: infinity.
    """
    p = made_tiny(p) if tiny else p
    leaves, positions = memory_leaves(p, seed), memory_positions(p, seed)
    if bf16:
        leaves |= {n: leaves[n].bfloat16().double() for n in "qkv"}
    mine = {
        n: x.to(device, torch.bfloat16 if bf16 and n in "qkv" else torch.float32)
        for n, x in leaves.items()
    }
    there = None if positions is None else positions.to(device)
    got = memory_results(chunked_memory, p, mine, there, bf16)
    want = memory_results(oracle_memory, p, leaves, positions, bf16)
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return {n: _relative(got[n], want[n]) for n in want}


def _relative(a: Tensor, b: Tensor) -> float:
    gap, size = float((a - b).abs().max()), float(b.abs().max())
    if gap != gap:
        return float("inf")
    return gap / size if size > 0 else gap
