"""Every legal layout with what it holds and takes, ranked; and what would make others fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from titans_pretrain.config import HardwareConfig, RunConfig
from titans_pretrain.estimate.held import Held, most
from titans_pretrain.estimate.options import Choice, legal
from titans_pretrain.estimate.pace import Pace, pace
from titans_pretrain.estimate.portion import ends
from titans_pretrain.parallel.layout import Layout

GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A layout, with the config that it is of."""

    choice: Choice  # what its config sets
    config: RunConfig
    layout: Layout
    held: Held
    pace: Pace
    room: float  # bytes of a GPU that tensors may take

    @property
    def fits(self) -> bool:
        return self.held.device <= self.room

    @property
    def over(self) -> float:
        """Bytes more than there is room for; negative: what is left."""
        return self.held.device - self.room

    def days(self, tokens: float) -> float:
        return tokens / self.pace.tokens_per_s / 86400

    def gpu_hours(self, tokens: float) -> float:
        return 24 * self.days(tokens) * self.layout.world_size


def room(hardware: HardwareConfig) -> float:
    """Bytes of a GPU that tensors may take."""
    return (hardware.memory_gib.value - hardware.reserved_gib.value) * GIB


def judge(config: RunConfig, layout: Layout, hardware: HardwareConfig) -> Candidate:
    """The layout that a config asks for."""
    p, train = config.parallel, config.train
    choice: Choice = {
        "parallel.tensor": p.tensor,
        "parallel.pipeline": p.pipeline,
        "parallel.context": p.context,
        "parallel.sequence": p.sequence,
        "parallel.interleave": p.interleave,
        "parallel.order": p.order,
        "parallel.zero.stage": p.zero.stage,
        "parallel.zero.offload": p.zero.offload,
        "train.micro_batch": train.micro_batch,
        "train.recompute": train.recompute,
    }
    return _candidate(choice, config, layout, hardware)


def _candidate(
    choice: Choice, config: RunConfig, layout: Layout, hardware: HardwareConfig
) -> Candidate:
    found = ends(config, layout)
    return Candidate(choice, config, layout, most(found), pace(found, hardware), room(hardware))


def candidates(
    config: RunConfig, ranks: int, hardware: HardwareConfig, *, offload: bool = False
) -> list[Candidate]:
    """All that are legal."""
    found = legal(config, ranks, offload)
    return [_candidate(*one, hardware) for one in found]


def ranked(found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that fit, the fastest first; of equally fast ones those that hold least."""
    return tuple(
        sorted(
            (c for c in found if c.fits),
            key=lambda c: (round(c.pace.seconds, 4), c.held.device),
        )
    )


def nearest(found: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that do not fit, by how much they lack."""
    return tuple(sorted((c for c in found if not c.fits), key=lambda c: c.over))


def cheapest_change(candidate: Candidate, fitting: Sequence[Candidate]) -> Candidate | None:
    """Of those that fit the one that differs in fewest values; of these the fastest."""

    def distance(other: Candidate) -> tuple[int, float]:
        return len(difference(candidate, other)), other.pace.seconds

    return min(fitting, key=distance, default=None)


def difference(a: Candidate, b: Candidate) -> Choice:
    """The values of `b` that are others in `a`."""
    return {key: value for key, value in b.choice.items() if a.choice[key] != value}


def arguments(choice: Choice) -> str:
    """As they stand on a command line."""
    return " ".join(f"{key}={_yaml(value)}" for key, value in choice.items())


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
