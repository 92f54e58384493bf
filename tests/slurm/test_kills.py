"""Three kills of kills.py, at moments and by means that are fixed."""

import random

import pytest

from tests import torture
from tests.slurm import kills
from tests.slurm.faults import all_idle, tree


class Script(random.Random):
    """Draws moments and means from a list, and all else from a fixed seed."""

    def __init__(self, *told):
        super().__init__(3)
        self.told = list(told)

    def choice(self, among):
        drawn = self.told.pop(0)
        assert drawn in among
        return drawn


@pytest.mark.timeout(900)
def test_three_kills_and_then_the_undisturbed_run(
    cluster, data, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(kills, "KILLS", 3)
    draw = Script("starting", "rank 1", "training", "requeue", "starting", "rank 0")
    told = []
    done, job = kills.disturb(cluster, tree(tmp_path / "run", data), draw, told.append)
    assert (done, len(told)) == (3, 3)
    killed = ("crash", "no rank started")
    reasons = [r.reason for r in job.restarts]
    assert [r in killed for r in reasons] == [True, False, True], job.story()
    assert torture.result(str(job.run)) == undisturbed
    all_idle(cluster)
