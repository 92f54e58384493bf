"""What a run reports while it trains: metrics, the console line, the memory's panels, samples."""

from __future__ import annotations

import contextlib
import html
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import nn

from titans_pretrain.config import RunConfig
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.errors import NodeError
from titans_pretrain.evaluate.samples import Sample, Sampler
from titans_pretrain.joined import joined
from titans_pretrain.memory.observe import Observation, observe_memory
from titans_pretrain.model.counts import flops_per_token
from titans_pretrain.parallel.group import Group
from titans_pretrain.parallel.together import Together
from titans_pretrain.parallel.world import World
from titans_pretrain.run import board, panels
from titans_pretrain.run.console import Progress
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lines import Lines
from titans_pretrain.run.metrics import Metrics
from titans_pretrain.run.saver import Saved
from titans_pretrain.step import Progressed, StepReport

logger = logging.getLogger("titans_pretrain.watch")

SKIPPED = "events/divergence"  # tag of what was passed by


class Watch:
    """Rank 0's records of a run. The other ranks keep time and, where they hold parts of the model
    or of the rows that rank 0 is fed, tell it what their memories did and write samples with it.

    Args:
        sets: the validation sets; samples begin as a document of the first does.
        start: the step that the run goes on from.
        progress: figures of how far the data has been read, from the stream's state.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        world: World,
        leaving: contextlib.ExitStack,
        sets: Mapping[str, Manifest],
        start: int,
        tokens: int,
        progress: Callable[[dict[str, Any]], dict[str, float]],
    ) -> None:
        self.config, self.world, self._data_progress = config, world, progress
        self.stalled = 0.0  # seconds since the last record in which a save held training up
        # The slowest rank's own time over the median, where ranks were looked at since the record.
        self.slowest: float | None = None
        self._behind = 0.0  # seconds that checkpoints complete since then took behind training
        self._spent = 0.0  # seconds of watching since the last record
        self._recorded = start  # the last step with a record
        self._start = start
        self._reached = start  # the last step done
        self._seen: Observation | None = None
        self._sampler: Sampler | None = None
        self._process = psutil.Process()
        self._flops = 3 * sum(flops_per_token(config.model, config.data.sequence_length).values())
        self._metrics: Metrics | None = None
        self._writes_samples = bool(sets and config.log.sample.tokens)
        self._lookers: Group | None = None
        if config.log.memory_every:
            self._lookers = Group.join(world, lambda place: place.data == 0)
        self._folder = folder
        self._texts: Mapping[str, str] = {}
        self._starts: Callable[[int], Mapping[str, str]] = lambda step: {}
        self._open_files = leaving.enter_context(contextlib.ExitStack())
        if world.rank == 0:
            self._open(start, tokens)
            if self._writes_samples:
                manifest = next(iter(sets.values()))
                self._sampler = Sampler(config.log.sample, manifest, config.train.seed)

    def _open(self, start: int, tokens: int) -> None:
        """Opens the records to go on from step `start`; what they hold of later steps goes."""
        self._open_files.close()
        tensorboard = self.config.log.tensorboard
        self._metrics = self._open_files.enter_context(Metrics(self._folder, start, tensorboard))
        self._memory = panels.MemoryRecords(self._folder, start)
        self._samples = Lines(self._folder.samples, start)
        for file in (self._memory, self._samples):
            self._open_files.callback(file.close)
        self._progress = Progress(self.config.train.steps, start, tokens)
        self._recorded = start

    def begin(self, texts: Mapping[str, str], starts: Callable[[int], Mapping[str, str]]) -> None:
        """Introduces this life in TensorBoard: layout, descriptions, and how it came to begin.

        Args:
            starts: texts on this and all former starts of the run that went on from a step, or a
                later one: those that TensorBoard hides when the run goes on from there.
        """
        self._texts, self._starts = texts, starts
        self._introduce(self._start)

    def _introduce(self, step: int) -> None:
        """To a reader of what is recorded after `step`."""
        if self._metrics is not None:
            texts = {**self._texts, **self._starts(step)}
            self._metrics.introduce(board.layout(self.config), texts)

    def diverged(self, at: Progressed, told: str) -> NodeError | None:
        """The run goes on from `at`, perhaps some steps back, after a step that diverged. A disk
        that refuses is returned, for all ranks to agree on."""
        self._seen = None
        if self._metrics is None:
            return None
        try:
            if at.step < self._reached:
                self._open(at.step, at.tokens)
                if at.step <= self._start:  # else the introduction lies before what is hidden now
                    self._introduce(at.step)
                for text in self._metrics.cut_events(SKIPPED):  # what was skipped stays skipped
                    self._metrics.event(at.step + 1, at.tokens, SKIPPED, text)
            self._metrics.event(at.step + 1, at.tokens, SKIPPED, told)
        except NodeError as e:
            return e
        finally:
            self._reached = at.step
        return None

    def saved(self, saved: Saved) -> None:
        """A checkpoint is complete. Told at its own step, which a resumed run does not repeat."""
        self._behind += saved.behind
        self._event(saved.step, "events/checkpoint", str(saved))

    def straggling(self, at: Progressed, told: str) -> NodeError | None:
        """A rank has become slow. A disk that refuses is returned, for all ranks to agree on."""
        if self._metrics is None:
            return None
        logger.warning("%s", told)
        try:
            self._metrics.event(at.step, at.tokens, "events/straggler", told)
        except NodeError as e:
            return e
        return None

    def stopping(self, step: int, reason: str) -> None:
        """The run leaves before its end."""
        self._event(step, "events/stop", f"saved at step {step:,} on request: {reason}")

    def _event(self, step: int, tag: str, text: str) -> None:
        if self._metrics is not None:
            self._metrics.tell(step, {tag: text})

    @contextlib.contextmanager
    def memory(self, step: int) -> Iterator[None]:
        """Looks into the memory layers during step `step`, where the config asks for it."""
        if self._lookers is None or step % self.config.log.memory_every:
            yield
            return
        with observe_memory(cut=self.world.layout.context > 1) as seen:
            yield
        self._seen = seen
        self._spent += seen.seconds

    def record(
        self,
        at: Progressed,
        report: StepReport,
        seconds: float,
        waited: float,
        model: nn.Module | None,
    ) -> NodeError | None:
        """Writes the step's record, and samples where `model` is here and has been validated. A
        disk that refuses is returned, for all ranks to agree on. Collective over the ranks that
        have a part in either.

        Args:
            seconds: wall time of the step; waited: the part of it spent waiting for data.
            model: whole, or of several ranks together.
        """
        began = time.perf_counter()
        self._reached = at.step
        told = at.validation_loss is not None and self._writes_samples
        together = model if told and isinstance(model, Together) else None
        if self._seen is not None and self._lookers is not None:
            self._seen = joined(self._lookers, self._seen)
        if self._metrics is None:
            if together is not None:
                together.follow()
            return None
        try:
            with contextlib.nullcontext() if together is None else together.leading():
                self._write(self._metrics, at, report, seconds, waited)
                if told and self._sampler is not None and model is not None:
                    self._sample(self._metrics, self._sampler, at, model)
        except NodeError as e:
            return e
        finally:
            self._spent += time.perf_counter() - began
        return None

    def _write(
        self, metrics: Metrics, at: Progressed, report: StepReport, seconds: float, waited: float
    ) -> None:
        log, step = self.config.log, at.step
        last = step == self.config.train.steps
        if step % log.every == 0 or last or at.validation_loss is not None or self._seen:
            values = self._values(at, report, seconds, waited)
            self.stalled = self._behind = self._spent = 0.0
            self.slowest = None
            self._recorded = step
            metrics.write(step, at.tokens, values, images=self._pictures(at))
            self._seen = None
        if at.validation_loss is not None:
            ppl = math.exp(min(at.validation_loss, 700.0))
            line = f"validation at step {step}: loss {at.validation_loss:.4f}, ppl {ppl:.2f}"
            if len(at.validation_by_set) > 1:
                each = (f"{name} {loss:.4f}" for name, loss in at.validation_by_set.items())
                line += f" ({', '.join(each)})"
            logger.info(line)
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
            "time/save_stall_s": self.stalled,
            "time/save_behind_s": self._behind,
            # All that this class has done since the last record, and the memories' observation.
            "time/watch_s": self._spent / max(1, at.step - self._recorded),
            "machine/resident_gib": self._process.memory_info().rss / 2**30,
        }
        if self.slowest is not None:
            values["speed/slowest_over_median"] = self.slowest
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
        if self._seen is not None:
            for layer, figures in self._seen.figures.items():
                for what, value in figures.items():
                    values[panel(what, layer)] = float(value)
            for what, count in panels.health(self._seen.heads).items():
                values[f"memory_health/{what}"] = count
        return values

    def _pictures(self, at: Progressed) -> Mapping[str, panels.Picture]:
        """The memories' pictures, where they have been looked at; and their record."""
        if self._seen is None:
            return {}
        self._memory.append(at.step, at.tokens, self._seen.heads)
        return panels.draw(self._memory.last) if self.config.log.tensorboard else {}

    def _sample(self, metrics: Metrics, sampler: Sampler, at: Progressed, model: nn.Module) -> None:
        samples = sampler(model, at.step)
        told = [{"prompt": s.prompt, "text": s.text} for s in samples]
        self._samples.append({"step": at.step, "tokens": at.tokens, "samples": told})
        metrics.tell(at.step, {"samples": as_markdown(samples)})


def panel(what: str, layer: str) -> str:
    """The tag of a memory's figure, e.g. theta/p90 of blocks.3.mixer.memory:
    memory_theta/blocks.3.p90. TensorBoard so shows one group a figure, layer after layer."""
    figure, _, part = what.replace("surprise_untrained", "surprise/untrained").partition("/")
    return f"memory_{figure}/{layer.removesuffix('.mixer.memory')}{part and '.' + part}"


def as_markdown(samples: Sequence[Sample]) -> str:
    """Each prompt in bold, and behind it what the model wrote."""
    return "\n\n---\n\n".join(f"**{plain(s.prompt.strip())}** {plain(s.text)}" for s in samples)


def plain(text: str) -> str:
    """Text that Markdown shows as it stands, with its line breaks."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+.!|-])", r"\\\1", html.escape(text, quote=False))
    return escaped.replace("\n", "<br>")
