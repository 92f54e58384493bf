"""What a run goes on without: members of shards that stay missing, cut or damaged.

Only training rows are replaced; validation always stops at bad data, since its figure would not
be comparable with the others.

A row that touches a bad member is replaced by another row of its source, drawn by a key from the
sample number until one is readable. Whether a member is bad is found by looking at the whole of
it, so it does not depend on what was read before, by whom, or how often the run was started:
every layout replaces the same rows by the same rows. The list in the stream's state says what the
samples so far have met; a resumed run takes what it lists for bad without looking.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.order import Order
from titans_pretrain.data.shards import BlockReader, Fault
from titans_pretrain.errors import DataError

log = logging.getLogger("titans_pretrain.data.quarantine")

DRAWS = 1000

# {"source", "split", "shard" (file), "member" (in the split's table; None: the whole shard),
#  "sample" (the first that met it), "why"}
Entry = dict[str, Any]


class Substitutes:
    """Readable rows in place of bad ones. Args: of each source, in order, its name, reader and
    order."""

    def __init__(
        self, names: Sequence[str], readers: Sequence[BlockReader], orders: Sequence[Order]
    ) -> None:
        self.names, self.readers, self.orders = names, readers, orders

    def condemn(self, entries: Iterable[Entry]) -> None:
        """Takes what the list names for bad."""
        for number, name in enumerate(self.names):
            reader = self.readers[number]
            files = {shard.file: i for i, shard in enumerate(reader.split.shards)}
            for e in entries:
                if (e["source"], e["split"]) == (name, reader.split_name) and e["shard"] in files:
                    reader.condemn(Fault(files[e["shard"]], e["member"], e["why"]))

    def replace(
        self,
        samples: NDArray[np.int64],
        source: NDArray[np.int64],
        index: NDArray[np.int64],
        shard: NDArray[np.int64],
        block: NDArray[np.int64],
    ) -> list[Entry]:
        """Puts readable rows into `shard` and `block` [B]; returns what it met on the way.

        `index`: of the samples in their sources. Raises DataError where none is found.
        """
        met: dict[tuple[Any, ...], Entry] = {}
        for i, sample in enumerate(samples.tolist()):
            number = int(source[i])
            reader, order = self.readers[number], self.orders[number]
            row = int(shard[i]), int(block[i])
            for attempt in range(DRAWS):
                faults = reader.faults(*row)
                for fault in faults:
                    entry = self._entry(number, fault, sample)
                    met.setdefault(_key(entry), entry)
                if not faults:
                    break
                row = order.draw(int(index[i]), attempt)
            else:
                raise DataError(
                    f"data.sources.{self.names[number]}: none of {DRAWS} rows drawn in place of "
                    f"sample {sample} can be read; the last: {faults[0].why}",
                    "almost all of a source can be read",
                    "look at the warnings about its shards; put them back",
                )
            shard[i], block[i] = row
        return list(met.values())

    def _entry(self, number: int, fault: Fault, sample: int) -> Entry:
        reader = self.readers[number]
        return {
            "source": self.names[number],
            "split": reader.split_name,
            "shard": reader.split.shards[fault.shard].file,
            "member": fault.member,
            "sample": sample,
            "why": fault.why,
        }


def _key(entry: Entry) -> tuple[Any, ...]:
    member = -1 if entry["member"] is None else entry["member"]
    return entry["source"], entry["split"], entry["shard"], member


def new_entries(known: Sequence[Entry], found: Iterable[Entry]) -> list[Entry]:
    """Those of `found` that `known` does not hold, each once: the one of the first sample."""
    held = {_key(entry) for entry in known}
    news: dict[tuple[Any, ...], Entry] = {}
    for entry in sorted(found, key=lambda e: (e["sample"], _key(e))):
        if _key(entry) not in held:
            news.setdefault(_key(entry), entry)
    return [news[key] for key in sorted(news)]


def merged(known: list[Entry], found: Iterable[Entry]) -> list[Entry]:
    """`known` with what is new in `found`, in a fixed order."""
    news = new_entries(known, found)
    return sorted([*known, *news], key=_key) if news else known


def agreed(
    known: list[Entry],
    told: Iterable[Iterable[Entry]],
    manifests: Mapping[str, Manifest],
    max_bad: float,
) -> list[Entry]:
    """The list after a step in which the ranks met `told`; warns of each new entry.

    Raises DataError where more than the share `max_bad` of a source's members is bad.
    """
    news = new_entries(known, itertools.chain(*told))
    for entry in news:
        log.warning("data.on_bad=quarantine: going on without %s", described(entry))
    entries = merged(known, news)
    require_few(entries, manifests, max_bad)
    return entries


def members_of(entries: Iterable[Entry], manifests: Mapping[str, Manifest]) -> dict[str, int]:
    """Source -> how many of its training members the list names."""
    counts = dict.fromkeys(manifests, 0)
    entries = list(entries)
    whole = {(e["source"], e["shard"]) for e in entries if e["member"] is None}
    for e in entries:
        if e["source"] not in counts:
            continue
        split = manifests[e["source"]].splits[e["split"]]
        if e["member"] is None:
            shard = next(i for i, s in enumerate(split.shards) if s.file == e["shard"])
            counts[e["source"]] += int(np.diff(split.first_member[shard : shard + 2])[0])
        elif (e["source"], e["shard"]) not in whole:
            counts[e["source"]] += 1
    return counts


def require_few(
    entries: Sequence[Entry], manifests: Mapping[str, Manifest], max_bad: float
) -> None:
    """Raises DataError where more than the share `max_bad` of a source's members is bad."""
    for name, bad in members_of(entries, manifests).items():
        whole = len(manifests[name].splits["train"].members)
        if bad > max_bad * whole:
            own = [e for e in entries if e["source"] == name]
            listed = "".join(f"\n    {described(e)}" for e in own[-5:])
            raise DataError(
                f"data.sources.{name}: {bad} of {whole} members cannot be used{listed}",
                f"a run goes on without at most {max_bad:.2%} of a source (data.max_bad)",
                "put the shards back (see the warnings), or raise data.max_bad; a shard that was "
                "put back stays left out in this run, and is read by new ones",
            )


def described(entry: Entry) -> str:
    """An entry in words."""
    what = "" if entry["member"] is None else f", member {entry['member']} of {entry['split']}"
    return f"{entry['source']}: {entry['shard']}{what}: {entry['why']}"
