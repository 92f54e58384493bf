"""`make parity`: every layout and variant against one plain process, in float64, as a table.

    python -m tests.parallel.all_layouts [--ranks N] [--variants mac,lmm] [--begin K]

Layouts of more ranks than there are cores run as well, only slower.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.parallel.parity import TOLERANCE, compare, parity_config, worst
from titans_pretrain.errors import ConfigError
from titans_pretrain.parallel.layout import plan_layout

VARIANTS = ("mac", "mag", "mal", "lmm", "transformer")


def layouts(most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """All legal degrees on up to `most` ranks: (ranks, parallel), one or two data-parallel."""
    for tensor, pipeline, interleave, context, data in itertools.product(
        (1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4), (1, 2)
    ):
        ranks = tensor * pipeline * context * data
        for sequence, segments in itertools.product((False, True), (1, 2)):
            if ranks <= most and not (sequence and tensor == 1):
                yield (
                    ranks,
                    {
                        "tensor": tensor,
                        "sequence": sequence,
                        "pipeline": pipeline,
                        "interleave": interleave,
                        "context": context,
                        "segments": segments,
                    },
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="at most; default 8")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="A,B")
    parser.add_argument("--begin", type=int, default=1, metavar="K", help="with the K-th layout")
    args = parser.parse_args()
    wanted = args.variants.split(",")
    cases = []
    for ranks, parallel in layouts(args.ranks):
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
            off, name = worst(compare(parity_config(variant, parallel), ranks))
            good = off <= TOLERANCE
            bad += not good
            cells.append(f"{off:.0e}" if good else f"**{off:.0e}** {name}")
        left = (time.monotonic() - began) / done * (len(cases) - done)
        name = layout.describe().replace(", ZeRO-1", "")
        print(f"| {name} | {ranks} | {' | '.join(cells)} |", flush=True)
        print(f"{done}/{len(cases)}, {left / 60:.0f} minutes to go", file=sys.stderr, flush=True)
    print(f"\n{len(cases)} layouts, {len(cases) * len(wanted)} cases, {bad} beyond {TOLERANCE:.0e}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
