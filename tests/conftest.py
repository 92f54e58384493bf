"""Shared test settings: deterministic property tests, one thread, no test that changes the next;
and, with several workers (pytest -n), who takes which tests."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests are the CPU's, and engines take a GPU that they see; CUDA_VISIBLE_DEVICES=0 pytest -m cuda
# runs those of a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

HERE = Path(__file__).parent
SLURM = HERE / "slurm"
# Minutes each: handed out last, one of them would keep one worker when the others are done.
LONGEST = (
    "test_resume.py",
    "measure/test_gpu_check.py",
    "parallel/test_zero.py",
    "test_torture.py",
    "test_readme.py",
    "parallel/test_parity.py",
    "estimate/test_held.py",
)
BESIDE = 5  # niceness of a worker of pytest -n; the one that has Slurm's tests takes it back

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        os.nice(BESIDE)


@pytest.fixture(autouse=True)
def no_world_left_behind():
    """A world that is started in the tests' own process would make ranks of all later commands."""
    before = {name: os.environ.get(name) for name in WORLD}
    yield
    after = {name: os.environ.get(name) for name in WORLD}
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    assert after == before, "a world was started in the tests' own process: use worlds.run_world"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: the last ones to be handed out are short, so that no worker is left alone
    with a long one. Slurm's tests mostly wait: whatever is computed beside them costs nothing."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {HERE / name: number for number, name in enumerate(LONGEST)}

    def turn(item: pytest.Item) -> tuple[bool, int, bool]:
        after = place.get(item.path, len(place))
        return SLURM not in item.path.parents, after, item.path not in slow

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """What all test modules have imported is for good: no collection of garbage goes through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share what they set up and stay together; all of Slurm's share one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    config.option.loadscopereorder = False  # the order is that of the collection
    return ByFile(config, log)
