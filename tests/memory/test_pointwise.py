"""Derivatives by hand against autograd; coefficients against their recurrence."""

import pytest
import torch
import torch.nn.functional as F

from tests.memory.cases import spread
from titans_pretrain.memory.coefficients import coefficients, coefficients_adjoint, segment_products
from titans_pretrain.memory.pointwise import (
    activate,
    curvature,
    standardize,
    standardize_transpose,
    times_slope,
    transpose_curvature,
)

F64 = torch.float64
REFERENCE = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),  # exact, not the tanh form
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_activation_and_two_derivatives(kind: str) -> None:
    x = torch.linspace(-9, 9, 4001, dtype=F64, requires_grad=True)
    y = REFERENCE[kind](x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    up = torch.linspace(-2, 3, 4001, dtype=F64)
    assert spread(activate(x.detach(), kind), y.detach()) < 1e-15
    assert spread(times_slope(up, x.detach(), kind), up * first.detach()) < 1e-14
    assert spread(curvature(x.detach(), kind), second) < 1e-14


def test_layer_norm_its_transpose_and_the_transposes_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    x, u, w, extra = torch.randn(4, 6, 5, generator=g, dtype=F64)
    x.requires_grad_()
    out = F.layer_norm(x, (5,), eps=1e-5)
    (ju,) = torch.autograd.grad((out * u).sum(), x, create_graph=True)
    (dx,) = torch.autograd.grad((ju * w).sum(), x, retain_graph=True)
    (j_extra,) = torch.autograd.grad((out * extra).sum(), x)
    xhat, rstd = standardize(x.detach())
    mine = standardize_transpose(u, xhat, rstd)
    assert spread(xhat, out.detach()) < 1e-14
    assert spread(mine, ju.detach()) < 1e-13
    assert spread(transpose_curvature(w, u, mine, xhat, rstd, extra), dx + j_extra) < 1e-12


def test_products_of_gates() -> None:
    out = segment_products(torch.tensor([[2.0, 3.0, 0.0, 5.0]]))
    assert out.tolist() == [[[1, 0, 0, 0], [3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 5, 1]]]


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_coefficients_and_adjoint(exclusive: bool, full: bool) -> None:
    """Against the scan (11) of MATH.md, row by row, and autograd through it."""
    g = torch.Generator().manual_seed(1)
    c = 5
    gates = [torch.rand(2, 3, c, generator=g, dtype=F64).requires_grad_() for _ in range(3)]
    theta, alpha, eta = gates
    last = None if full else torch.tensor([4, 0, 2])
    one = torch.eye(c, dtype=F64)

    e = q = torch.zeros(2, 3, c, dtype=F64)
    b = h = torch.ones(2, 3, dtype=F64)
    s = torch.zeros(2, 3, dtype=F64)
    rows = []
    for t in range(c):
        e = eta[..., t, None] * e + one[t]
        q = (1 - alpha[..., t, None]) * q + e
        h = eta[..., t] * h
        b = (1 - alpha[..., t]) * b
        s = (1 - alpha[..., t]) * s + h
        rows.append((-theta * q, -theta * e, b, s, h))
    p, ps, b_all, c_all, h_all = (torch.stack(x, 2) for x in zip(*rows))
    at = torch.full((3,), c - 1) if last is None else last
    end = lambda x: x[:, torch.arange(3), at]  # noqa: E731
    zero = torch.zeros(2, 3, dtype=F64)
    expected = {
        "scores": p,
        "read": torch.stack([b_all, c_all], -1),
        "write": torch.stack([end(p), end(ps)], -1),
        "carry": torch.stack([end(b_all), end(c_all), zero, end(h_all)], -1).view(2, 3, 2, 2),
    }
    if exclusive:
        first = torch.zeros_like(p[:, :, :1])
        expected["scores"] = torch.cat([first, p[:, :, :-1]], 2)
        start = torch.tensor([1.0, 0.0], dtype=F64).expand(2, 3, 1, 2)
        expected["read"] = torch.cat([start, expected["read"][:, :, :-1]], 2)

    co = coefficients(*(x.detach() for x in gates), last, exclusive)
    for name, x in expected.items():
        assert spread(getattr(co, name), x.detach()) < 1e-14, name
    noise = {n: torch.randn(x.shape, generator=g, dtype=F64) for n, x in expected.items()}
    total = sum((noise[n] * x).sum() for n, x in expected.items())
    found = coefficients_adjoint(co, *(noise[n] for n in ("scores", "read", "write", "carry")))
    for mine, theirs in zip(found, torch.autograd.grad(total, gates)):
        assert spread(mine, theirs) < 1e-13
