"""The preflight on a real Slurm: a node that cannot reach the others is left out before any step,
and the run ends bitwise where the undisturbed one ends."""

import sys

import pytest

from tests import torture
from tests.slurm.faults import all_idle, tree

PYTHON = """\
#!/bin/bash
[[ $SLURMD_NODENAME != n2 ]] || export GLOO_SOCKET_IFNAME=nowhere
exec {python} "$@"
"""


@pytest.mark.timeout(600)
def test_a_bad_node_is_left_out_before_the_first_step(cluster, data, undisturbed, tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    site = {"python": str(python), "preflight": {"seconds": 20, "matmul_of_median": 0.01}}
    job = cluster.submit(tree(tmp_path / "run", data), site=site)
    assert job.until_ended(240) == "COMPLETED", job.story()
    assert [(r.reason, r.nodes) for r in job.restarts] == [("hardware", ("n2",))], job.story()
    assert "preflight: n2: its own ranks: RuntimeError" in job.log
    assert "n2" not in job.nodes
    assert torture.result(job.run) == undisturbed
    all_idle(cluster)


def test_a_fault_of_all_nodes_ends_the_job(cluster, data, tmp_path):
    site = {"preflight": {"disk_free_gb": 1e9, "matmul_of_median": 0.01}}
    job = cluster.submit(tree(tmp_path / "run", data), site=site)
    assert job.until_ended() == "FAILED", job.story()
    assert job.restarts == []
    assert "end: preflight (run folder on all 2 nodes: " in job.log
    all_idle(cluster)
