"""What the check does, in order of worth: the cheap and most telling first. Knows no torch.

A group's parts run in processes of their own kind; see child.py for what carries them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

VARIANTS = ("transformer", "lmm", "mac", "mag", "mal")
PRECISIONS = ("fp32", "bf16")
BASELINE = "transformer"
SMALL = tuple(f"{variant} {precision}" for precision in PRECISIONS for variant in VARIANTS)
# The state of each variant is saved in bf16; fp32 has another optimizer in DeepSpeed: one is enough
SAVED = (*(f"{variant} bf16" for variant in VARIANTS), "mac fp32")
TRAINED = tuple(f"170m {variant}" for variant in (BASELINE, "mac", "mag", "mal", "lmm"))
LARGER = (f"340m {BASELINE}", "340m mag")
# part -> parallel.zero; the model is 170m mac. The first is what the others are compared with.
ZERO: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 1, offload": {"stage": 1, "offload": True},
    "stage 2": {"stage": 2},
    "stage 2, offload": {"stage": 2, "offload": True},
    "stage 3": {"stage": 3},
    "stage 3, offload": {"stage": 3, "offload": True},
}
# What DeepSpeed leaves of stages 1 and 2 is freed; of stage 3 it is not.
FREED = tuple(part for part, zero in ZERO.items() if zero["stage"] < 3)
LAYOUTS = ("data", "tensor", "pipeline", "context")  # by which the ranks divide a small model
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send")


@dataclass(frozen=True)
class Group:
    """Parts of one kind. A part that crashes or hangs costs itself alone: the others go on in a
    new process."""

    section: str  # a key of child.MEASURES
    parts: tuple[str, ...]
    needs: str = "engines"  # a key of packages.NEEDS
    on_cpu: bool = False  # on a machine with a GPU, too
    all_ranks: bool = False  # as many ranks as there are GPUs
    # Each part in a process of its own: it takes long and is looked at before (needed_s), leaves
    # its tensors behind, or is a world of another shape.
    alone: bool = False
    least_s: float = 15.0  # a process is not started with less time than this
    most_s: float = 90.0  # of a part, the process' start included: beyond it hangs
    after: str = ""  # a section that left files which this one reads


GROUPS = (
    Group("machine", ("names",), "torch", least_s=0, most_s=40),
    Group("matmul", PRECISIONS, "torch"),
    Group("memory", PRECISIONS, "torch", most_s=90),
    Group("steps", SMALL, "models"),
    Group("reference", tuple(f"{v} fp32" for v in VARIANTS), "models", on_cpu=True),
    Group("collectives", COLLECTIVES, "torch", all_ranks=True),
    Group("train", TRAINED, "models", least_s=30, most_s=120),
    Group("train", LARGER, "models", alone=True, least_s=45, most_s=150),
    Group("save", SAVED, "models"),
    Group("resume", SAVED, after="save"),
    Group("to cpu", SAVED, on_cpu=True, after="save"),
    Group("back", SAVED, after="to cpu"),
    Group("zero", FREED, all_ranks=True, least_s=30, most_s=120),
    Group("zero", tuple(ZERO)[len(FREED) :], all_ranks=True, alone=True, least_s=30, most_s=120),
    Group("layouts", LAYOUTS, all_ranks=True, alone=True, least_s=20),
    Group("memory speed", ("C=16 bf16", "C=64 bf16", "C=16 fp32", "C=64 fp32"), "torch"),
)

# A part whose step is so many times that of another, by FLOPs with recompute (configs/titans-*).
TIMES = {
    f"340m {BASELINE}": (f"170m {BASELINE}", 3.226 * 4 / 3 / 1.110),
    "340m mag": ("170m mag", 4.285 * 4 / 3 / 1.415),
}
STEPS_TAKEN, START_S = 5, 15.0  # of a training part: its steps; what its start takes, about


def processes(groups: Sequence[Group], *, dry: bool) -> Iterator[Group]:
    """The groups as they are started, in their order. Starting a process takes a good part of what
    most parts take, so that they share one where they can. On a CPU all do, but for layouts, each
    of which is a world of its own."""
    for group in groups:
        if group.alone and not (dry and group.section != "layouts"):
            for part in group.parts:
                yield replace(group, parts=(part,))
        else:
            yield group


def needed_s(group: Group, measured: Mapping[str, Mapping[str, Any]], *, dry: bool) -> float:
    """Seconds below which the group is not started: its own guess, or from what has been timed."""
    if dry:
        return 5.0
    least = group.least_s
    for part in group.parts:
        like, times = TIMES.get(part, ("", 0.0))
        timed = measured.get("train", {}).get(like, {}).get("seconds")
        if timed:
            least = START_S + STEPS_TAKEN * times * min(timed)
    return least
