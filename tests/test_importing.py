"""What a command imports is out of the garbage collector's sight."""

from __future__ import annotations

import subprocess
import sys

LINES = """
import gc
from titans_pretrain.importing import for_good

collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
with for_good():
    import torch
print(collected, gc.isenabled(), gc.get_freeze_count() > 100_000)
frozen = gc.get_freeze_count()
with for_good():
    made = [[] for _ in range(10_000)]
print(2000 > gc.get_freeze_count() - frozen, gc.isenabled())
"""


def test_once_and_then_as_before() -> None:
    said = subprocess.run(
        [sys.executable, "-c", LINES], capture_output=True, text=True, check=True, timeout=120
    )
    assert said.stdout.splitlines() == ["[] True True", "True True"]
