"""A process of the check: carries out the parts of one group and appends one JSON line a part.

python -m titans_pretrain.measure.gpu_check.child '{"section": "steps", "parts": [...], ...}'
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_pretrain.importing import for_good
from titans_pretrain.launch.local import launch


@dataclass(frozen=True)
class Task:
    """What one process does, where, how large."""

    section: str  # a key of MEASURES
    parts: list[str]
    device: str  # "cpu" or "cuda"
    dry: bool  # tiny sizes
    engines: bool  # Megatron-core and DeepSpeed are there; else plain steps stand in
    ranks: int
    folder: str  # for checkpoints, seen by all processes of the check
    results: str  # file of JSON lines
    logs: str  # folder for what ranks other than the first say
    threads: int

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


# section -> its module and function in this package; a module brings in what its needs allow.
MEASURES = {
    "machine": "basics:machine",
    "matmul": "basics:matmul",
    "memory": "basics:memory",
    "collectives": "basics:collective",
    "memory speed": "basics:memory_speed",
    "steps": "small:steps",
    "reference": "small:steps",
    "layouts": "layouts:layout",
    "save": "saves:save",
    "resume": "saves:resume",
    "to cpu": "saves:to_cpu",
    "back": "saves:back",
    "train": "large:train",
    "zero": "large:zero",
}


def main(argv: list[str]) -> int:
    task = Task(**json.loads(argv[0]))
    if task.ranks > 1 and "RANK" not in os.environ:
        command = [sys.executable, "-m", "titans_pretrain.measure.gpu_check.child", argv[0]]
        return launch(command, task.ranks, logs=Path(task.logs))
    module, _, function = MEASURES[task.section].partition(":")
    with for_good():
        import torch

        measures = importlib.import_module(f"titans_pretrain.measure.gpu_check.{module}")
    act = getattr(measures, function)
    torch.set_num_threads(task.threads)
    for part in task.parts:
        began = time.perf_counter()
        result: dict[str, Any] = act(task, part)
        if os.environ.get("RANK", "0") == "0":
            line = {"part": part, "took_s": round(time.perf_counter() - began, 2), **result}
            with Path(task.results).open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
