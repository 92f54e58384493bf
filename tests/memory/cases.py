"""Random problems for the memory, and how two implementations are compared on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState

Memory = Callable[..., tuple[Tensor, MemoryState]]
HEADS, WIDTH = 2, 4


@dataclass
class Case:
    """The arguments of a memory, float64, each leaf requiring its gradient."""

    spec: MemorySpec
    leaves: dict[str, Tensor]
    positions: Tensor | None = None
    seed: int = 0

    def run(self, memory: Memory) -> tuple[Tensor, MemoryState]:
        x, layers = self.leaves, range(self.spec.depth)
        gates = [torch.stack([x[f"{g}.{n}"] for n in layers], -1) for g in GATES]
        norm = (x["gain"], x["bias"]) if self.spec.residual_norm else None
        state = None
        if "weights.0" in x:
            anchor = tuple(x[f"anchor.{n}"] for n in layers) if "anchor.0" in x else None
            state = MemoryState(
                tuple(x[f"weights.{n}"] for n in layers),
                tuple(x[f"momentum.{n}"] for n in layers),
                anchor,
            )
        more = {}
        if "start.weights.0" in x:
            halves = (tuple(x[f"start.{k}.{n}"] for n in layers) for k in ("weights", "momentum"))
            more["start"] = MemoryState(*halves)
        return memory(
            x["q"],
            x["k"],
            x["v"],
            *gates,
            tuple(x[f"w_init.{n}"] for n in layers),
            norm,
            self.spec,
            positions=self.positions,
            state=state,
            **more,
        )

    def results(self, memory: Memory, *, gradients: bool = True) -> dict[str, Tensor]:
        """Outputs, final state and, with random upstream gradients, every leaf's gradient."""
        leaves = {n: x.detach().clone().requires_grad_(gradients) for n, x in self.leaves.items()}
        y, state = replace(self, leaves=leaves).run(memory)
        out = {"y": y}
        for name in ("weights", "momentum", "anchor"):
            for n, x in enumerate(getattr(state, name) or ()):
                out[f"final {name}.{n}"] = x
        if gradients:
            noise = torch.Generator().manual_seed(self.seed + 1)
            total = sum(
                (x * torch.randn(x.shape, generator=noise, dtype=x.dtype)).sum()
                for x in out.values()
            )
            assert isinstance(total, Tensor)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            for (name, leaf), g in zip(leaves.items(), found):
                out[f"d {name}"] = torch.zeros_like(leaf) if g is None else g
        return {name: x.detach() for name, x in out.items()}


GATES = ("theta", "alpha", "eta")


def make_case(
    spec: MemorySpec,
    tokens: int,
    *,
    rows: int = 2,
    seed: int = 0,
    heads: int = HEADS,
    width: int = WIDTH,
    positions: Tensor | None = None,
    state: bool = False,
    anchor: bool = False,
    start: bool = False,
    gates: str = "hot",
) -> Case:
    """q, k of unit norm, Xavier weights, gates "hot" (alpha < .2, eta < .95) or "initial".

    theta lies within min(1/16, (1 - eta) / C), the stable range of MATH.md, section 7: "hot" gates
    make the memory matter without making rounding matter. "initial": alpha, eta, theta as a layer
    is initialised.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    x: dict[str, Tensor] = {}
    for name in ("q", "k"):
        x[name] = torch.nn.functional.normalize(normal(rows, heads, tokens, width), dim=-1)
    x["v"] = normal(rows, heads, tokens, width)
    for n in range(spec.depth):
        token = (rows, heads, tokens)
        if gates == "hot":
            eta = 0.95 * uniform(*token)
            limit = ((1 - eta) / spec.chunk).clamp(max=1 / 16)
            theta, alpha = limit * (0.5 + 0.5 * uniform(*token)), 0.2 * uniform(*token)
        else:
            eta = 0.6 + 0.02 * normal(*token).clamp(-3, 3)
            limit = ((1 - eta) / spec.chunk).clamp(max=1 / 64)
            theta, alpha = limit / 4, 0.003 * (1 + 0.1 * normal(*token).clamp(-3, 3))
        x[f"theta.{n}"], x[f"alpha.{n}"], x[f"eta.{n}"] = theta, alpha, eta
    for n, (a, o) in enumerate(spec.shapes(width)):
        scale = (2 / (a + o)) ** 0.5
        x[f"w_init.{n}"] = scale * normal(heads, a, o)
    if spec.residual_norm:
        x["gain"], x["bias"] = 1 + 0.2 * normal(heads, width), 0.2 * normal(heads, width)
    if state:
        for n in range(spec.depth):
            w = x[f"w_init.{n}"]
            base = torch.zeros_like(w) if spec.decay_to == "init" else w
            shape = (rows, *w.shape)
            kinds = ("weights", "momentum", "anchor") if anchor else ("weights", "momentum")
            for kind in kinds:
                offset = 0 if kind == "momentum" else base
                x[f"{kind}.{n}"] = offset + 0.1 * w.std() * normal(*shape)
    if start:
        for n in range(spec.depth):
            w = x[f"w_init.{n}"]
            base = torch.zeros_like(w) if spec.decay_to == "init" else w
            x[f"start.weights.{n}"] = base + 0.3 * w.std() * normal(1, *w.shape)
            x[f"start.momentum.{n}"] = 0.1 * w.std() * normal(1, *w.shape)
    return Case(spec, x, positions, seed)


def spread(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; 0 where both are 0 throughout."""
    assert a.shape == b.shape, (a.shape, b.shape)
    if b.numel() == 0:
        return 0.0
    gap, size = float((a - b).abs().max()), float(b.abs().max())
    return gap / size if size > 0 else gap


def gaps(mine: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """`spread` of each result; both must hold the same results."""
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    return {name: spread(mine[name], other[name]) for name in other}


def random_positions(
    rows: int, tokens: int, chunk: int, seed: int, *, carried: bool, pads: bool = True
) -> Tensor:
    """Documents of random lengths, pads anywhere; with `carried` most rows go on from a state."""
    g = torch.Generator().manual_seed(seed + 17)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    out = torch.full((rows, tokens), -1, dtype=torch.int64)
    for n in range(rows):
        if pads and n and below(12) == 0:
            continue  # a row without a token (never the first)
        at = below(3 * chunk) if carried and below(4) else 0
        for t in range(tokens):
            if pads and below(10) == 0:
                continue
            if t and below(2 * chunk + 4) == 0:
                at = 0
            out[n, t] = at
            at += 1
    if bool((out < 0).all()):
        out[0, 0] = 0
    return out


def nudged(case: Case) -> Case:
    """Every leaf moved by a relative 1e-15 either way: what rounding alone may do."""
    g = torch.Generator().manual_seed(case.seed + 2)
    leaves = {}
    for name, x in case.leaves.items():
        sign = (torch.randint(0, 2, x.shape, generator=g) * 2 - 1).to(x.dtype)
        leaves[name] = x * (1 + 1e-15 * sign)
    return replace(case, leaves=leaves)


def check_parity(case: Case, memory: Memory, oracle: Memory) -> list[str]:
    """Asserts that `memory` is `oracle` on this case, within 1e-10 on every result.

    Where the oracle itself moves by more than 3e-12 under `nudged`, 30 times that movement is
    allowed instead. Returns the results that needed it.
    """
    other = case.results(oracle)
    found = gaps(case.results(memory), other)
    wide = [name for name, gap in found.items() if not gap <= 1e-10]
    if wide:
        moved = gaps(nudged(case).results(oracle), other)
        for name in wide:
            allowed = 30 * moved[name] if moved[name] > 3e-12 else 1e-10
            assert found[name] <= allowed, (
                f"{name}: {found[name]:.2e} apart, {allowed:.2e} allowed; oracle moves by "
                f"{moved[name]:.2e}; {case.spec}, seed {case.seed}, positions {case.positions}"
            )
    return wide


def influence(case: Case, memory: Memory) -> float:
    """How far y moves, relatively, if the memory learns nothing."""
    still = {n: torch.zeros_like(x) if n.startswith("theta") else x for n, x in case.leaves.items()}
    with torch.no_grad():
        return spread(replace(case, leaves=still).run(memory)[0], case.run(memory)[0])
