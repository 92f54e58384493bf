"""Three tokens worked by hand: one feature, one layer, M(x) = x w, chunks of two tokens.

    t    q    k    v      theta  alpha  eta
    1    2    1    3      1/4    1/2    1/2
    2   -4   -1    1      1/2    1/4    1/2
    3    1    1    5/8    1/4    0      1             w_init = 1

The inner gradient of (k a - v)^2 is 2 k (k a - v), at the anchor a; a = 1 for tokens 1 and 2.

Decay to zero, W = (1 - alpha) W + S:
    1:  G = 2 (1 - 3) = -4          S = 0 + 1/4 * 4 = 1           W = 1/2 * 1 + 1       =  3/2
    2:  G = -2 (-1 - 1) = 4         S = 1/2 * 1 - 1/2 * 4 = -3/2  W = 3/4 * 3/2 - 3/2   = -3/8
    3:  a = -3/8: G = 2 (-1) = -2   S = -3/2 + 1/4 * 2 = -1       W = -3/8 - 1          = -11/8

Decay to w_init, W = 1 + (1 - alpha) (W - 1) + S:
    1:  as above, S = 1             W = 1 + 1/2 * 0 + 1 = 2
    2:  as above, S = -3/2          W = 1 + 3/4 * 1 - 3/2 = 1/4
    3:  a = 1/4: G = 2 (1/4 - 5/8) = -3/4
        S = -3/2 + 1/4 * 3/4 = -21/16    W = 1 + (1/4 - 1) - 21/16 = -17/16

Decay to zero, the derivative of y_3 = W_3 by v_1 (G_1 moves by -2):
    S_1: 1/2;  W_1: 1/2;  S_2: 1/4;  W_2: 3/4 * 1/2 + 1/4 = 5/8;  G_3: 2 * 5/8 = 5/4;
    S_3: 1/4 - 1/4 * 5/4 = -1/16;  W_3: 5/8 - 1/16 = 9/16
"""

import pytest
import torch
from torch import Tensor

from tests.memory.cases import Memory
from titans_pretrain.memory.chunked import chunked_memory
from titans_pretrain.memory.oracle import oracle_memory
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.memory.state import MemoryState


def run(memory: Memory, decay_to: str, read: str) -> tuple[Tensor, MemoryState, Tensor]:
    def sequence(*x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float64).view(1, 1, 3, 1)

    spec = MemorySpec(depth=1, residual_norm=False, chunk=2, decay_to=decay_to, read=read)
    v = sequence(3, 1, 5 / 8).requires_grad_()
    y, state = memory(
        sequence(2, -4, 1),
        sequence(1, -1, 1),
        v,
        sequence(1 / 4, 1 / 2, 1 / 4),
        sequence(1 / 2, 1 / 4, 0),
        sequence(1 / 2, 1 / 2, 1),
        (torch.ones(1, 1, 1, dtype=torch.float64),),
        None,
        spec,
    )
    return y.flatten(), state, v


@pytest.mark.parametrize("memory", [oracle_memory, chunked_memory])
@pytest.mark.parametrize(
    "decay_to, read, expected",
    [
        ("zero", "inclusive", [2 * 3 / 2, -4 * -3 / 8, -11 / 8]),
        ("init", "inclusive", [2 * 2, -4 * 1 / 4, -17 / 16]),
        ("zero", "exclusive", [2 * 1, -4 * 3 / 2, -3 / 8]),
        ("init", "exclusive", [2 * 1, -4 * 2, 1 / 4]),
    ],
)
def test_reads(memory: Memory, decay_to: str, read: str, expected: list[float]) -> None:
    y, _, _ = run(memory, decay_to, read)
    assert y.tolist() == expected  # every number is a short binary fraction: exact


@pytest.mark.parametrize("memory", [oracle_memory, chunked_memory])
@pytest.mark.parametrize(
    "decay_to, weight, momentum, anchor",
    [("zero", -11 / 8, -1, -3 / 8), ("init", -17 / 16 - 1, -21 / 16, 1 / 4 - 1)],
)
def test_final_state(
    memory: Memory, decay_to: str, weight: float, momentum: float, anchor: float
) -> None:
    _, state, _ = run(memory, decay_to, "inclusive")
    assert state.anchor is not None  # token 3 opened a chunk and left it unfinished
    assert state.weights[0].item() == weight
    assert state.momentum[0].item() == momentum
    assert state.anchor[0].item() == anchor


@pytest.mark.parametrize("memory", [oracle_memory, chunked_memory])
def test_gradient(memory: Memory) -> None:
    y, _, v = run(memory, "zero", "inclusive")
    (d,) = torch.autograd.grad(y[2], v)
    assert d.flatten()[0].item() == 9 / 16
    assert d.flatten()[2].item() == 1 / 2  # 2 theta_3
