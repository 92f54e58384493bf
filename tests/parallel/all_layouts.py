"""`make parity`: every layout and variant against one plain process, in float64, as a table.

    python -m tests.parallel.all_layouts [--ranks N] [--least N] [--variants mac,lmm] [--begin K]

Layouts of more ranks than there are cores run as well, only slower.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.parallel.parity import (
    CALMER,
    TOLERANCE,
    compare,
    differences,
    parity_config,
    plain,
    values_of,
    worst,
)
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import plan_layout

CHAOS = 100  # a layout rounds otherwise than a process whose weights moved: so far apart at most
TIED = "-tied"  # behind a variant whose head is the embedding
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer", "lmm" + TIED)


def layouts(most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """All degrees on up to `most` ranks, with every order: (ranks, parallel). One or two
    data-parallel ranks; four where nothing else is divided, or one thing by two."""
    for tensor, pipeline, interleave, context, data in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2, 4)
    ):
        others = tensor * pipeline * context
        ranks = others * data
        if ranks > most or (data == 4 and others > 2):
            continue
        orders = ("FB", "FFBB", "skewed") if context > 1 else ("FB",)
        for sequence, segments, order in itertools.product((False, True), (1, 2), orders):
            if not (sequence and tensor == 1):
                yield (
                    ranks,
                    {
                        "tensor": tensor,
                        "sequence": sequence,
                        "pipeline": pipeline,
                        "interleave": interleave,
                        "context": context,
                        "segments": segments,
                        "order": order,
                    },
                )


def rounding(config: RunConfig, name: str, seeds: int = 3) -> float:
    """How far the gradient of `name` (or the loss) moves in one plain process whose weights are off
    by half a unit in the last place: a case can be so ill-conditioned that no layout agrees."""
    whole = values_of(config)
    first = plain(config, whole)
    found = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        moved = {
            n: w * (1 + 1e-16 * torch.randn(w.shape, generator=g, dtype=w.dtype))
            for n, w in whole.items()
        }
        found.append(differences(first, plain(config, moved))[name])
    return max(found)


def settled(config: RunConfig, ranks: int) -> tuple[float, str]:
    """How far a layout is from the plain process, and that in words. Sixteen blocks whose memories
    each make much of the last one's rounding say nothing: where one rounding of the weights takes
    up a tenth of the tolerance, the layout has to hold it with calmer ones, and with the
    others be no further off than rounding explains."""
    off, name = worst(compare(config, ranks, timeout=1800))
    if off <= TOLERANCE:
        return off, f"{off:.0e}"
    alone = rounding(config, name)
    if alone <= TOLERANCE / 10 or not off <= CHAOS * alone:
        return off, f"**{off:.0e}** {name} (rounding alone: {alone:.0e})"
    calmer, name = worst(compare(config, ranks, timeout=1800, heat=CALMER))
    told = f"{calmer:.0e}" if calmer <= TOLERANCE else f"**{calmer:.0e}** {name}"
    return calmer, f"{told} (calmer; else {off:.0e}, rounding alone {alone:.0e})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="at most; default 8")
    parser.add_argument("--least", type=int, default=1, metavar="N", help="ranks; default 1")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="A,B")
    parser.add_argument("--begin", type=int, default=1, metavar="K", help="with the K-th layout")
    args = parser.parse_args()
    wanted = args.variants.split(",")
    cases = []
    for ranks, parallel in layouts(args.ranks):
        if ranks < args.least:
            continue
        try:
            cases.append((plan_layout(parity_config("mac", parallel), ranks), ranks, parallel))
        except ConfigError:
            continue  # not a legal one
    print(f"| layout | ranks | {' | '.join(wanted)} |\n|---|---|{'---|' * len(wanted)}")
    began, bad = time.monotonic(), 0
    cases = cases[args.begin - 1 :]
    for done, (layout, ranks, parallel) in enumerate(cases, 1):
        cells = []
        for variant in wanted:
            tied = {"model__tied_embeddings": variant.endswith(TIED)}
            config = parity_config(variant.removesuffix(TIED), parallel, **tied)
            off, told = settled(config, ranks)
            bad += not off <= TOLERANCE
            cells.append(told)
        left = (time.monotonic() - began) / done * (len(cases) - done)
        name = layout.describe().replace(", ZeRO-1", "")
        name += f", {parallel['order']}" if parallel["order"] != "FB" else ""
        print(f"| {name} | {ranks} | {' | '.join(cells)} |", flush=True)
        print(f"{done}/{len(cases)}, {left / 60:.0f} minutes to go", file=sys.stderr, flush=True)
    cases_run = len(cases) * len(wanted)
    print(f"\n{len(cases)} layouts, {cases_run} cases, {bad} beyond {TOLERANCE:.0e}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
