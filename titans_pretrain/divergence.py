"""Which losses a run does not learn from, and how often it may pass one by.

Everything here is a function of numbers that are equal on all ranks (the losses of the steps, as
they were reduced), so that all ranks decide alike, and a resumed run as the uninterrupted one.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from titans_pretrain.config import DivergenceConfig
from titans_pretrain.errors import DivergedError

SIGMA = 1.4826  # times the median absolute deviation: a normal distribution's standard deviation
FLOOR = 1e-6  # of the median: a smaller deviation than this of it is none


def robust_z(loss: float, past: Sequence[float]) -> float:
    """(loss - median) / (1.4826 * median absolute deviation) among the `past` losses, one at least:
    what a few of them are, however large, hardly moves it."""
    median = statistics.median(past)
    spread = SIGMA * statistics.median(abs(x - median) for x in past)
    return (loss - median) / max(spread, FLOOR * abs(median), 1e-30)


class Divergence:
    """Judges losses by those before them, and keeps count of the steps that were passed by.

    Its state, `{"losses": [...], "passed_by": [{"step", "samples"}]}`, belongs into the
    checkpoint.
    """

    def __init__(self, config: DivergenceConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._passed_by: list[dict[str, Any]] = list((saved or {}).get("passed_by", []))
        self.go_back(saved)

    def go_back(self, saved: Mapping[str, Any] | None) -> None:
        """To the losses of a checkpoint; what was passed by stays counted."""
        self._losses.clear()
        self._losses.extend((saved or {}).get("losses", []))

    def state(self) -> dict[str, Any]:
        """Nothing, where a run does no more than stop at what is not finite."""
        if not self.config.watches:
            return {}
        state = {"losses": list(self._losses), "passed_by": list(self._passed_by)}
        return {"divergence": state}

    def judge(self, loss: float) -> str:
        """Why a step must not learn from its finite `loss` (nats a label); "" if it may."""
        if not self.config.spike or len(self._losses) < self.config.window:
            return ""
        z = robust_z(loss, self._losses)
        if z <= self.config.spike:
            return ""
        median, count = statistics.median(self._losses), len(self._losses)
        return (
            f"a spike: robust z-score {z:.1f} above the median {median:.4f} of the last {count} "
            f"losses (divergence.spike={self.config.spike:g})"
        )

    def learnt_from(self, loss: float) -> None:
        """A step has been done with this loss."""
        if self.config.spike:
            self._losses.append(loss)

    def pass_by(self, step: int, samples: tuple[int, int], error: DivergedError) -> None:
        """Counts that `step` is to be passed by, with samples [start, stop) left out.

        Raises DivergedError if the budget is spent: `divergence.budget` times in the last
        `divergence.within` steps. What lies further back no longer counts.
        """
        c = self.config
        recent = [p for p in self._passed_by if p["step"] > step - c.within]
        if len(recent) >= c.budget:
            before = ", ".join(str(p["step"]) for p in recent)
            raise DivergedError(
                f"{error.value}; divergence.on={c.on} helped no longer: steps {before} were passed "
                f"by before",
                f"{error.rule}; divergence.budget={c.budget} within {c.within} steps",
                "lower optim.lr, or resume from an earlier checkpoint; look at the samples (they "
                "are in the checkpoint's state.json, data.skips)",
            )
        self._passed_by = [*recent, {"step": step, "samples": list(samples)}]
