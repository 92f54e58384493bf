"""`titans-pretrain bench memory`: the chunked memory against the oracle and weights per token.

All three run the same problem in one process, by turns, and the figures are ratios of their
medians: what a machine does to all of them cancels. Peaks are bytes of live tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState, Norm, memory_forward

Memory = Callable[..., tuple[Tensor, MemoryState]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one table a size; returns 0, or 1 where two implementations disagree."""
    parser = argparse.ArgumentParser(
        prog="titans-pretrain bench memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one small size, seconds")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        if args.quick:
            return _compare(rows=1, heads=2, tokens=128, width=16, chunk=16, repeats=1)
        bad = _compare(rows=2, heads=4, tokens=256, width=32, chunk=16, repeats=args.repeats)
        return bad | _compare(rows=1, heads=2, tokens=512, width=64, chunk=64, repeats=args.repeats)
    finally:
        torch.set_num_threads(threads)


def per_token_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    w_init: tuple[Tensor, ...],
    norm: Norm | None,
    spec: MemorySpec,
) -> tuple[Tensor, MemoryState]:
    """The memory as most code writes it: chunk by chunk, with the weights of every token in memory.

    Whole rows from the initial state, inclusive reads; gradients of gradients by autograd. Here
    for comparison only.
    """
    n, _, t, _ = q.shape
    start = tuple(w.expand(n, *w.shape) for w in w_init)
    target = start if spec.decay_to == "init" else tuple(torch.zeros_like(w) for w in start)
    weights, momentum, anchor = start, tuple(torch.zeros_like(w) for w in start), start
    ys, outer = [], torch.is_grad_enabled()
    for at in range(0, t, spec.chunk):
        here = slice(at, min(at + spec.chunk, t))
        size, anchor = here.stop - here.start, weights
        # A copy of the anchor for every token yields every token's own gradient.
        copies = [a[:, :, None].expand(-1, -1, size, -1, -1) for a in anchor]
        with torch.enable_grad():
            copies = copies if outer else [c.detach().requires_grad_() for c in copies]
            keys = k[:, :, here].unsqueeze(3)
            out = _each_token(keys, copies, norm, spec)
            miss = (out - v[:, :, here].unsqueeze(3)).square().sum()
            grads = torch.autograd.grad(miss, copies, create_graph=outer)
        every = []
        for layer in range(spec.depth):
            w, s, path = weights[layer], momentum[layer], []
            for i in range(size):
                rate, forget, keep = (
                    g[:, :, at + i, layer, None, None] for g in (theta, alpha, eta)
                )
                s = keep * s - rate * grads[layer][:, :, i]
                w = target[layer] + (1 - forget) * (w - target[layer]) + s
                path.append((w, s))
            every.append(path)
        weights = tuple(path[-1][0] for path in every)
        momentum = tuple(path[-1][1] for path in every)
        reads = [torch.stack([w for w, _ in path], 2) for path in every]
        ys.append(_each_token(q[:, :, here].unsqueeze(3), reads, norm, spec).squeeze(3))
    offset = target if spec.decay_to == "init" else tuple(torch.zeros_like(w) for w in start)
    inside = t % spec.chunk != 0
    return torch.cat(ys, 2), MemoryState(
        tuple(w - o for w, o in zip(weights, offset)),
        momentum,
        tuple(a - o for a, o in zip(anchor, offset)) if inside else None,
    )


def _each_token(x: Tensor, weights: list[Tensor], norm: Norm | None, spec: MemorySpec) -> Tensor:
    """M with weights [N, H, T, a, o] of its own for each x [N, H, T, 1, d]."""
    if norm is not None:
        norm = (norm[0][:, None], norm[1][:, None])  # [H, 1, d]: heads, then tokens
    return memory_forward(x, weights, norm, spec)


def _compare(*, rows: int, heads: int, tokens: int, width: int, chunk: int, repeats: int) -> int:
    spec = MemorySpec(chunk=chunk)
    leaves = _problem(rows, heads, tokens, width, spec)
    memories: dict[str, Memory] = {
        "chunked": chunked_memory,
        "weights per token": per_token_memory,
        "oracle (token by token)": oracle_memory,
    }
    times: dict[tuple[str, bool], list[float]] = {}
    results: dict[str, list[Tensor]] = {}
    peaks: dict[str, int] = {}
    for name, memory in memories.items():  # warm up, compare and weigh
        with LiveBytes() as live:
            results[name] = _run(memory, leaves, spec, backward=True)
        peaks[name] = live.peak
    for _ in range(repeats):
        for name, memory in memories.items():
            for backward in (False, True):
                began = time.perf_counter()
                _run(memory, leaves, spec, backward=backward)
                times.setdefault((name, backward), []).append(time.perf_counter() - began)

    count = rows * tokens
    print(
        f"rows {rows}, heads {heads}, tokens {tokens}, head width {width}, hidden "
        f"{spec.expansion * width}, chunk {chunk}, float32, {torch.get_num_threads()} thread(s)"
    )
    print(f"{'':24}{'forward':>22}{'forward + backward':>24}{'peak':>18}")
    wrong = 0
    for name in memories:
        line = f"{name:24}"
        for backward in (False, True):
            took = statistics.median(times[name, backward])
            slower = took / statistics.median(times["chunked", backward])
            line += f"{count / took:12,.0f} tok/s x{slower:<6.2f}"
        line += f"{peaks[name] / 2**20:9.1f} MiB x{peaks[name] / peaks['chunked']:.2f}"
        print(line)
        worst = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(results["chunked"], results[name])
        )
        if worst > 1e-3:
            print(f"  differs from the chunked memory by {worst:.1e}, relative; 1e-3 is allowed")
            wrong = 1
    return wrong


def _problem(
    rows: int, heads: int, tokens: int, width: int, spec: MemorySpec
) -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    qkv = [torch.nn.functional.normalize(normal(rows, heads, tokens, width), dim=-1)] * 2
    qkv = [qkv[0].clone(), qkv[1].clone(), normal(rows, heads, tokens, width)]
    token = (rows, heads, tokens, spec.depth)
    eta = 0.6 + 0.1 * torch.rand(token, generator=g)
    theta = ((1 - eta) / spec.chunk).clamp(max=1 / 64) / 4
    alpha = torch.full(token, 0.003)
    w_init = [normal(heads, a, o) * (2 / (a + o)) ** 0.5 for a, o in spec.shapes(width)]
    leaves = {
        "tokens": [*qkv, theta, alpha, eta],
        "w_init": w_init,
        "norm": [torch.ones(heads, width), torch.zeros(heads, width)],
    }
    for group in leaves.values():
        for x in group:
            x.requires_grad_()
    return leaves


def _run(
    memory: Memory, leaves: dict[str, list[Tensor]], spec: MemorySpec, *, backward: bool
) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        norm = (leaves["norm"][0], leaves["norm"][1])
        y, _ = memory(*leaves["tokens"], tuple(leaves["w_init"]), norm, spec)
        if not backward:
            return [y]
        every = [x for group in leaves.values() for x in group]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), every)]
