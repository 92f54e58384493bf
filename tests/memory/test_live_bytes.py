"""Memory use: linear in the tokens, a fraction of what weights per token would take."""

import torch

from tests.live_bytes import LiveBytes
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.rules import MemorySpec


def test_counting() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1
        z = y.view(10, 100)  # no storage of its own
        assert live.now == 4000
        w = y * 2
        assert live.now == 8000
        del y, w
        assert live.now == 4000  # z keeps it
        x.add_(1)  # made before: does not count
        del z
    assert live.now == 0 and live.peak == 8000


def peak(tokens: int, documents: int = 1) -> tuple[int, int, int]:
    """(peak, kept between forward and backward, bytes of one state) of one row."""
    heads, width, spec = 2, 16, MemorySpec()
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.rand(shape, generator=g) * scale).requires_grad_()

    q, k, v = (leaf(1, heads, tokens, width) for _ in range(3))
    theta, alpha, eta = (leaf(1, heads, tokens, 2, scale=s) for s in (0.01, 0.01, 0.9))
    w_init = tuple(leaf(heads, a, o) for a, o in spec.shapes(width))
    norm = (leaf(heads, width), leaf(heads, width))
    positions = torch.arange(tokens // documents).repeat(documents)[None]
    with LiveBytes() as live:
        y, _ = chunked_memory(q, k, v, theta, alpha, eta, w_init, norm, spec, positions=positions)
        kept = live.now
        y.sum().backward()
    return live.peak, kept, sum(2 * 4 * w.numel() for w in w_init)


def test_peak_is_linear_in_the_tokens() -> None:
    small, medium, large = (peak(n) for n in (1024, 4096, 16384))
    for (a, *_), (b, *_) in ((small, medium), (medium, large)):
        assert b < 4.2 * a
    # Weights and momentum of every token would be a state a token.
    assert large[0] < 0.05 * 16384 * large[2]
    # Kept for the backward: boundary states every ~sqrt(T / C) chunks, not one a chunk.
    assert large[1] < 0.35 * (16384 // 16) * large[2]


def test_packed_documents_take_more_by_the_root_of_their_number() -> None:
    """D documents side by side of T / D tokens keep ~D sqrt(T / (C D)) states."""
    long, packed = peak(4096), peak(4096, documents=8)
    assert packed[0] < 8**0.5 * long[0]
