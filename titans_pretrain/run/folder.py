"""The run folder: where everything that a run writes lies.

config.yaml           the resolved configuration of the latest life
lock.000007           the claim of life 7 (see lock.py)
metrics.jsonl         one record a line
lives.jsonl           when and where each start of the run began and ended (see lives.py)
memory.jsonl          the memories' figures, head by head
samples.jsonl         text generated at validations
stop                  the run is to save and end for good (titans-pretrain stop)
restarts.tsv          why Slurm jobs of the run were queued again (see launch/verdict.py)
failure-*-rank-*.txt  where a rank stood that the watchdog ended (see watchdog.py)
lost-rank-life-*.txt  where one stood as another was gone without a word
checkpoints/  tensorboard/  logs/rank-00000.log
jobs/                 code, config and script of each Slurm job, and its marks (see marks.py)
"""

from __future__ import annotations

import time
from pathlib import Path

from titans_pretrain.errors import ConfigError
from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.lock import RunLock

CHECKPOINT_FORMAT = 1  # of state.json and what it goes with


class RunFolder:
    """Paths of one run. Any rank may hold one; only rank 0 takes the lock and writes the files
    that are not a rank's own."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.memory = self.path / "memory.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.lives = self.path / "lives.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.jobs = self.path / "jobs"
        self.stop = self.path / "stop"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    def take(self, *, bound: float = 120.0, beat: float = 15.0, patience: float = 0.0) -> RunLock:
        """Makes the folder and claims it for this process: a new life of the run.

        Raises ConfigError when a living process holds it (the folder is left as it was) or when
        the path cannot be used, NodeError when the disk fails. `bound`, `beat`: seconds, see lock.
        `patience`: seconds in which a holder may turn out to be dead.
        """
        self.refuse_if_stopped()
        try:
            for folder in (self.path, self.checkpoints, self.tensorboard, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + patience
            while True:
                try:
                    return RunLock.take(self.path, bound=bound, beat=beat)
                except ConfigError as e:
                    if time.monotonic() > deadline:
                        raise
                    left = deadline - time.monotonic()
                    print(f"waiting: {e.value}; at most {left:.0f} s more", flush=True)
                    time.sleep(min(beat, max(0.0, deadline - time.monotonic())) + 0.05)
        except OSError as e:
            raise storage_error(e, f"taking the run folder {self.path}", starting=True) from e

    def refuse_if_stopped(self) -> None:
        """Raises ConfigError if the user has stopped the run for good."""
        if self.stop.exists():
            raise ConfigError(
                f"{self.stop} is there: the run was stopped",
                "a stopped run goes on only if told so",
                f"once its last job has ended, remove {self.stop} and start again",
            )

    def write_config(self, text: str) -> None:
        """Saves the resolved configuration (YAML). The holder of the lock calls it."""
        try:
            atomic_write(self.config, text)
        except OSError as e:
            raise storage_error(e, f"writing {self.config}", starting=True) from e
