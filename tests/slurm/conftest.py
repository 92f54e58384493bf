"""The cluster of these tests, and what an undisturbed run comes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import torture
from tests.conftest import BESIDE
from tests.prepared import small_dataset
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.faults import tree


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def started() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.nice(-BESIDE)  # its timeouts are short, and what other workers compute is in no hurry
    cluster = Cluster()
    yield cluster
    cluster.down()


@pytest.fixture
def cluster(started: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The one cluster of all tests; made anew after a test that failed, which may have left a node
    without power, a full disk or jobs behind."""
    failed = request.session.testsfailed
    yield started
    if request.session.testsfailed > failed:
        started("down")
        started("up")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `faults.tree` comes to on one machine, by `train --ranks 2`."""
    whole = tree(tmp_path_factory.mktemp("whole") / "run", data)
    torture.finish(whole)
    return torture.result(whole["folder"])
