"""What a person reads: one line an interval on the console, one log file a rank."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable

from titans_pretrain.run.files import storage_error
from titans_pretrain.run.folder import RunFolder

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _RankFile(logging.FileHandler):
    """A log file whose failed write ends the run (NodeError) instead of printing a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise storage_error(error, f"writing {self.baseFilename}") from error
        super().handleError(record)


class _Console(logging.StreamHandler):
    """Falls silent when its reader goes (`| head`) or its disk is full: the run goes on, and its
    log file has it all."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            self.setLevel(logging.CRITICAL + 1)
        elif not isinstance(error, OSError):
            super().handleError(record)


def open_log(folder: RunFolder, rank: int) -> logging.Logger:
    """The package's logger, writing to logs/rank-NNNNN.log, on rank 0 to the console as well.

    Replaces what an earlier call opened. Raises NodeError or ConfigError if it cannot be opened.
    """
    logger = logging.getLogger("titans_pretrain")
    close_log()
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
        file = _RankFile(folder.log(rank), encoding="utf-8")
    except OSError as e:
        raise storage_error(e, f"opening {folder.log(rank)}", starting=True) from e
    file.setFormatter(logging.Formatter(_FORMAT))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        handlers.append(_Console(sys.stdout))
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def close_log() -> None:
    """Closes what `open_log` opened."""
    logger = logging.getLogger("titans_pretrain")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


class Progress:
    """The console line. Rates are those since the last line; the first counts from the start.

    `steps`: of the whole run; `step`, `tokens`: where this life starts; `clock`: seconds.
    """

    def __init__(
        self, steps: int, step: int, tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._steps, self._clock = steps, clock
        self._last = (clock(), step, tokens)

    def line(self, step: int, tokens: int, loss: float, lr: float, grad_norm: float) -> str:
        """`loss`: nats a token, over the interval or of the last step; `tokens`: up to `step`."""
        then, last_step, last_tokens = self._last
        now = self._clock()
        self._last = (now, step, tokens)
        seconds = max(now - then, 1e-9)
        rate = (tokens - last_tokens) / seconds
        left = (self._steps - step) * seconds / max(step - last_step, 1)
        width = len(str(self._steps))
        return (
            f"step {step:{width}d}/{self._steps} {100 * step / self._steps:5.1f}%"
            f"  loss {loss:.4f}  ppl {perplexity(loss):.2f}  lr {lr:.3e}  grad {grad_norm:.3f}"
            f"  {rate:,.0f} tok/s  eta {duration(left)}"
        )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def duration(seconds: float) -> str:
    """1:02:03, or 2d 01:02:03."""
    days, rest = divmod(round(seconds), 86_400)
    hours, minutes, left = rest // 3600, rest // 60 % 60, rest % 60
    return (
        f"{days}d {hours:02d}:{minutes:02d}:{left:02d}"
        if days
        else (f"{hours}:{minutes:02d}:{left:02d}")
    )
