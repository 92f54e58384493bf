"""What the watchdog writes of a rank that is ended: why, who is where, and every thread's stack."""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from titans_pretrain.run.roll import LEFT, Beat, Seen

if TYPE_CHECKING:
    from titans_pretrain.data.batch import Batch

# Python's last frame of a thread that waits for other ranks: one of these, or a `.wait()` there.
_WAITING = ("torch.distributed.distributed_c10d", "torch.distributed.rendezvous")
_HANDLES = ("torch.distributed.", "deepspeed.", "megatron.", "titans_pretrain.parallel.")
_NONE = "no collective that Python knows of (see the main thread, torch's flight recorder)"
_LOOKS_ON = "titans_pretrain.measure.straggler"  # stands between them, where waits are timed
# torch's flight recorders, on unless TORCH_FR_BUFFER_SIZE=0: NCCL has its own (none without CUDA).
_RECORDERS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
_FIRST = 8  # collectives of theirs


def words(seen: Seen) -> str:
    """Where a rank is that others wait for."""
    beat = seen.beat
    who = f"rank {beat.rank} on {beat.host} (pid {beat.pid})"
    if seen.failed:
        return f"{who} left with {beat.state}; last in {beat.place}"
    if beat.state == LEFT:
        return f"{who} is done and has left"
    if not beat.pid:
        return f"{who} has never been heard of, for {seen.silent:.0f} s"
    return f"{who} has not been heard of for {seen.silent:.0f} s; last in {beat.place}"


def behind(seen: Sequence[Seen], silent: float) -> list[str]:
    """Those that the others wait for, as far as it can be told; nothing if all stand alike.

    Ranks that give no sign of life; else those in the earliest step, of these the ones that are in
    no collective while others are, and of these the ones that have come through fewest phases.
    """
    here = [s for s in seen if s.beat.state != LEFT]
    lost = [s for s in here if s.failed or s.silent >= silent]
    if lost:
        return [words(s) for s in lost]
    late = _least(here, lambda s: s.beat.step)
    late = _least(late, lambda s: bool(s.beat.waits_in))
    late = _least(late, lambda s: s.beat.pulse)
    return [
        f"rank {s.beat.rank} on {s.beat.host} (pid {s.beat.pid}) is behind: {_at(s.beat)}"
        for s in (late if len(late) < len(here) else ())
    ]


def _least(seen: list[Seen], key: Callable[[Seen], int]) -> list[Seen]:
    least = min(map(key, seen), default=0)
    return [s for s in seen if key(s) == least]


def describe(
    mine: Beat,
    size: int,
    why: str,
    seen: Sequence[Seen],
    silent: float,
    batches: Sequence[Batch],
    lost: BaseException | None = None,
) -> str:
    """The report of this rank, but for what `recorded` adds.

    Args:
        silent: seconds that make a rank one that is not heard of.
        lost: what this rank met as another was gone; None: its watchdog ends it.
    """
    job = os.environ.get("SLURM_JOB_ID")
    who = f"rank {mine.rank} of {size} on {mine.host}, pid {mine.pid}"
    ended = "ended by its watchdog with exit code 77"
    if lost is not None:
        ended = "left with exit code 76: another rank is gone"
    lines = [
        f"{who}{f', job {job}' if job else ''}, {ended}",
        f"time:       {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}",
        f"why:        {why}",
        f"this rank:  {mine.place}; no progress for {mine.still:.0f} s",
        *([] if lost else [f"waits in:   {_collective() or _NONE}"]),
        f"samples:    {_samples(batches)}",
    ]
    if seen and lost is None:
        waited_for = behind(seen, silent) or ["none: all stand alike, and wait for each other"]
        lines += ["", "waited for:", *(f"  {line}" for line in waited_for)]
    if seen:
        lines += ["", "ranks, as last heard:"]
        lines += [
            f"  rank {s.beat.rank} on {s.beat.host} (pid {s.beat.pid}), {s.silent:.0f} s ago: "
            f"{s.beat.state or _at(s.beat)}"
            for s in seen
        ]
    lines += [""]
    if lost is not None:
        lines += ["where this rank met it:", *_indented(traceback.format_exception(lost)), ""]
    return "\n".join(lines) + "\n" + stacks()


def recorded() -> str:
    """What torch's flight recorders hold that is not done, the earliest first. NCCL's asks the CUDA
    driver, which may be what hangs: so this comes last."""
    lines: dict[str, None] = {}  # each once
    for name in _RECORDERS:
        dump = getattr(c10d, name, None)
        entries = json.loads(dump(True, True)).get("entries", ()) if dump is not None else ()
        for e in entries:
            if not e["retired"]:
                number = e["p2p_seq_id" if e["is_p2p"] else "collective_seq_id"]
                lines[
                    f"  number {number}, {e['profiling_name']} of {e['input_sizes']} in group "
                    f"{e['process_group'][1]}: {e['state']}"
                ] = None
    if not lines:
        return ""
    shown = list(lines)[:_FIRST]
    more = [f"  and {len(lines) - _FIRST} more"] if len(lines) > _FIRST else []
    head = "torch's flight recorder, what is not done (of a group the first is waited for):"
    return "\n".join([head, *shown, *more]) + "\n"


def waits_in() -> str:
    """The function in which training waits for other ranks, if Python knows of it. (On a GPU a
    collective only joins the device's queue, and the main thread waits for that: see `recorded`.)
    """
    frame = _waiting_frame()
    return frame.f_code.co_name if frame is not None else ""


def _at(beat: Beat) -> str:
    waits = f"in {beat.waits_in}" if beat.waits_in else "in no collective"
    return f"{beat.place}, {waits}, no progress for {beat.still:.0f} s"


def _collective() -> str:
    """The same with what it is called on and with whom."""
    frame = _waiting_frame()
    if frame is None:
        return ""
    named = frame.f_locals
    tensor = next((v for v in named.values() if isinstance(v, torch.Tensor)), None)
    what = frame.f_code.co_name
    if tensor is not None:
        what += f" of {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if "group" in named and dist.is_initialized():
        group = cast(Any, named["group"] or dist.group.WORLD)
        ranks = dist.get_process_group_ranks(group)
        what += f" in group {group.group_desc or group.group_name} of ranks {_ranks(ranks)}"
    return what


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:16]))
    return f"{some} and {len(ranks) - 16} more" if len(ranks) > 16 else some


def _samples(batches: Sequence[Batch]) -> str:
    if not batches:
        return "no step has begun"
    return "; ".join(" ".join(map(str, b.samples.tolist())) for b in batches)


def _waiting_frame() -> FrameType | None:
    """Of the main thread, or of one that Python has not started: on a GPU autograd runs the
    backward in threads of its own, for which the main thread waits. (Those that Python has started
    save, load or watch.)"""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    started = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)}
    for ident in sorted(frames, key=lambda ident: ident != main):
        frame = frames[ident] if ident == main or ident not in started else None
        while frame is not None and frame.f_globals.get("__name__") == _LOOKS_ON:
            frame = frame.f_back
        if frame is not None and _waits(frame):
            return frame
    return None


def _waits(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return module in _WAITING or (module.startswith(_HANDLES) and ".wait(" in line)


def _indented(texts: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in "".join(texts).splitlines()]


def stacks() -> str:
    """Every thread's stack, the main thread's first, the innermost call last."""
    threads = {t.ident: t for t in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)  # writes this
    lines = []
    for ident in sorted(frames, key=lambda i: (i != main, i)):
        thread = threads.get(ident)
        lines.append(f"thread {thread.name if thread else ident}, innermost call last:")
        lines += (line.rstrip() for line in traceback.format_stack(frames[ident]))
        lines.append("")
    return "\n".join(lines) + "\n"
