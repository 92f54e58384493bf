"""Tells every rank of a failure that one of them met alone, so that all leave with the same error.

A rank that leaves alone is noticed where another waits for it, by gloo mostly at once, by NCCL
after its timeout. Here the failing rank puts its error into the process group's store and waits
until each rank's thread has fetched it; then it leaves. The others find the error when their
collective breaks; one that is still stuck in it some seconds later is ended with the error's code.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import time
from typing import Any, cast

import torch
from torch.distributed import distributed_c10d

from titans_pretrain.errors import TitansError
from titans_pretrain.parallel.world import World

logger = logging.getLogger("titans_pretrain.parallel.peers")

_FAILURE, _FETCHED = "titans_pretrain/failure", "titans_pretrain/failure fetched"
POLL = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds: of the failing rank for the others to fetch, of these to leave


class Peers:
    """The other ranks of a world. `close` it before the process group is gone."""

    def __init__(self, world: World) -> None:
        self._size = world.size
        self._closed, self._told = threading.Event(), threading.Event()
        self._failure: TitansError | None = None
        if world.size > 1:
            self._store = cast(Any, distributed_c10d._get_default_store())
            watching = threading.Thread(
                target=self._watch, args=(self._store.clone(),), name="peers", daemon=True
            )
            watching.start()

    def tell(self, failure: TitansError) -> None:
        """Puts this rank's failure where all ranks find it; returns once they have, or gone."""
        if self._size == 1:
            return
        end = time.monotonic() + PATIENCE
        try:
            self._store.set(_FAILURE, pickle.dumps(failure))
            while self._store.add(_FETCHED, 0) < self._size and time.monotonic() < end:
                time.sleep(0.05)
        except torch.distributed.DistError as e:
            logger.warning("the other ranks could not be told: %s", str(e).splitlines()[0])

    def failure(self, wait: float) -> TitansError | None:
        """What some rank failed with, if it tells within `wait` seconds."""
        return self._failure if self._size > 1 and self._told.wait(wait) else None

    def close(self) -> None:
        self._closed.set()

    def _watch(self, store: Any) -> None:
        while not self._closed.wait(POLL):
            try:
                if not store.check([_FAILURE]):
                    continue
                self._failure = pickle.loads(store.get(_FAILURE))
                store.add(_FETCHED, 1)
            except torch.distributed.DistError:
                return  # the rank that keeps the store is gone: this one will notice
            self._told.set()
            if not self._closed.wait(PATIENCE):
                self._end(self._failure)
            return

    def _end(self, failure: TitansError) -> None:
        """Nothing else ends a thread that waits inside a collective."""
        logger.error("another rank failed and this one hangs in a collective: %s", failure)
        print(f"titans-pretrain: {failure}", file=sys.stderr, flush=True)
        os._exit(failure.exit_code)
