"""The few numbers that resume a stream of batches, and what must not change meanwhile."""

from __future__ import annotations

from typing import Any

from titans_pretrain.errors import DataError

VERSION = 1

State = dict[str, Any]


def differences(saved: State, now: State, allowed: bool) -> list[str]:
    """In words, what fixes the order of the samples and is not as it was.

    Raises DataError for a difference that is not `allowed`, and for a state of another version.
    """
    if saved.get("version") != VERSION:
        raise DataError(
            f"stream state of version {saved.get('version')}",
            f"this program resumes version {VERSION}",
            "resume with the program that wrote the checkpoint",
        )
    before, after = _facts(saved), _facts(now)
    changes = [
        f"{key}: was {_short(before.get(key))}, is {_short(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if changes and not allowed:
        raise DataError(
            f"resuming with changed data: {'; '.join(changes)}",
            "a run goes on with the data order it began with",
            "restore the data or the config; or set data.allow_changed=true to go on at the "
            "same sample number of the new order",
        )
    return changes


def with_skip(skips: list[list[int]], start: int, stop: int) -> list[list[int]]:
    """The intervals of sample numbers with [start, stop) among them; those that touch are one."""
    merged: list[list[int]] = []
    for a, b in sorted([*skips, [start, stop]]):
        if merged and a <= merged[-1][1]:
            merged[-1] = [merged[-1][0], max(b, merged[-1][1])]
        else:
            merged.append([a, b])
    return merged


def skipped(state: State) -> dict[str, float]:
    """How many samples were left out up to here, as a figure; none, if none were."""
    past = sum(max(0, min(b, state["next_sample"]) - a) for a, b in state["skips"])
    return {"data/skipped": past} if past else {}


def _facts(state: State) -> dict[str, Any]:
    """What fixes the order of the samples: name -> value."""
    facts = {key: state[key] for key in ("tokenizer", "seed", "seq_len", "align")}
    if "streamed" in state:
        return {"streamed": state["streamed"], "virtual_workers": state["virtual_workers"], **facts}
    if "manifest" in state:
        return {"manifest": state["manifest"], **facts}
    sources = {
        f"sources.{name}.{key}": value
        for name, source in state["sources"].items()
        for key, value in source.items()
    }
    return {**sources, **facts}


def _short(value: object) -> str:
    if value is None:
        return "absent"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else str(value)
