"""The roll: every rank learns where the others are, and how they left."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from tests.worlds import run_world
from titans_pretrain.run.roll import LEFT, LISTED, Beat, Roll, Seen

EVERY = 0.05


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def start() -> tuple[int, Roll, list[int]]:
    """This rank's roll; it is in step 10 + rank until the list is changed."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, step = dist.get_rank(), [10 + dist.get_rank()]

    def mine() -> Beat:
        return Beat(rank, "here", os.getpid(), step=step[0], phase="forward", pulse=step[0])

    return rank, Roll(dist.get_world_size(), mine, time.monotonic, EVERY), step


def states(roll: Roll) -> dict[int, str]:
    return {s.beat.rank: s.beat.state for s in roll.seen()}


def call() -> list[Any]:
    import torch.distributed as dist

    rank, roll, step = start()
    until(lambda: sorted(s.beat.step for s in roll.seen()) == [10, 11, 12])
    first = [(s.beat.rank, s.beat.step, s.beat.place) for s in roll.seen()]
    dist.barrier()
    mine, failed = roll._mine, []

    def fails_once() -> Beat:
        if not failed and threading.current_thread().name == "roll":
            failed.append(rank)
            raise KeyError("no such frame")
        return mine()

    roll._mine = fails_once
    step[0] = 20 - rank
    until(lambda: failed)  # and the beats go on
    until(lambda: sorted(s.beat.step for s in roll.seen()) == [18, 19, 20])
    then = [s.beat.rank for s in roll.seen()]
    dist.barrier()
    if rank:
        roll.close(LEFT if rank == 1 else "ValueError: no")
    else:
        until(lambda: states(roll)[1] == LEFT and states(roll)[2])
        time.sleep(20 * EVERY)
        lost = [(s.beat.rank, s.beat.state) for s in roll.lost(5 * EVERY)]
        first.append(lost)
    dist.barrier()
    roll.close(LEFT)
    return [first, then]


def test_all_know_of_all_and_who_left() -> None:
    results = run_world(call, 3)
    behind_first = [(r, 10 + r, f"step {10 + r}, forward") for r in range(3)]
    assert results[0][0] == [*behind_first, [(2, "ValueError: no")]]
    assert results[1][0] == results[2][0] == behind_first
    assert [then for _, then in results] == [[2, 1, 0]] * 3


def alarm() -> str:
    import torch.distributed as dist

    rank, roll, _ = start()
    if rank == 1:
        roll.raise_alarm("no step for an hour")
    until(lambda: roll.alarm)
    roll.report()
    until(lambda: roll.reported() == 2)
    dist.barrier()  # rank 0 takes the store with it
    return roll.alarm


def test_an_alarm_reaches_all_and_reports_are_counted() -> None:
    assert run_world(alarm, 2) == ["no step for an hour"] * 2


def a_rank_that_does_not_beat() -> list[Any]:
    import torch.distributed as dist

    if os.environ["RANK"] == "1":
        dist.init_process_group("gloo")
        dist.barrier()
        return []
    _, roll, _ = start()
    until(lambda: roll.lost(10 * EVERY))
    dist.barrier()
    threads = [t.name for t in threading.enumerate()]
    return [(s.beat.rank, s.beat.pid, s.silent >= 10 * EVERY) for s in roll.lost(0.5)] + threads


def test_a_rank_that_never_beat_is_lost_and_blocks_nobody() -> None:
    found, _ = run_world(a_rank_that_does_not_beat, 2)
    assert tuple(found[0]) == (1, 0, True) and "roll" in found


def test_of_many_ranks_those_behind_are_listed() -> None:
    """Sorted and cut as rank 0 does it, without a store."""
    roll = object.__new__(Roll)
    roll._every = 2.0
    seen = [Seen(Beat(r, "h", 1, pulse=1000 - r), 0.0) for r in range(1000)]
    seen[0] = Seen(seen[0].beat, 9.0)  # further than all, and not heard of
    listed = [s.beat.rank for s in sorted(seen, key=roll._behind)[:LISTED]]
    assert listed == [0, *range(999, 999 - LISTED + 1, -1)]


def beats_no_more() -> list[Any]:
    """Rank 1's beats end while it lives."""
    import torch.distributed as dist

    rank, roll, _ = start()
    until(lambda: sorted(s.beat.step for s in roll.seen()) == [10, 11])
    if rank == 1:
        original, stop = roll._mine, threading.Event()

        def blocked() -> Beat:
            stop.wait()
            return original()

        roll._mine = blocked
        dist.barrier()
        stop.set()
        return []
    until(lambda: roll.lost(10 * EVERY))
    lost = roll.lost(10 * EVERY)
    time.sleep(4 * EVERY)
    (later,) = roll.lost(10 * EVERY)
    dist.barrier()
    assert later.silent > lost[0].silent >= 10 * EVERY
    return [(s.beat.rank, s.beat.step) for s in lost]


def test_a_rank_whose_beats_end_is_lost() -> None:
    lost, _ = run_world(beats_no_more, 2)
    assert [tuple(entry) for entry in lost] == [(1, 11)]


def the_store_goes() -> list[Any]:
    import torch.distributed as dist

    rank, roll, _ = start()
    until(lambda: sorted(s.beat.step for s in roll.seen()) == [10, 11])
    dist.barrier()
    if rank == 0:
        return []  # and its process ends without a word
    until(lambda: roll.lost(20 * EVERY))
    until(lambda: "roll" not in [t.name for t in threading.enumerate()])
    roll.close("ValueError: no")  # does not block
    return [(s.beat.rank, s.beat.step) for s in roll.lost(20 * EVERY)]


def test_the_rank_that_keeps_the_store_is_missed_like_any_other() -> None:
    _, lost = run_world(the_store_goes, 2)
    assert [tuple(entry) for entry in lost] == [(0, 10)]
