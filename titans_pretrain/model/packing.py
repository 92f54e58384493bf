"""What attention may see, worked out once a forward from the tokens' positions.

positions [B, T] holds each token's position in its document and -1 at pads. A row whose first
position is above 0 continues the document that the carried state belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_pretrain.model.blocks import Rotation, rotation


@dataclass(frozen=True)
class AttentionPlan:
    """Masked attention over whole rows. S = carried keys + T."""

    rotation: Rotation
    mask: Tensor | None  # [B, 1, T, S]; None: plain causal attention says the same
    positions: Tensor  # [B, S - keep]: of the keys to carry on
    keep: int  # the first key to carry on


def attention_plan(
    positions: Tensor,
    past: Tensor | None,
    *,
    window: int | None,
    head_width: int,
    rope_base: float,
    dtype: torch.dtype,
) -> AttentionPlan:
    """A query sees the keys of its document at distance 0 .. window - 1.

    positions [B, T]; past [B, P]: positions of the carried keys, or None.
    """
    T = positions.shape[1]
    everything = positions if past is None else torch.cat((past.to(positions), positions), dim=1)
    S = everything.shape[1]
    real, start = everything >= 0, everything == 0
    keep = _first_to_keep(everything, window)
    mask = None
    one_document = not start[:, 1:].any() and not (real[:, 1:] & ~real[:, :-1]).any()
    # Pads at a row's end need no mask: no real token comes after them.
    if S != T or not one_document or (window is not None and window < T):
        document = start.cumsum(1)
        column = torch.arange(S, device=positions.device)
        query = column[S - T :, None]
        mask = (document[:, S - T :, None] == document[:, None, :]) & real[:, None, :]
        mask &= column <= query
        if window is not None:
            mask &= everything[:, S - T :, None] - everything[:, None, :] < window
        mask |= column == query  # a pad sees itself: a softmax over nothing is NaN
        mask = mask[:, None]
    return AttentionPlan(
        rotation=rotation(positions, head_width, rope_base, dtype),
        mask=mask,
        positions=everything[:, keep:],
        keep=keep,
    )


def _first_to_keep(positions: Tensor, window: int | None) -> int:
    """The first of columns [B, S] that a token after them could see: in any row's open document."""
    B, S = positions.shape
    column = torch.arange(S, device=positions.device).expand(B, S)
    real = positions >= 0
    first = column.where(positions == 0, 0).amax(1)
    if window is not None:
        last = column.where(real, 0).amax(1)
        first = torch.maximum(first, last - (window - 2))
    first = first.where(real.any(1), S)
    return int(first.amin())
