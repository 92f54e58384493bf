"""Where a run goes on after a step that must change nothing: with the next batch, or from a
checkpoint and behind the bad batch. All ranks go there together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.data.streaming import Stream
from titans_pretrain.divergence import Divergence
from titans_pretrain.errors import DivergedError
from titans_pretrain.parallel.world import World
from titans_pretrain.phases import phase
from titans_pretrain.run import checkpoint
from titans_pretrain.step import Progressed, TrainStep

log = logging.getLogger("titans_pretrain.recovery")


def random_state() -> dict[str, torch.Tensor]:
    """The generator state that all ranks share (parameters and data have their own seeds)."""
    return {"rng/cpu": torch.get_rng_state()}


def restore(found: checkpoint.Found, config: RunConfig, world: World, step: TrainStep) -> None:
    """Collective. Weights, moments, AdamW's count and random numbers of a checkpoint."""
    model = config.model.model_dump(mode="json")
    fragments, tensors = step.optimizer.fragments(), random_state()
    world.agree(lambda: checkpoint.load(found, model, fragments, tensors))
    torch.set_rng_state(tensors["rng/cpu"])
    step.optimizer.weights_loaded(found.step)


@dataclass(frozen=True)
class Recovery:
    """What to do about a step that diverged, by `divergence.on`.

    The same step is then done with the next batch (skip), or the steps since a checkpoint are done
    again with the batches that follow (rewind): a step's number, learning rate and AdamW count
    always go together. What was skipped is an interval of sample numbers in the data's state.
    """

    config: RunConfig
    checkpoints: Path
    world: World
    step: TrainStep
    stream: Stream
    divergence: Divergence
    settled: Callable[[], None]  # collective: no save is in flight any more

    def __call__(
        self, error: DivergedError, at: Progressed, data: dict[str, Any]
    ) -> tuple[Progressed, str]:
        """Collective. (where the run goes on, what was done in words) after `error` in the step
        behind `at`; `data`: the stream's state after the bad batch.

        Raises DivergedError where the run is to stop, the budget is spent, or no checkpoint is
        there to go back to; what the checkpoint's reading raises.
        """
        if self.config.divergence.on == "stop":
            raise error
        if self.config.divergence.on == "skip":
            after, start = at, int(at.data["next_sample"])
        else:
            found = self._find(error, at.step)
            after = Progressed(found.step, found.state["tokens"], data)
            start = int(found.state["data"]["next_sample"])
        stop = int(data["next_sample"])
        self.divergence.pass_by(at.step + 1, (start, stop), error)
        if self.config.divergence.on == "rewind":
            self._rewind(found)
        after = replace(after, data=self.stream.skip(data, start, stop))
        told = f"{error.value}; samples {start} to {stop - 1} are skipped"
        if self.config.divergence.on == "rewind":
            told += f"; back to the checkpoint of step {after.step}"
        log.warning("%s", told)
        return after, told

    @phase("loading")
    def _find(self, error: DivergedError, step: int) -> checkpoint.Found:
        """The newest checkpoint of those that every life of the run makes at the same steps: what
        was saved on request must not make a difference. Else the newest."""
        self.settled()
        every = self.config.checkpoint.every_steps

        def order(steps: list[int]) -> list[int]:
            return sorted((s for s in steps if s <= step), key=lambda s: (_due(s, every), s))

        found = checkpoint.find_latest(self.checkpoints, self.world, log.warning, order)
        if found is None:
            raise DivergedError(
                f"{error.value}; there is no checkpoint to go back to",
                error.rule,
                "save earlier (checkpoint.every_steps), or set divergence.on=skip",
            )
        if every and not _due(found.step, every):
            log.warning(
                "no checkpoint of checkpoint.every_steps=%d is left: back to that of step %d, where"
                " an uninterrupted run would not go",
                *(every, found.step),
            )
        return found

    @phase("loading")
    def _rewind(self, found: checkpoint.Found) -> None:
        restore(found, self.config, self.world, self.step)
        self.divergence.go_back(found.state.get("divergence"))
        left = self.world.only_first(lambda: checkpoint.remove_after(self.checkpoints, found.step))
        if left:
            log.info("removed checkpoints after step %d: %s", found.step, left)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
