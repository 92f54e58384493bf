"""What to say when memory runs out: what was asked, what is held, where, and what would help.

The remedies are computed for the run at hand: bytes before and after by footprint.py, those first
that cost the least speed.
"""

from __future__ import annotations

import errno
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import psutil
import torch

from titans_pretrain import phases
from titans_pretrain.config import RunConfig
from titans_pretrain.errors import ConfigError, OutOfMemoryError
from titans_pretrain.measure.footprint import held_bytes, working_bytes
from titans_pretrain.model.counts import parameter_count
from titans_pretrain.model.titans import Block
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.world import World
from titans_pretrain.step import TrainStep

SECONDS = 20.0  # for predictions, the other ranks waiting

_WORDS = (  # of errors that torch raises as plain RuntimeErrors
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",  # NCCL's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# What oneDNN says then, and for other reasons: it counts where hardly any memory is left.
_PERHAPS = ("could not create a primitive", "could not create a memory", "could not execute a prim")
_HARDLY = 64 * 2**20  # bytes
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"([\d.]+) (bytes|[KMGT]iB)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a CUDA device, by torch's CPU allocator, or by Python's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    if any(word in str(error) for word in _PERHAPS):
        return host_memory()[0] < _HARDLY
    return any(word in str(error) for word in _WORDS)


@dataclass
class Found:
    """What was so when memory ran out. Bytes; None where it is not known."""

    asked: int | None
    free: int | None = None
    total: int | None = None  # of the device, or of this machine
    held: dict[str, int] = field(default_factory=dict)  # by kind


def explain(
    error: BaseException,
    config: RunConfig,
    world: World | None,
    step: TrainStep | None,
    before: int = 0,
) -> OutOfMemoryError:
    """The error as a person needs it. Clears the frames of `error`: they hold the activations.

    Args:
        before: bytes that this process held before it built anything.
    """
    number, stack = phases.where(error)
    found = look(error, world, step, before)
    rank, device = (world.rank, world.device) if world else (0, "cpu")
    asked = "an allocation" if found.asked is None else size(found.asked)
    at = place(number, stack, error, step)
    lines = [f"rank {rank}: out of memory on {device}, {at}: asked for {asked}"]
    if found.total is not None and found.free is not None:
        lines[0] += f"; {size(found.free)} of {size(found.total)} free"
    lines += [f"    {kind:<38}{size(held):>12}" for kind, held in found.held.items()]
    ranks = world.size if world else 1
    traceback.clear_frames(error.__traceback__)
    remedies = [text for text, _ in cheapest(config, found, ranks, stack, str(device))]
    if not remedies:
        remedies = ["a smaller model, or a machine with more memory"]
    return OutOfMemoryError(
        "\n".join(lines),
        "what a step holds at one time fits into the memory of its device",
        "change one of these, and start again: the run goes on from its last checkpoint. By "
        "prediction, cheapest in speed first:"
        + "".join(f"\n    {n}. {text}" for n, text in enumerate(remedies, 1)),
    )


def place(
    number: int, stack: tuple[str, ...], error: BaseException, step: TrainStep | None = None
) -> str:
    """Where memory ran out, in words, e.g. "step 3, forward of block 2"."""
    names = [name for name in stack if not (name == "backward" and "forward" in stack)]
    words = " in ".join(dict.fromkeys(reversed(names))) or "starting"
    block = _block(error.__traceback__, step)
    if block is not None:
        first, _, rest = words.partition(" in ")
        words = f"{first} of block {block}{' in ' if rest else ''}{rest}"
    return f"step {number}, {words}" if number else words


def _block(trace: TracebackType | None, step: TrainStep | None) -> str | None:
    """The block whose forward `trace` came out of; in backward, one that was computed again."""
    while trace is not None and step is not None:
        frame = trace.tb_frame
        if frame.f_code is Block.forward.__code__:
            block = frame.f_locals.get("self")
            held = (b for piece in step.pieces for b in piece.model.blocks.items())
            return next((number for number, b in held if b is block), None)
        trace = trace.tb_next
    return None


def look(
    error: BaseException, world: World | None, step: TrainStep | None, before: int = 0
) -> Found:
    """Takes the figures from the error's text, from torch and from the system."""
    text = str(error)
    held = {} if step is None else held_bytes(step)
    known = sum(held.values())
    if world is not None and world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        reserved = torch.cuda.memory_reserved(world.device)
        allocated = torch.cuda.memory_allocated(world.device)
        # The text tells how it was at that moment; by now some of it has been given back.
        allocated = _number(rf"{_SIZE} is allocated by PyTorch", text) or allocated
        unused = _number(rf"{_SIZE} is reserved by PyTorch but unallocated", text)
        unused = max(0, reserved - allocated) if unused is None else unused
        free = _number(rf"of which {_SIZE} is free", text) or free
        held["activations and states"] = max(0, allocated - known)
        held["reserved, not in use"] = unused
        held["other processes, CUDA itself"] = max(0, total - free - allocated - unused)
        return Found(_asked(text), free, total, held)
    used = psutil.Process().memory_info().rss
    held["activations and states"] = max(0, used - before - known)
    held["libraries, data"] = min(before, used)
    return Found(_asked(text), *host_memory(), held)


def host_memory() -> tuple[int, int]:
    """(bytes free, of how many): of this machine, or what limits of this process leave of it."""
    process, machine = psutil.Process(), psutil.virtual_memory()
    used = process.memory_info()
    free, total = machine.available, machine.total
    for limit, now in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        most = process.rlimit(limit)[0]
        if most != psutil.RLIM_INFINITY and most - now < free:
            free, total = max(0, most - now), most
    return free, total


def _asked(text: str) -> int | None:
    """Of torch on CUDA, torch on a CPU, NumPy."""
    return _number(rf"(?:[Tt]ried to|Unable to) allocate {_SIZE}", text)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.{1 if count >= 100 * _UNITS[unit] else 2}f} {unit}"
    return f"{count:.0f} bytes"


def cheapest(
    config: RunConfig, found: Found, ranks: int, stack: tuple[str, ...], device: str, most: int = 3
) -> list[tuple[str, int]]:
    """Up to `most` remedies that apply: (what to change and what it saves, bytes saved)."""
    end = time.monotonic() + SECONDS
    chosen: list[tuple[str, int]] = []
    for text, saved in _remedies(config, found, ranks, stack, device.startswith("cuda")):
        if saved > 0:
            chosen.append((text, saved))
        if len(chosen) == most or time.monotonic() > end:
            break
    return chosen


def _remedies(
    config: RunConfig, found: Found, ranks: int, stack: tuple[str, ...], cuda: bool
) -> Iterator[tuple[str, int]]:
    """What could be changed, in the order of what it costs; each worked out when it is asked for.
    What a change does not save by this prediction saves 0."""
    train = config.train
    # What is not built yet: 4 bytes (bf16: 2) a parameter, and 12 of optimizer state.
    parameters = sum(parameter_count(config.model).values())
    optimizer = found.held.get("optimizer state", 12 * parameters // ranks)
    weights = found.held.get("parameters", (2 if train.precision == "bf16" else 4) * parameters)
    working = any(name in ("forward", "backward") for name in stack)
    training = "validation" not in stack
    unused = found.held.get("reserved, not in use", 0)
    # `train` sets it; not where the environment says something else.
    set_by_user = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")  # its former name
    expands = "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", set_by_user)
    if found.asked is not None and unused > found.asked and not expands:
        yield (
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment: "
            f"{size(unused)} are reserved in pieces that do not fit; costs no speed",
            unused,
        )
    rest = found.held.get("activations and states", 0)
    known = predicted(config, training) if working else 0
    # Where not even the prediction finds memory: what had been made by then, and what was asked.
    now = rest + (found.asked or 0) if known is None else known

    def changed(key: str, value: object, factor: float) -> int:
        """Bytes that the step works with after a change of `train`; without prediction, `factor`
        times those of now."""
        after = None
        if known is not None:
            inner = train.model_copy(update={key: value})
            after = predicted(config.model_copy(update={"train": inner}), training)
        return int(now * factor) if after is None else after

    if "checkpoint" in stack and config.checkpoint.mode == "async":
        yield (
            f"checkpoint.mode=sync: no copy in host memory ({size(optimizer)}); training waits for "
            "the disk",
            optimizer,
        )
    if cuda and train.precision == "fp32":
        yield from _bf16(weights, now, changed, "faster where the device has bf16 units")
    if cuda and _can_share(config, 2 * ranks):
        yield (
            f"{2 * ranks} ranks instead of {ranks}: optimizer state {size(optimizer)} -> "
            f"{size(optimizer / 2)} each (ZeRO-1); same global batch",
            optimizer // 2,
        )
    if working and train.micro_batch > 1:
        rows = _fitting_rows(train.micro_batch, rest + (found.free or 0), now)
        after = now * rows // train.micro_batch
        yield (
            f"train.micro_batch={rows} (now {train.micro_batch}): activations about {size(now)} -> "
            f"{size(after)}; same global batch, smaller matrix products",
            now - after,
        )
    if working and training and train.recompute == "none":
        after = changed("recompute", "blocks", 1 / config.model.blocks)
        yield (
            f"train.recompute=blocks: activations about {size(now)} -> {size(after)}; "
            "a third more computation",
            now - after,
        )
    if not cuda and train.precision == "fp32":
        yield from _bf16(weights, now, changed, "slower on CPUs without bf16 units")
    tokens, align = config.data.sequence_length, config.model.alignment
    if working and tokens // 2 % align == 0 and tokens // 2 >= align:
        yield (
            f"data.sequence_length={tokens // 2} (now {tokens}): activations about {size(now)} -> "
            f"{size(now / 2)}; shorter documents and fewer tokens a step",
            now // 2,
        )
    blocks = config.model.blocks
    if blocks > 1:
        saved = (weights + found.held.get("gradients", 0) + optimizer + now) // 2
        yield (
            f"model.blocks={blocks // 2} (now {blocks}), or a smaller model.width: about "
            f"{size(saved)} less; another model",
            saved,
        )


def _bf16(
    weights: int, now: int, changed: Callable[[str, object, float], int], cost: str
) -> Iterator[tuple[str, int]]:
    text, after = f"weights {size(weights)} -> {size(weights / 2)}", 0
    if now:
        after = changed("precision", "bf16", 0.5)
        text = f"activations about {size(now)} -> {size(after)}, {text}"
    yield f"train.precision=bf16: {text}; {cost}", now - after + weights // 2


def predicted(config: RunConfig, training: bool) -> int | None:
    """`working_bytes`, or None where not even the prediction finds memory."""
    try:
        return working_bytes(config, training=training)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        return None


def _fitting_rows(rows: int, room: int, now: int) -> int:
    """The largest part of a micro-batch of `rows` that works within `room`, by the prediction."""
    for fewer in range(rows // 2, 0, -1):
        if rows % fewer == 0 and (now * fewer // rows <= room or fewer == 1):
            return fewer
    return 1


def _can_share(config: RunConfig, ranks: int) -> bool:
    try:
        plan_layout(config, ranks)
    except ConfigError:
        return False
    return True
