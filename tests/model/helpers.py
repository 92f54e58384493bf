"""Small models whose memory matters, in float64, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_pretrain.config import ModelConfig
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, initialise

torch.set_num_threads(1)

VOCAB = 23

# One name, one combination of what can interact: heads, chunk and segment, memory tokens, depth.
CASES: dict[str, dict] = {
    "transformer": {"variant": "transformer", "heads": 2},
    "transformer-window": {
        "variant": "transformer",
        "heads": 1,
        "window": 5,
        "tied_embeddings": True,
    },
    "lmm": {"variant": "lmm", "heads": 2, "memory": {"chunk": 4}},
    "lmm-paper": {"variant": "lmm", "heads": 3, "memory": {"chunk": 3, "decay_to": "zero"}},
    "lmm-linear": {
        "variant": "lmm",
        "heads": 1,
        "memory": {"chunk": 4, "depth": 1, "residual_norm": False, "read": "exclusive"},
    },
    "mac": {"segment": 8, "heads": 2, "persistent_tokens": 3, "memory": {"chunk": 4}},
    "mac-pool2": {
        "segment": 6,
        "heads": 3,
        "persistent_tokens": 0,
        "tied_embeddings": True,
        "memory": {"chunk": 3, "retrieved": "pool2", "activation": "silu"},
    },
    "mac-learned": {
        "segment": 4,
        "heads": 1,
        "persistent_tokens": 2,
        "memory": {"chunk": 4, "retrieved": "learned", "learned_queries": 3, "depth": 3},
    },
    "mac-short": {
        "segment": 2,
        "heads": 2,
        "persistent_tokens": 1,
        "memory": {"chunk": 1, "depth": 1, "decay_to": "zero"},
    },
    "mac-exclusive": {
        "segment": 8,
        "heads": 2,
        "persistent_tokens": 1,
        "memory": {"chunk": 2, "read": "exclusive"},
    },
    "mac-blocks": {
        "segment": 8,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "persistent_tokens": 2,
        "memory": {"chunk": 4, "projections": "block_diagonal"},
    },
    "mac-blocks-learned": {
        "segment": 4,
        "heads": 2,
        "persistent_tokens": 2,
        "memory": {
            "chunk": 2,
            "projections": "block_diagonal",
            "retrieved": "learned",
            "learned_queries": 3,
        },
    },
    "transformer-grouped": {"variant": "transformer", "heads": 6, "kv_heads": 2, "window": 6},
    "mac-grouped": {
        "segment": 8,
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "persistent_tokens": 2,
        "memory": {"chunk": 4, "retrieved": "pool2"},
    },
    "mag-grouped": {
        "variant": "mag",
        "width": 16,
        "heads": 4,
        "kv_heads": 1,
        "persistent_tokens": 4,
        "memory": {"chunk": 4},
    },
    "mal-grouped": {
        "variant": "mal",
        "width": 16,
        "heads": 4,
        "kv_heads": 2,
        "persistent_tokens": 2,
        "window": 7,
        "memory": {"chunk": 4},
    },
    "mag": {"variant": "mag", "heads": 2, "persistent_tokens": 3, "memory": {"chunk": 4}},
    "mag-window": {
        "variant": "mag",
        "heads": 3,
        "persistent_tokens": 8,
        "window": 5,
        "memory": {"chunk": 4, "decay_to": "zero", "activation": "silu"},
    },
    "mag-bare": {
        "variant": "mag",
        "heads": 1,
        "persistent_tokens": 0,
        "window": 3,
        "memory": {"chunk": 2, "read": "exclusive", "depth": 1},
    },
    "mal": {"variant": "mal", "heads": 2, "persistent_tokens": 5, "memory": {"chunk": 4}},
    "mal-window": {
        "variant": "mal",
        "heads": 3,
        "persistent_tokens": 1,
        "window": 5,
        "tied_embeddings": True,
        "memory": {"chunk": 3, "decay_to": "zero", "read": "exclusive"},
    },
    "mal-bare": {
        "variant": "mal",
        "heads": 1,
        "persistent_tokens": 0,
        "window": 3,
        "memory": {"chunk": 2, "depth": 3},
    },
}


def config_of(case: str, **more: object) -> ModelConfig:
    fields = {"width": 12, "blocks": 2, "vocab_size": VOCAB, **CASES[case], **more}
    fields["memory"] = {"expansion": 2, **fields.get("memory", {})}
    return ModelConfig.model_validate(fields)


def hot_model(config: ModelConfig, seed: int = 0) -> TitansLM:
    """A model in float64 far from its calm start: the memory learns fast, forgets, and is heard."""
    model = TitansLM(config, dtype=torch.float64)
    initialise(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if name.endswith("gates.bias"):
                p.copy_(torch.tensor([1.5, -2.0, 0.5]).repeat(len(p) // 3) + 0.5 * noise)
            elif ".gates." in name or "_conv." in name:
                p.add_(0.5 * noise)
            elif name.endswith("inner_gain"):
                p.copy_(1 + 0.2 * noise)
            elif "norm" in name or "inner_" in name or name.endswith("persistent"):
                p.add_(0.2 * noise)
            elif ".initial." in name:
                last = name.endswith(str(config.memory.depth - 1))
                p.mul_(0.3 if last else 4)  # a small last layer: what is learned outweighs it
            elif name.endswith(("memory.out.weight", "attention.o.weight")):
                p.mul_(6)
            elif name.endswith("memory.v.weight"):
                p.mul_(8)
            elif "embedding" in name:
                p.mul_(3)
    return model


def inert(model: TitansLM) -> TitansLM:
    """The same model with a memory that never learns (theta = 0)."""
    copy = TitansLM(model.config, dtype=torch.float64)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in copy.named_parameters():
            if ".gates." in name:
                p.view(-1, 3, *p.shape[1:])[:, 0] = -1e3 if name.endswith("bias") else 0
    return copy


def tokens_like(positions: Tensor, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, positions.shape, generator=g)


def packed(rows: list[list[int]], align: int) -> Tensor:
    """Positions [B, T] of rows that hold documents of these lengths, each padded to `align`."""
    lines = []
    for lengths in rows:
        line: list[int] = []
        for n in lengths:
            line += [*range(n), *[-1] * (-n % align)]
        lines.append(line)
    width = max(map(len, lines))
    return torch.tensor([line + [-1] * (width - len(line)) for line in lines])


def labels_of(tokens: Tensor) -> Tensor:
    return (tokens * 7 + 3) % VOCAB


def losses_of(model: TitansLM, tokens: Tensor, positions: Tensor) -> Tensor:
    """The cross entropy of each real token."""
    logits, _ = model(tokens, positions, carry=False)
    return token_loss(logits, labels_of(tokens))[positions >= 0]


def loss_of(model: TitansLM, tokens: Tensor, positions: Tensor) -> Tensor:
    return losses_of(model, tokens, positions).sum()


def gradients(model: TitansLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def worst_gradient(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any named gradient relative to that gradient's largest entry."""
    assert a.keys() == b.keys()
    off = {n: ((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in a}
    worst = max(off, key=off.__getitem__)
    return off[worst], worst
