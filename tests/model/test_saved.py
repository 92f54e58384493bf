"""What a forward keeps for its backward: the formula against what autograd keeps."""

import pytest
import torch

from tests.model.helpers import CASES, config_of, tokens_like
from tests.saved import Saved
from titans_pretrain.memory.rules import MemorySpec
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.saved import saved_bytes
from titans_pretrain.model.titans import TitansLM, initialise

ROWS, LENGTH = 2, 72  # whole segments and chunks in every case
# Wide enough that what a call makes whatever its tokens (plans, statistics) is little.
WIDE = {"width": 96, "mlp_width": 80}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bytes_kept_are_those_of_the_formula(case: str, dtype: torch.dtype) -> None:
    config = config_of(case, **WIDE)
    model = TitansLM(config, dtype=dtype)
    initialise(model, 0)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    tokens = tokens_like(positions)
    with Saved(model.parameters()) as kept:
        logits, _ = model(tokens, positions, carry=False)
        token_loss(logits, tokens).sum()
    expected = saved_bytes(config, ROWS, LENGTH, dtype.itemsize)
    assert sum(expected.values()) == pytest.approx(kept.bytes(), rel=0.05)
    blocks = config.memory.projections == "block_diagonal"
    if config.variant != "transformer" and dtype != torch.bfloat16 and not blocks:
        # By their shapes: weights alone, and weights and momentum joined. bf16 keeps wide copies of
        # parameters of the same shapes; the blocks of projections have them, too.
        spec = MemorySpec(config.memory.depth, config.memory.expansion)
        shapes = [s for a, o in spec.shapes(config.head_width) for s in ((a, o), (2 * a, o))]
        assert kept.bytes(shapes) == pytest.approx(expected["memory states"])
