"""How ranks find each other: what a launcher told this process, and the first word between ranks.

Before any process group is made each rank puts what it was told (a hash of its config), or why it
refuses to take part, into the store that the group is to use, and reads what the others put there.
So all leave at once where one of them refuses, or was told something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from titans_pretrain.errors import ConfigError, TitansError

logger = logging.getLogger("titans_pretrain.parallel.rendezvous")

_SAID, _HEARD = "titans_pretrain/said by rank ", "titans_pretrain/heard"
PATIENCE = 30.0  # seconds that a rank which refuses gives the others to come and hear it


@dataclass(frozen=True)
class Launched:
    """Which of how many ranks this process is: of the world, and of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launched:
    """What WORLD_SIZE, RANK, LOCAL_RANK and LOCAL_WORLD_SIZE say; without WORLD_SIZE this process
    is alone.

    Raises ConfigError where one of them, or MASTER_PORT, is not what it can be, or lacks.
    """
    size = _number("WORLD_SIZE", 1, 1, None)
    if size > 1:
        lacks = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if lacks:
            raise ConfigError(
                f"WORLD_SIZE={size} without {', '.join(lacks)} in the environment",
                "each rank has a number, and finds the others at MASTER_ADDR and MASTER_PORT",
                _REMEDY,
            )
        _number("MASTER_PORT", 0, 1, 65535)
    rank = _number("RANK", 0, 0, size - 1)
    local_rank = _number("LOCAL_RANK", rank, 0, size - 1)
    return Launched(rank, size, local_rank, _number("LOCAL_WORLD_SIZE", size, 1, size))


_REMEDY = "use train --ranks N or torchrun, which set them; or unset WORLD_SIZE and RANK"


def _number(name: str, default: int, least: int, most: int | None) -> int:
    text = os.environ.get(name) or str(default)
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        size = f", WORLD_SIZE={os.environ.get('WORLD_SIZE', 1)}" if "RANK" in name else ""
        raise ConfigError(
            f"{name}={text} in the environment{size}",
            f"{name} is a whole number from {least}{'' if most is None else f' to {most}'}",
            _REMEDY,
        )
    return number


def meet(here: Launched, said: str, timeout_s: float) -> dist.Store:
    """The store of all ranks, once all have come. Collective.

    Raises on every rank what any of them refuses to take part for, and ConfigError where what was
    `said` to them differs.
    """
    if here.size == 1:
        return dist.HashStore()
    digest = hashlib.sha256(said.encode()).hexdigest()[:12]
    store, told = _exchange(here, (digest, None), timeout_s)
    refusals = [(rank, e) for rank, (_, e) in enumerate(told) if e is not None]
    if refusals or len({digest for digest, _ in told}) > 1:
        _hear(store, here)
    for rank, e in refusals:
        raise type(e)(f"rank {rank}: {e.value}", e.rule, e.remedy)
    _require_equal([digest for digest, _ in told], digest)
    return store


@contextlib.contextmanager
def told_to_all() -> Iterator[None]:
    """A ConfigError inside, on this rank or on all, is raised on those too that are on their way to
    `meet`. If they don't come, this rank does not wait for them for long."""
    try:
        yield
    except ConfigError as refusal:
        with contextlib.suppress(ConfigError):  # of `launched`: then there is nowhere to meet
            here = launched()
            if here.size > 1:
                _tell(here, refusal)
        raise


def _tell(here: Launched, refusal: ConfigError) -> None:
    try:
        store, _ = _exchange(here, ("", refusal), PATIENCE)
        _hear(store, here)
    except dist.DistError as e:
        logger.warning("the other ranks could not be told: %s", str(e).splitlines()[0])


Word = tuple[str, TitansError | None]  # a hash, or "" and why this rank refuses


def _exchange(here: Launched, word: Word, timeout_s: float) -> tuple[dist.Store, list[Word]]:
    """The store, and what each rank says (trusted peers: this unpickles)."""
    wait = timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", here.rank, here.size, timeout=wait))
    store.set_timeout(wait)
    store.set(f"{_SAID}{here.rank}", pickle.dumps(word))
    words = store.multi_get([f"{_SAID}{rank}" for rank in range(here.size)])
    return store, [pickle.loads(w) for w in words]


def _hear(store: dist.Store, here: Launched) -> None:
    """All are about to leave: rank 0, which keeps the store, as the last."""
    store.add(_HEARD, 1)
    end = time.monotonic() + PATIENCE
    while here.rank == 0 and store.add(_HEARD, 0) < here.size and time.monotonic() < end:
        time.sleep(0.05)


def _require_equal(told: list[str], mine: str) -> None:
    if len(set(told)) == 1:
        return
    by_hash: dict[str, list[int]] = {}
    for rank, digest in enumerate(told):
        by_hash.setdefault(digest, []).append(rank)
    groups = (
        f"{digest} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
        f"{' and others' if len(ranks) > 8 else ''}"
        for digest, ranks in by_hash.items()
    )
    raise ConfigError(
        f"configs (sha256): {'; '.join(groups)}; this rank's is {mine}",
        "all ranks of a run have one configuration, and the same options",
        "start all ranks with the same file, overrides and options",
    )
