"""What the watchdog writes of a rank that is ended: why, who is where, and every thread's stack."""

from __future__ import annotations

import json
import linecache
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
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
_LOOKS_ON = "titans_pretrain.measure.straggler"  # stands between them, where waits are timed
_LAST = 8  # collectives of torch's flight recorder


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
    """The report of this rank.

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
        *(
            []
            if lost
            else [f"waits in:   {_collective() or 'no collective (see the main thread)'}"]
        ),
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
    lines += ["", *_recorded()]
    if lost is not None:
        lines += ["where this rank met it:", *_indented(traceback.format_exception(lost)), ""]
    lines += _stacks()
    return "\n".join(lines) + "\n"


def main_thread_waits_in() -> str:
    """The function in which the main thread waits for other ranks, if it does."""
    frame = _main_frame()
    return frame.f_code.co_name if frame is not None and _waits(frame) else ""


def _at(beat: Beat) -> str:
    waits = f"in {beat.waits_in}" if beat.waits_in else "in no collective"
    return f"{beat.place}, {waits}, no progress for {beat.still:.0f} s"


def _collective() -> str:
    """The same with what it is called on and with whom."""
    frame = _main_frame()
    if frame is None or not _waits(frame):
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


def _main_frame() -> FrameType | None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__") == _LOOKS_ON:
        frame = frame.f_back
    return frame


def _waits(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return module in _WAITING or (module.startswith(_HANDLES) and ".wait(" in line)


def _recorded() -> list[str]:
    """What torch's flight recorder holds that is not done, where it records."""
    recorded = json.loads(cast(Any, c10d)._dump_fr_trace_json(True, True))
    open_ = [e for e in recorded.get("entries", ()) if not e["retired"]]
    lines = [
        f"  number {e['collective_seq_id']}, {e['profiling_name']} of {e['input_sizes']} in group "
        f"{e['process_group'][1]}: {e['state']}"
        for e in open_[-_LAST:]
    ]
    return ["torch's flight recorder, what is not done:", *lines, ""] if lines else []


def _indented(texts: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in "".join(texts).splitlines()]


def _stacks() -> Iterator[str]:
    """Every thread's stack, the main thread's first, the innermost call last."""
    threads = {t.ident: t for t in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)  # writes this
    for ident in sorted(frames, key=lambda i: (i != main, i)):
        thread = threads.get(ident)
        yield f"thread {thread.name if thread else ident}, innermost call last:"
        yield from (line.rstrip() for line in traceback.format_stack(frames[ident]))
        yield ""
