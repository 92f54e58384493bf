"""The runs of a sweep: each combination of values, with a folder's name made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from titans_pretrain.errors import ConfigError

MOST = 200  # jobs of one submission, unless the user says otherwise
_LONGEST = 200  # characters of a folder's name; file systems take 255


@dataclass(frozen=True)
class Member:
    """One run of a sweep; without --array the only one, its name empty."""

    name: str  # e.g. "optim.lr=3e-4_train.seed=1", below the config's folder
    overrides: tuple[str, ...]  # e.g. ("optim.lr=3e-4", "train.seed=1")


def members(arrays: Sequence[str], overrides: Sequence[str], most: int = MOST) -> list[Member]:
    """Every combination of `arrays` ("a.b=c,d"), the last one's values changing first.

    Args:
        overrides: set for all runs; a key is in one of the two.
        most: combinations.
    Raises ConfigError.
    """
    taken = {text.partition("=")[0] for text in overrides}
    choices = []
    for text in arrays:
        key, _, values = text.partition("=")
        if key == "folder":
            raise ConfigError(
                f"--array {text}",
                "each run's folder follows from its values",
                "set folder=, below which they all lie",
            )
        if key in taken:
            raise ConfigError(
                f"--array {text}: {key} is given twice",
                "a key has one list of values, or one value for all runs",
                f"name {key} once",
            )
        taken.add(key)
        choices.append([f"{key}={value}" for value in _values(text, values)])
    found = [Member(_name(c), c) for c in itertools.product(*choices)]
    names = [m.name for m in found]
    if double := next((n for n in names if names.count(n) > 1), None):
        raise ConfigError(
            f"--array: two runs are named {double}",
            "each combination has values of its own, and a folder named by them",
            "leave one of the equal values out",
        )
    if len(found) > most:
        raise ConfigError(
            f"--array: {len(found)} combinations, at most {most}",
            "a sweep is no larger than its user means",
            f"list fewer values, or allow them: --array-most {len(found)}",
        )
    return found


def _values(text: str, values: str) -> list[str]:
    found = list(_split(values))
    if any(not value.strip() for value in found):
        raise ConfigError(
            f"--array {text}: an empty value",
            "a sweep is written a.b=c,d with a value between any two commas",
            "e.g. --array optim.lr=3e-4,1e-3 --array data.seed=1,2",
        )
    return found


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets and quotes: values are YAML."""
    depth, quote, begin = 0, "", 0
    for at, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in ")}]":
            depth -= 1
        elif sign == "," and depth == 0:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]


def _name(chosen: Sequence[str]) -> str:
    name = "_".join(re.sub(r"[^A-Za-z0-9._+=-]+", "-", text).strip("-") for text in chosen)
    if len(name) > _LONGEST:
        raise ConfigError(
            f"--array: a run named {name}",
            f"a run's folder is named by its values, in at most {_LONGEST} characters",
            "sweep over shorter values, or fewer keys at a time",
        )
    return name
