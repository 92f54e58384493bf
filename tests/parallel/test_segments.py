"""Segments of a row where each send waits for its receive, as it may on a device: no rank waits for
ever, and every gradient is that of one process."""

from __future__ import annotations

from unittest import mock

import torch.distributed as dist

from tests.parallel.context_runs import Run, _blocking_send, worst
from tests.parallel.context_schedule import in_segments_plain, join_in_segments, segments_run
from tests.worlds import run_world

CASES = (("mac", "FB"), ("mag-bare", "FFBB"))


def with_sends_that_wait() -> dict[str, Run]:
    link = join_in_segments()
    with mock.patch.object(dist, "isend", _blocking_send):
        runs = {case: segments_run(link, case, order) for case, order in CASES}
    dist.barrier()
    return runs


def test_the_last_ranks_states_go_round_where_the_first_awaits_them() -> None:
    runs = run_world(with_sends_that_wait, 2, timeout=100)[0]
    for case, _ in CASES:
        right = in_segments_plain(case)
        assert abs(runs[case].loss - right.loss) < 1e-12 * right.loss
        assert worst(runs[case], right)[0] < 1e-9, case
