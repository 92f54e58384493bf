"""What memories did on the ranks that divide a model or its rows, put together on rank 0.

- Tensor ranks: their heads beside one another, in the order of the ranks, as the plan cuts them.
- Context ranks: tokens together; of a row that goes on elsewhere the state that its last token
  left. The result is that of whole rows (memory/tally.py).
- Pipeline stages, interleaved or not: each has its blocks; they come in the model's order.
- Data-parallel ranks: those of rank 0's place alone look.
"""

from __future__ import annotations

from collections import defaultdict

from titans_pretrain.memory.observe import Observation
from titans_pretrain.memory.tally import Parts, Tally
from titans_pretrain.parallel.group import Group
from titans_pretrain.parallel.layout import Place


def joined(group: Group, seen: Observation) -> Observation | None:
    """Collective over the group, once a recording. On rank 0 what all have seen, None if nothing;
    None on the others."""
    told = group.gather(seen.parts)
    parts = join([(place, part) for place, part in told])
    return Observation(parts, seen.seconds) if parts else None


def join(told: list[tuple[Place, dict[str, Parts]]]) -> dict[str, Parts]:
    """The parts of each layer by tensor and context rank, layers in the order of their blocks."""
    found: dict[str, dict[int, dict[int, Tally]]] = defaultdict(lambda: defaultdict(dict))
    for place, layers in told:
        for name, [[tally]] in layers.items():
            found[name][place.tensor][place.context] = tally
    return {
        name: [
            [by_context[context] for context in sorted(by_context)]
            for _, by_context in sorted(found[name].items())
        ]
        for name in sorted(found, key=_order)
    }


def _order(name: str) -> list[tuple[int, str]]:
    """blocks.10.mixer behind blocks.9.mixer."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
