"""Shared test settings: deterministic property tests, one thread, no test that changes the next."""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("fuzz", derandomize=False, deadline=None, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_world_left_behind():
    """A world that is started in the tests' own process would make ranks of all later commands."""
    before = {name: os.environ.get(name) for name in WORLD}
    yield
    after = {name: os.environ.get(name) for name in WORLD}
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    assert after == before, "a world was started in the tests' own process: use worlds.run_world"
