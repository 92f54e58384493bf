"""The attention-only model against dense attention written out."""

import torch

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.packing import attention_plan
from titans_pretrain.model.titans import TitansLM, initialise

torch.set_num_threads(1)


def test_one_block_equals_attention_written_out() -> None:
    config = ModelConfig(variant="transformer", blocks=1, width=8, heads=2, vocab_size=11)
    model = TitansLM(config, dtype=torch.float64)
    initialise(model, 3)
    tokens = torch.randint(0, 11, (1, 6), generator=torch.Generator().manual_seed(0))
    p = dict(model.named_parameters())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * p[name]

    def turn(x: torch.Tensor, t: int) -> torch.Tensor:
        """Each pair (i, i + d/2) as a complex number, turned by t * base^(-2i/d)."""
        z = torch.complex(x[:2], x[2:])
        angle = t * 10_000.0 ** -(torch.arange(2, dtype=torch.float64) * 2 / 4)
        z = z * torch.polar(torch.ones(2, dtype=torch.float64), angle)
        return torch.cat((z.real, z.imag))

    x = p["embedding.weight"][tokens[0]]
    h = norm(x, "blocks.0.mixer_norm.weight")
    q, k, v = (h @ p[f"blocks.0.mixer.attention.{n}.weight"].T for n in "qkv")
    mixed = torch.zeros_like(x)
    for head in (slice(0, 4), slice(4, 8)):
        for t in range(6):
            scores = torch.stack(
                [turn(q[t, head], t) @ turn(k[j, head], j) / 4**0.5 for j in range(t + 1)]
            )
            mixed[t, head] = torch.softmax(scores, 0) @ v[: t + 1, head]
    x = x + mixed @ p["blocks.0.mixer.attention.o.weight"].T
    h = norm(x, "blocks.0.mlp_norm.weight")
    gate, up, down = (p[f"blocks.0.mlp.{n}.weight"].T for n in ("gate", "up", "down"))
    x = x + (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down
    expected = norm(x, "final_norm.weight") @ p["head.weight"].T
    actual, _ = model(tokens, torch.arange(6)[None])
    assert (actual[0] - expected).abs().max() < 1e-13


def test_every_query_sees_a_key() -> None:
    """Pads too: a softmax over nothing is NaN on some devices."""
    turn = {"head_width": 4, "rope_base": 10.0, "dtype": torch.float64}
    cpu = torch.device("cpu")
    leading = attention_plan(torch.tensor([[-1, 0, 1]]), None, window=None, device=cpu, **turn)
    assert (leading.mask[0, 0] == 0).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    for window in (None, 2):
        positions = torch.tensor([[-1, 3, 4, -1, 0, 1, -1], [0, 1, 2, 3, -1, -1, -1]])
        plan = attention_plan(
            positions,
            torch.tensor([[0, 1, 2], [0, 1, -1]]),
            window=window,
            device=cpu,
            **turn,
        )
        assert (plan.mask == 0).any(-1).all()
        seen = (plan.mask[0, 0] == 0).int().tolist()
        assert seen[1] == ([1, 1, 1, 0, 1] if window is None else [0, 0, 1, 0, 1]) + [0] * 5
        assert seen[5] == [0] * 7 + [1, 1, 0]
