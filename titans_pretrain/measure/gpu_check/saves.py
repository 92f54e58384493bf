"""Repeated, saved and resumed, on the device and across to the CPU and back, to the bit.

    save     on the device: 9 steps, saved after 3, 6 and 9; 6 of them once more, anew
    resume   on the device, in a new process: from the save after 3 to 6
    to cpu   on the CPU: from the same save, saved again as it was loaded; to 6, saved
    back     on the device: from the CPU's save after 6, saved again as it was loaded; to 9

"contents" are sha256 by step over weights, moments, random numbers and the position in the data.
Where two equal runs on the device differ, both are done again with deterministic algorithms alone,
as training does (train.deterministic); "lacking" is what has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titans_pretrain.config import RunConfig
from titans_pretrain.measure.gpu_check.child import Task
from titans_pretrain.measure.gpu_check.plain import PlainStep
from titans_pretrain.measure.gpu_check.small import make_step, run_config, train

if TYPE_CHECKING:
    from titans_pretrain.parallel.world import World
    from titans_pretrain.step import TrainStep

STRIDE = 3  # steps between two saves
_MARK = "deterministic"  # a file beside the saves that were made so


def save(task: Task, part: str) -> dict[str, Any]:
    first, again = _straight(task, part, "first", 9), _straight(task, part, "again", 6)
    found = {**first, "again": again, "same": _same(first, again)}
    if found["same"]:
        return found
    try:
        first = _straight(task, part, "deterministic", 9, steady=True)
        again = _straight(task, part, "deterministic again", 6, steady=True)
    except RuntimeError as e:
        lacks = re.search(r"(\S+) does not have a deterministic implementation", str(e))
        if lacks is None:
            raise
        return {**found, "deterministic": {**found, "lacking": [lacks[1]]}}
    (_folder(task, part) / _MARK).touch()
    same = _same(first, again)
    return {**found, "deterministic": {**first, "again": again, "same": same, "lacking": []}}


def _steady(on: bool) -> None:
    """Only algorithms that give the same bits each time, or any; whatever the world has set."""
    torch.use_deterministic_algorithms(on)
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def _same(first: dict[str, Any], again: dict[str, Any]) -> bool:
    return all(first["contents"][step] == content for step, content in again["contents"].items())


def resume(task: Task, part: str) -> dict[str, Any]:
    return _go_on(task, part, _saved_on_device(task, part), "resumed", 3, 6)


def to_cpu(task: Task, part: str) -> dict[str, Any]:
    return _go_on(task, part, _saved_on_device(task, part), "on the CPU", 3, 6)


def back(task: Task, part: str) -> dict[str, Any]:
    return _go_on(task, part, "on the CPU", "back", 6, 9)


def _folder(task: Task, part: str) -> Path:
    return Path(task.folder) / part.replace(" ", "-")


def _saved_on_device(task: Task, part: str) -> str:
    return "deterministic" if (_folder(task, part) / _MARK).exists() else "first"


def _straight(
    task: Task, part: str, name: str, last: int, *, steady: bool = False
) -> dict[str, Any]:
    """Steps 1 to `last` without a stop; without engines nothing is written but the content."""
    config = run_config(task, *part.split())
    done: dict[str, Any] = {"losses": [], "norms": [], "contents": {}}
    go_on, content = _kept(task, config, _folder(task, part) / name)
    _steady(steady)
    for number in range(STRIDE, last + 1, STRIDE):
        _extend(done, train(go_on, config, number - STRIDE + 1, number))
        done["contents"][str(number)] = content(number)
    return done


def _kept(task: Task, config: RunConfig, folder: Path) -> tuple[Any, Callable[[int], str]]:
    """(a step, what saves its state and tells the content)."""
    if not task.engines:
        plain = PlainStep(config, torch.device(task.device))
        return plain, lambda number: plain.content()
    world, step = make_step(task, config)
    return step, lambda number: _write(folder, config, world, step, number)


def _extend(done: dict[str, Any], more: dict[str, list[float]]) -> None:
    for what, values in more.items():
        done[what] += values


def _write(folder: Path, config: RunConfig, world: World, step: TrainStep, done: int) -> str:
    from titans_pretrain.run import checkpoint
    from titans_pretrain.run.saver import Saver

    state = {"step": done, "life": 1, "data": {"next_step": done + 1}}
    state["config"] = config.model_dump(mode="json")
    rng = {"rng/cpu": torch.get_rng_state()}
    with Saver(folder, config.checkpoint, world, lambda: None, lambda saved: None) as saver:
        saver.save(state, step.optimizer.fragments(), rng)
        saver.wait()
    return checkpoint.content_sha256(checkpoint.folder_of(folder, done))


def _go_on(task: Task, part: str, source: str, name: str, first: int, last: int) -> dict[str, Any]:
    """Loads what `source` saved after `first`, saves it again, goes on to `last` and saves."""
    from titans_pretrain.run import checkpoint

    config = run_config(task, *part.split())
    world, step = make_step(task, config)
    _steady((_folder(task, part) / _MARK).exists())
    path = checkpoint.folder_of(_folder(task, part) / source, first)
    if not path.exists():
        return {"skipped": f"'{source}' has saved nothing"}
    found = checkpoint.Found(path, checkpoint.verify(path, world))
    rng = {"rng/cpu": torch.get_rng_state()}
    model = config.model.model_dump(mode="json")
    checkpoint.load(found, model, step.optimizer.fragments(), rng)
    torch.set_rng_state(rng["rng/cpu"])
    step.optimizer.weights_loaded(first)
    folder = _folder(task, part) / name
    loaded = _write(folder, config, world, step, first)
    done = train(step, config, first + 1, last)
    contents = {str(first): loaded, str(last): _write(folder, config, world, step, last)}
    return {**done, "contents": contents, "from": checkpoint.content_sha256(path)}
