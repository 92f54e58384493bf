"""The run folder: where everything that a run writes lies.

config.yaml           the resolved configuration of the latest life
lock.000007           the claim of life 7 (see lock.py)
metrics.jsonl         one record a line
memory.jsonl          the memories' figures, head by head
samples.jsonl         text generated at validations
failure-*-rank-*.txt  where a rank stood that the watchdog ended (see watchdog.py)
checkpoints/  tensorboard/  logs/rank-00000.log
"""

from __future__ import annotations

from pathlib import Path

from titans_pretrain.run.files import atomic_write, storage_error
from titans_pretrain.run.lock import RunLock


class RunFolder:
    """Paths of one run. Any rank may hold one; only rank 0 takes the lock and writes the files
    that are not a rank's own."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.memory = self.path / "memory.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank:05d}.log"

    def take(self, *, bound: float = 120.0, beat: float = 15.0) -> RunLock:
        """Makes the folder and claims it for this process: a new life of the run.

        Raises ConfigError when a living process holds it (the folder is left as it was) or when
        the path cannot be used, NodeError when the disk fails. `bound`, `beat`: seconds, see lock.
        """
        try:
            for folder in (self.path, self.checkpoints, self.tensorboard, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            return RunLock.take(self.path, bound=bound, beat=beat)
        except OSError as e:
            raise storage_error(e, f"taking the run folder {self.path}", starting=True) from e

    def write_config(self, text: str) -> None:
        """Saves the resolved configuration (YAML). The holder of the lock calls it."""
        try:
            atomic_write(self.config, text)
        except OSError as e:
            raise storage_error(e, f"writing {self.config}", starting=True) from e
