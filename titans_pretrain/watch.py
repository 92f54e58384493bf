"""What a run reports while it trains: metrics, the console line, the memory's panels."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.errors import NodeError
from titans_pretrain.memory.observe import observe_memory
from titans_pretrain.model.counts import flops_per_token
from titans_pretrain.parallel.world import World
from titans_pretrain.run.console import Progress
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.metrics import Metrics
from titans_pretrain.step import Progressed, StepReport

logger = logging.getLogger("titans_pretrain.watch")


class Watch:
    """Rank 0's records of a run; on the other ranks it only keeps time.

    Args:
        start: the step that the run goes on from.
        progress: figures of how far the data has been read, from the stream's state.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        world: World,
        leaving: contextlib.ExitStack,
        start: int,
        tokens: int,
        progress: Callable[[dict[str, Any]], dict[str, float]],
    ) -> None:
        self.config, self.world, self._data_progress = config, world, progress
        self.checkpoint_seconds = 0.0  # spent since the last record
        self._seen: dict[str, dict[str, float]] = {}
        self._process = psutil.Process()
        self._flops = 3 * sum(flops_per_token(config.model, config.data.sequence_length).values())
        self._metrics: Metrics | None = None
        if world.rank == 0:
            self._metrics = leaving.enter_context(Metrics(folder, start, config.log.tensorboard))
            self._progress = Progress(config.train.steps, start, tokens)

    @contextlib.contextmanager
    def memory(self, step: int) -> Iterator[None]:
        """Looks into the memory layers during step `step`, where the config asks for it."""
        every = self.config.log.memory_every
        if self._metrics is None or not every or step % every:
            yield
            return
        with observe_memory() as seen:
            yield
        self._seen = seen.figures

    def record(
        self, at: Progressed, report: StepReport, seconds: float, waited: float
    ) -> NodeError | None:
        """Writes the step's record. A disk that refuses is returned, for all ranks to agree on.

        Args:
            seconds: wall time of the step; waited: the part of it spent waiting for data.
        """
        if self._metrics is None:
            return None
        try:
            self._write(self._metrics, at, report, seconds, waited)
        except NodeError as e:
            return e
        return None

    def _write(
        self, metrics: Metrics, at: Progressed, report: StepReport, seconds: float, waited: float
    ) -> None:
        log, step = self.config.log, at.step
        last = step == self.config.train.steps
        if step % log.every == 0 or last or at.validation_loss is not None:
            values = self._values(at, report, seconds, waited)
            metrics.write(step, at.tokens, values)
            self.checkpoint_seconds, self._seen = 0.0, {}
        if at.validation_loss is not None:
            ppl = math.exp(min(at.validation_loss, 700.0))
            logger.info("validation at step %d: loss %.4f, ppl %.2f", step, at.validation_loss, ppl)
        if step % log.console_every == 0 or last:
            line = self._progress.line(step, at.tokens, report.loss, report.lr, report.grad_norm)
            logger.info(line)

    def _values(
        self, at: Progressed, report: StepReport, seconds: float, waited: float
    ) -> dict[str, float]:
        rate = report.tokens / max(seconds, 1e-9)
        values = {
            "train/loss": report.loss,
            "train/perplexity": math.exp(min(report.loss, 700.0)),
            "train/lr": report.lr,
            "train/grad_norm": report.grad_norm,
            "speed/tokens_per_s": rate,
            "speed/model_flop_per_s": rate * self._flops,
            "time/step_s": seconds,
            "time/data_wait_s": waited,
            "time/forward_backward_s": report.seconds["forward_backward"],
            "time/optimizer_s": report.seconds["optimizer"],
            "time/checkpoint_s": self.checkpoint_seconds,
            "machine/resident_gib": self._process.memory_info().rss / 2**30,
        }
        if self.config.train.z_loss:
            values["train/z_loss"] = report.z_loss
        if self.config.train.ramp is not None:
            values["train/rows"] = self.config.train.rows(at.step)
        if self.world.device.type == "cuda":
            values["machine/cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for index, name in enumerate(self.config.data.sources):
            if index in report.by_source:
                values[f"train_loss_by_source/{name}"] = report.by_source[index]
        if at.validation_loss is not None:
            values["validation/loss"] = at.validation_loss
            values["validation/perplexity"] = math.exp(min(at.validation_loss, 700.0))
        if len(at.validation_by_set) > 1:
            for name, loss in at.validation_by_set.items():
                values[f"validation/{name}/loss"] = loss
                values[f"validation/{name}/perplexity"] = math.exp(min(loss, 700.0))
        values |= self._data_progress(at.data)
        for layer, seen in self._seen.items():
            for what, value in seen.items():
                values[panel(what, layer)] = float(value)
        return values


def panel(what: str, layer: str) -> str:
    """The tag of a memory's figure, e.g. theta/p90 of blocks.3.mixer.memory:
    memory_theta/blocks.3.p90. TensorBoard so shows one group a figure, layer after layer."""
    figure, _, part = what.replace("surprise_untrained", "surprise/untrained").partition("/")
    return f"memory_{figure}/{layer.removesuffix('.mixer.memory')}{part and '.' + part}"
