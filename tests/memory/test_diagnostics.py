"""The published limits of the inner learning rate, and that they are limits."""

import pytest
import torch

from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.diagnostics import stability_radius, write_strength
from titans_pretrain.memory.rules import MemorySpec

F64 = torch.float64


def radius(theta: float, eta: float, chunk: int) -> float:
    x = torch.tensor([theta, 0.0, eta], dtype=F64)
    return float(stability_radius(*x, chunk))


@pytest.mark.parametrize(
    "chunk, eta, limit",
    [
        (16, 0.0, 0.0625),
        (16, 0.9, 0.00933),
        (16, 0.99, 0.00069),
        (64, 0.0, 0.0156),
        (64, 0.9, 0.00217),
    ],
)
def test_published_limits(chunk: int, eta: float, limit: float) -> None:
    low, high = 0.0, 1.0
    for _ in range(60):  # the rate at which the radius crosses 1
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle, eta, chunk) < 1 else (low, middle)
    assert low == pytest.approx(limit, abs=0.5 * 10 ** -len(str(limit).split(".")[1]))


@pytest.mark.parametrize("chunk", [1, 4, 16, 64, 512])
def test_the_parametrised_rate_is_stable(chunk: int) -> None:
    for eta in (0.0, 0.3, 0.6, 0.9, 0.99, 0.9999):
        assert radius((1 - eta) / chunk, eta, chunk) < 1 + 1e-12


def test_write_strength() -> None:
    x = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    assert float(write_strength(*x, 16)) == 16
    x[2] = 0.9
    assert float(write_strength(*x, 16)) == pytest.approx(86.7, abs=0.05)
    assert float(write_strength(*x, 64)) == pytest.approx(550, abs=1)


def test_gates_of_each_token() -> None:
    """Against eigenvalues of the map found by running a chunk token by token."""
    g = torch.Generator().manual_seed(0)
    theta, alpha, eta = torch.rand(3, 5, 8, generator=g, dtype=F64)
    m = torch.zeros(5, 2, 2, dtype=F64)
    for n in range(5):
        for column in range(2):
            w, s = float(column == 0), float(column == 1)
            error = w
            for t in range(8):
                s = float(eta[n, t]) * s - float(theta[n, t]) * 2 * error
                w = (1 - float(alpha[n, t])) * w + s
            m[n, 0, column], m[n, 1, column] = w, s
    expected = torch.linalg.eigvals(m).abs().amax(-1)
    assert torch.allclose(stability_radius(theta, alpha, eta), expected, rtol=1e-12)


@pytest.mark.parametrize("theta, grows", [(0.0090, False), (0.0100, True)])
def test_the_memory_itself_crosses_there(theta: float, grows: bool) -> None:
    """C = 16, eta = .9, identical unit keys: the error after 60 chunks falls, or grows."""
    tokens = 60 * 16
    key = torch.zeros(1, 1, tokens, 2, dtype=F64)
    key[..., 0] = 1
    gate = torch.ones(1, 1, tokens, 1, dtype=F64)
    w = (torch.zeros(1, 2, 2, dtype=F64),)
    spec = MemorySpec(depth=1, residual_norm=False, chunk=16)
    y, _ = chunked_memory(
        key, key, torch.ones_like(key), theta * gate, 0 * gate, 0.9 * gate, w, None, spec
    )
    errors = (y - 1).abs().amax(-1).flatten()
    assert (float(errors[-16:].max()) > 1) == grows
