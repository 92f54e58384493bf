"""What `verify` found: each difference beside what rounding alone does, the tables, the verdict.

A difference counts where it is beyond ten times what rounding does and beyond a least tolerance. No
tolerance grows beyond a most: where rounding does so much that a difference beyond that may still
be rounding, nothing is known, and that is no agreement.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from titans_pretrain.verify_plain import Step

# Tolerances, the least and the most, each relative.
GRADIENT, UPDATE, LOSS = (1e-5, 1e-2), (1e-3, 1e-1), (1e-5, 1e-3)
BEYOND = 10.0
SHOWN = 10  # rows, where more are not asked for


class Verdict(IntEnum):
    AGREES = 0
    UNKNOWN = 1
    DIFFERS = 2


_WORDS = {
    Verdict.AGREES: "",
    Verdict.UNKNOWN: "  cannot be judged",
    Verdict.DIFFERS: "  DIFFERS",
}


def tolerance(rounding: float, tolerances: tuple[float, float]) -> float:
    """What a difference may be where rounding alone makes so much of it."""
    least, most = tolerances
    return min(max(least, BEYOND * rounding), most)


@dataclass(frozen=True)
class Gap:
    """One relative difference, and what rounding alone makes of the same."""

    found: float
    rounding: float
    tolerances: tuple[float, float]  # the least, the most

    @property
    def tolerance(self) -> float:
        return tolerance(self.rounding, self.tolerances)

    @property
    def size(self) -> float:
        """In tolerances; NaN is the largest of all."""
        return math.inf if math.isnan(self.found) else self.found / self.tolerance

    @property
    def verdict(self) -> Verdict:
        if self.size <= 1:
            return Verdict.AGREES
        known = not self.found <= BEYOND * self.rounding
        return Verdict.DIFFERS if known else Verdict.UNKNOWN


@dataclass(frozen=True)
class Difference:
    """Of one parameter: relative to its gradient's largest entry, and to the way it has gone."""

    name: str
    gradient: Gap
    update: Gap
    note: str = ""  # of which copy, or what is the matter
    silent: bool = False  # its gradient is 0 on both sides

    @property
    def label(self) -> str:
        return f"{self.name}, {self.note}" if self.note else self.name

    @property
    def verdict(self) -> Verdict:
        return max(self.gradient.verdict, self.update.verdict)

    @property
    def order(self) -> tuple[Verdict, float]:
        """The worst has the largest: what differs, then what nothing is known of, each by how far
        it is beyond its own tolerance."""
        return self.verdict, max(self.gradient.size, self.update.size)


@dataclass(frozen=True)
class Compared:
    """The layout's steps beside the plain process's; `parameters` in any order, `copies` (the worst
    of each parameter that several ranks hold) likewise."""

    layout: Sequence[Step]
    plain: Sequence[Step]
    shaken: Sequence[Step]  # plain, from weights changed by as much as rounding does
    parameters: Sequence[Difference]
    copies: Sequence[Difference] = ()

    @property
    def worst_first(self) -> list[Difference]:
        return sorted([*self.parameters, *self.copies], key=lambda d: d.order, reverse=True)

    @property
    def step_verdicts(self) -> list[Verdict]:
        """Of each step's loss and gradient norm."""

        def gap(found: float, plain: float, shaken: float) -> Gap:
            by = abs(plain) or 1.0
            return Gap(abs(found - plain) / by, abs(shaken - plain) / by, LOSS)

        return [
            max(
                gap(a.loss, b.loss, c.loss).verdict,
                gap(a.grad_norm, b.grad_norm, c.grad_norm).verdict,
            )
            for a, b, c in zip(self.layout, self.plain, self.shaken, strict=True)
        ]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs, and nothing is left unknown."""
        found = [*self.step_verdicts, *(d.verdict for d in self.worst_first)]
        return max(found) == Verdict.AGREES


def report(head: str, changed: Sequence[str], found: Compared, *, everything: bool) -> str:
    """The tables, and the verdict.

    Args:
        head: which layout of what.
        changed: what is verified otherwise than the config has it.
        everything: list all parameters, not those alone that do not agree, and at least ten.
    """
    lines = [head]
    if changed:
        told = f"Otherwise than the config: {', '.join(changed)}."
        lines += textwrap.wrap(told, 100, subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", *_steps(found), "", *_parameters(found, everything), "", _verdict(found)]
    return "\n".join(lines)


def _steps(found: Compared) -> list[str]:
    lines = [f"  {'step':>4} {'loss':>12} {'plain':>12} {'gradient norm':>14} {'plain':>12}"]
    rows = zip(found.layout, found.plain, found.step_verdicts, strict=True)
    for number, (a, b, verdict) in enumerate(rows, 1):
        lines.append(
            f"  {number:>4} {a.loss:>12.7f} {b.loss:>12.7f} "
            f"{a.grad_norm:>14.7f} {b.grad_norm:>12.7f}{_WORDS[verdict]}"
        )
    return lines


def _parameters(found: Compared, everything: bool) -> list[str]:
    worst = found.worst_first
    bad = sum(d.verdict != Verdict.AGREES for d in worst)
    shown = worst if everything else worst[: max(bad, SHOWN)]
    wide = max(len(d.label) for d in shown)
    head = "".join(f" {what:>10}" for what in ("gradient", "rounding", "update", "rounding"))
    lines = [f"  {'parameter':<{wide}}{head}"]
    for d in shown:
        gaps = (d.gradient.found, d.gradient.rounding, d.update.found, d.update.rounding)
        figures = "".join(f" {x:>10.1e}" for x in gaps)
        lines.append(f"  {d.label:<{wide}}{figures}{_WORDS[d.verdict]}")
    if len(worst) > len(shown):
        lines.append(f"  and {len(worst) - len(shown)} more that agree (--all lists them)")
    return lines


def _verdict(found: Compared) -> str:
    worst, number = found.worst_first, len(found.parameters)
    names = {v: {d.name for d in worst if d.verdict == v} for v in Verdict}
    if wrong := names[Verdict.DIFFERS]:
        return f"{len(wrong)} of {number} parameters DIFFER, {worst[0].label} the most"
    if Verdict.DIFFERS in found.step_verdicts:
        return "losses or gradient norms DIFFER, though no parameter does"
    if not found.agrees:
        what = f"{len(names[Verdict.UNKNOWN])} of {number} parameters"
        if Verdict.UNKNOWN in found.step_verdicts:
            what += " and losses or gradient norms"
        return (
            f"{what} cannot be judged: rounding alone moves them as far\n"
            "  remedy: fewer --steps, a smaller optim.lr, another train.seed, or --shrink"
        )
    told = f"all {number} parameters agree"
    if found.copies:
        told += f", and so do the copies of {len(found.copies)} that several ranks hold"
    silent = [d.name for d in found.parameters if d.silent]
    if silent:
        some = ", ".join(silent[:4]) + (", .." if len(silent) > 4 else "")
        told += f"; {len(silent)} have no gradient here: {some}"
    return told
