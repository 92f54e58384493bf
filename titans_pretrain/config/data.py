"""The section `data`: sources and their mix, validation sets, cache."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from titans_pretrain.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section


class SetConfig(Section):
    """A prepared dataset: the folder that `titans-pretrain prepare` wrote."""

    path: str


class SourceConfig(SetConfig):
    # Share in the mix, relative to the other sources': a number, or points [sample number, weight]
    # with straight lines between them, constant beyond the first and the last.
    weight: float | list[tuple[int, float]] = 1.0
    # Read tars of texts as they are, weaker in several ways (data/streaming.py): `path` is a folder
    # of .tar files, or URLs with braces; `tokenizer` a .model file, bytes or integers:VOCAB.
    stream: bool = False
    tokenizer: str | None = None
    virtual_workers: Positive = 64  # of a streamed source; data-parallel ranks divide them

    @model_validator(mode="after")
    def _streamed(self) -> SourceConfig:
        if self.stream and self.tokenizer is None:
            raise ValueError(
                f"a source with stream: true and no tokenizer ({self.path}); texts are tokenized "
                "as they come; name a .model file as its tokenizer"
            )
        if not self.stream and self.tokenizer is not None:
            raise ValueError(
                f"a source with a tokenizer and no stream: true ({self.path}); a prepared folder "
                "holds its tokenizer; leave it out, or set stream: true"
            )
        return self

    @property
    def points(self) -> list[tuple[int, float]]:
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


def weight_at(points: Sequence[tuple[int, float]], sample: int) -> float:
    """The weight at a sample number."""
    for (start, low), (stop, high) in itertools.pairwise(points):
        if start <= sample < stop:
            return low + (sample - start) / (stop - start) * (high - low)
    return points[0][1] if sample < points[0][0] else points[-1][1]


class CacheConfig(Section):
    """Shards of sources behind URLs, kept on a disk of each node and shared by its processes."""

    folder: str | None = None  # default: $TMPDIR/titans-pretrain-UID, else ~/.cache/titans-pretrain
    gib: PositiveFloat = 50.0  # GiB of shards kept; at least two windows of 16 shards a source
    retries: NonNegative = 5  # of a fetch that failed
    timeout: PositiveFloat = 60.0  # seconds without a byte end an attempt
    backoff: PositiveFloat = 1.0  # seconds before the first retry, doubled for each later one


class DataConfig(Section):
    sources: dict[str, SourceConfig] = Field(min_length=1, max_length=256)
    # Sets that validation reads; default: the validation split of each source, under its name.
    validation: dict[str, SetConfig] = Field(default={}, max_length=256)
    sequence_length: Positive = 4096
    seed: int = 0
    workers: NonNegative = 1  # loader processes of each rank
    cache: CacheConfig = CacheConfig()
    # What stays missing, cut or damaged: stop, or leave it out and train on other rows in its place
    # (validation stops in any case).
    on_bad: Literal["stop", "quarantine"] = "stop"
    max_bad: Fraction = 0.01  # quarantine: a larger share of a source's members stops the run
    allow_changed: bool = False  # resume although sources, tokenizer or sequence length changed

    @field_validator("sources", "validation", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        for name, entry in value.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", str(name)):
                raise ValueError(
                    f"data.{info.field_name}: the name {name!r}; names of metrics are made of it: "
                    "letters, digits, _ . and -, 64 at most; choose another name"
                )
            if info.field_name == "sources" and isinstance(entry, dict) and "weight" in entry:
                _check_weight(f"data.sources.{name}.weight", entry["weight"])
        # The order of names in a file is no part of the mix.
        return {name: value[name] for name in sorted(value, key=str)}

    @model_validator(mode="after")
    def _mix(self) -> DataConfig:
        for kind, sets in (("sources", self.sources), ("validation", self.validation)):
            folders: dict[str, str] = {}
            for name, one in sets.items():
                other = folders.setdefault(str(Path(one.path).resolve()), name)
                if other != name:
                    raise ValueError(
                        f"data.{kind}.{other} and data.{kind}.{name} are one folder, {one.path}; "
                        "each has a folder of its own; leave one out"
                        + (" and give the other both weights" if kind == "sources" else "")
                    )
        for name, source in self.sources.items():
            if source.stream and len(self.sources) > 1:
                raise ValueError(
                    f"data.sources.{name}.stream=true among {len(self.sources)} sources; a "
                    "streamed source cannot be mixed; prepare it (titans-pretrain prepare)"
                )
            if source.stream and self.on_bad == "quarantine":
                raise ValueError(
                    f"data.on_bad=quarantine, data.sources.{name}.stream=true; only prepared "
                    "sources know what a shard should hold; prepare it, or leave on_bad out"
                )
        edges = sorted({n for source in self.sources.values() for n, _ in source.points})
        for n in edges:
            if not any(weight_at(source.points, n) for source in self.sources.values()):
                raise ValueError(
                    f"data.sources: at sample {n} every weight is 0; at any time some source is "
                    "read; give one of them a weight above 0 there"
                )
        return self


def _check_weight(where: str, weight: Any) -> None:
    """Raises ValueError (found; rule; remedy) for what is no weight."""
    rule = "a weight is a number from 0 to 1e9, or a list of points [sample number, weight]"
    points = weight if isinstance(weight, list) else [[0, weight]]
    if not points or not all(isinstance(p, list | tuple) and len(p) == 2 for p in points):
        raise ValueError(f"{where}={weight!r}; {rule}; e.g. [[0, 0.3], [1000000, 0.5]]")
    for n, w in points:
        # Text that is a number (YAML reads 1e-3 as text) will do; NaN compares with nothing.
        with contextlib.suppress(ValueError):
            w = float(w) if isinstance(w, str) else w
        if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w <= 1e9:
            raise ValueError(f"{where}={weight!r}: {w!r}; {rule}; change {where}")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 1 << 40:
            raise ValueError(
                f"{where}={weight!r}: {n!r}; sample numbers are whole, from 0 to 2^40; "
                f"change {where}"
            )
    numbers = [n for n, _ in points]
    if sorted(set(numbers)) != numbers:
        raise ValueError(
            f"{where}={weight!r}; sample numbers of the points increase; put them in order, each "
            "once (a jump is two points one sample apart)"
        )
