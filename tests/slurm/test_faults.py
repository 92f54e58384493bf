"""Each fault of faults.py, on a real Slurm: noticed in time, no more lost than what was not saved,
and the run that goes on by itself ends bitwise where the undisturbed one ends."""

import pytest

from tests import torture
from tests.slurm.faults import FAULTS, all_idle, strike, submit


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [n for n, fault in FAULTS.items() if not fault.by_hand])
def test_a_job_survives(name, cluster, data, undisturbed, tmp_path):
    fault = FAULTS[name]
    job = submit(cluster, fault, tmp_path / "run", data)
    strike(cluster, fault, job)
    if fault.then == "ends":  # submitted again, it goes on
        job = submit(cluster, fault, tmp_path / "run", data)
        assert job.until_ended() == "COMPLETED", job.story()
    assert torture.result(job.run) == undisturbed
    all_idle(cluster)
