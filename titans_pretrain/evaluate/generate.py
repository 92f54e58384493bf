"""Text from a model: prompts read at once, then token after token with the streaming state.

The model's state is exact (memory, convolutions, windows of attention), so what is generated is
what reading the whole text anew for every token would give, at a cost that does not grow with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
    vocabulary: int | None = None,
    seconds: float = float("inf"),
) -> list[list[int]]:
    """What follows each of `prompts` (token ids, at least one each): at most `tokens` ids.

    Args:
        model: TitansLM, or what is called like it.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that together have this probability.
        generator: of random numbers, on the CPU; required where temperature is above 0.
        end: the id at which a text ends; it is not part of what is returned.
        vocabulary: only ids below it (a model may have rows that its tokenizer does not).
        seconds: stop early once so much time has passed.
    Leaves the model in the mode it was in, and draws nothing from global random numbers.
    """
    if temperature > 0 and generator is None:
        raise ValueError("temperature above 0 draws from a generator, and none is given")
    began, training = time.monotonic(), model.training
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts])
    column = torch.arange(int(lengths.max()))
    positions = column.where(column < lengths[:, None], -1)  # [B, T], on the CPU
    ids = torch.zeros_like(positions)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    told: list[list[int]] = [[] for _ in prompts]
    model.eval()
    try:
        logits, state = model(ids.to(device), positions)
        last = logits.gather(
            1, (lengths - 1).to(device)[:, None, None].expand(-1, 1, logits.shape[2])
        )
        open_rows = torch.ones(len(prompts), dtype=torch.bool)
        for count in range(tokens):
            scores = last[:, 0, :vocabulary].float().cpu()
            chosen = choose(scores, temperature, top_p, generator)  # [B]
            if end is not None:
                open_rows &= chosen != end
            for row in open_rows.nonzero()[:, 0].tolist():
                told[row].append(int(chosen[row]))
            over = time.monotonic() - began > seconds
            if count == tokens - 1 or over or not open_rows.any():
                break
            # A text that has ended pauses: position -1.
            positions = (lengths + count).where(open_rows, -1)[:, None]
            last, state = model(chosen[:, None].to(device), positions, state)
    finally:
        model.train(training)
    return told


def choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One id [B] for each row of logits [B, V] (float32, CPU)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # A token stays if those before it have not reached top_p: the likeliest always does.
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.where(before < top_p, 0)
    return order.gather(1, kept.multinomial(1, generator=generator))[:, 0]
