"""Names and shapes of parameters from the config alone, beside the model itself."""

import pytest
import torch

from tests.model.helpers import CASES, config_of
from titans_pretrain.model.shapes import parameter_shapes
from titans_pretrain.model.titans import TitansLM

CHANGES = [
    {},
    {"kv_heads": 1},
    {"tied_embeddings": True},
    {"persistent_tokens": 0},
    {"memory": {"chunk": 2, "depth": 3, "residual_norm": False}, "segment": 8},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes_are_the_model_s(case: str, changes: dict) -> None:
    config = config_of(case, **changes)
    with torch.device("meta"):
        model = TitansLM(config, dtype=torch.float32)
    assert parameter_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_a_model_of_unknown_vocabulary_has_neither_embedding_nor_head() -> None:
    shapes = parameter_shapes(config_of("lmm").model_copy(update={"vocab_size": None}))
    assert not {"embedding.weight", "head.weight"} & shapes.keys()
    assert shapes["final_norm.weight"] == (config_of("lmm").width,)
