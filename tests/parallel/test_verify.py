"""`titans-pretrain verify`: right layouts agree; a wrong one ends with 1, and its report has the
parameter first."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parallel import test_seeded_bugs as bugs
from tests.parallel.parity import parity_config
from tests.parallel.tiny import tiny_config
from tests.prepared import small_dataset, small_run
from tests.worlds import run_world
from titans_pretrain import cli, feed, step, verify
from titans_pretrain.config import RunConfig, parse_config
from titans_pretrain.errors import ConfigError
from titans_pretrain.measure.footprint import held_bytes
from titans_pretrain.measure.made import made_batches
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.zero import ZeroOptimizer
from titans_pretrain.step import TrainStep
from titans_pretrain.verify_config import verified as as_verified
from titans_pretrain.verify_plain import Step, Trained, train_plain
from titans_pretrain.verify_report import (
    GRADIENT,
    UPDATE,
    Compared,
    Difference,
    Gap,
    Verdict,
    report,
)


def on_a_rank(
    config: RunConfig, steps: int, shrink: bool, meddle: Callable[[], None] | None
) -> tuple[int, str]:
    release = verify.release

    def released(step: TrainStep) -> None:
        assert sum(held_bytes(step).values()) > 0
        release(step)
        assert sum(held_bytes(step).values()) == 0

    verify.release = released  # type: ignore[attr-defined]
    if meddle is not None:
        meddle()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), tempfile.TemporaryDirectory() as scratch:
        code = verify.verify(config, steps, Path(scratch), shrink=shrink, everything=True)
    return code, out.getvalue()


def verified(
    config: RunConfig,
    *,
    steps: int = 2,
    shrink: bool = False,
    meddle: Callable[[], None] | None = None,
) -> tuple[int, str, list[str]]:
    """On two ranks: the exit code, the report, the labels of its rows of parameters in order."""
    (code, text), (other, silent) = run_world(on_a_rank, 2, config, steps, shrink, meddle)
    assert code == other and not silent
    rows = text.split("  parameter")[1].split("\n\n")[0].splitlines()[1:]
    figures = r"(?: +(?:\d\.\de[-+]\d\d|nan)){4}(?:  DIFFERS)?$"
    return code, text, [re.sub(figures, "", row).strip() for row in rows]


def names(config: RunConfig) -> set[str]:
    with torch.device("meta"):
        return {name for name, _ in TitansLM(config.model).named_parameters()}


RIGHT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "TP 2 + SP": ("mac", {"tensor": 2, "sequence": True}, {}),
    "CP 2, 3 segments": ("mac", {"context": 2, "segments": 3}, {"train__recompute": "blocks"}),
    "PP 2 x 2, tied": (
        "lmm",
        {"pipeline": 2, "interleave": 2},
        {"model__tied_embeddings": True, "train__global_batch": 4},
    ),
}
FEW = {"model__heads": 2, "train__global_batch": 2}


@pytest.mark.parametrize("layout", RIGHT)
def test_a_right_layout_agrees(layout: str) -> None:
    variant, parallel, changes = RIGHT[layout]
    config = parity_config(variant, parallel, **{**FEW, **changes})
    code, text, rows = verified(config)
    every = names(config)
    assert code == 0, text
    assert f"all {len(every)} parameters agree" in text
    assert {row for row in rows if "copy" not in row} == every
    copies = {row.removesuffix(", rank 1's copy") for row in rows if "copy" in row}
    held_twice = {"TP": "final_norm.weight", "PP": "embedding.weight"}.get(layout[:2])
    assert copies <= every and (held_twice in copies if held_twice else not copies)


def nothing_is_kept_whole() -> None:
    build = ZeroOptimizer.__init__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        assert not self.engine.optimizer.persistent_parameters

    ZeroOptimizer.__init__ = checked  # type: ignore[method-assign]


def test_a_shrunk_layout_divides_every_parameter_under_zero_3() -> None:
    config = parity_config("mac", {"zero": {"stage": 3}}, **FEW, train__precision="bf16")
    code, text, _ = verified(config, steps=1, shrink=True, meddle=nothing_is_kept_whole)
    assert code == 0, text
    assert "train.precision=fp32 (bf16), " in " ".join(text.split())


def test_what_was_prepared_is_read_by_both_sides(tmp_path: Path) -> None:
    tree = small_run(tmp_path / "run", small_dataset(tmp_path), parallel={"zero": {"stage": 2}})
    tree["train"] |= {"global_batch": 4, "micro_batch": 1, "ramp": {"start": 2, "steps": 5}}
    code, text, _ = verified(parse_config(tree, "prepared"))
    told = " ".join(text.split())
    assert code == 0, text
    assert "2 steps of 4 x 64 tokens (its own data)" in told
    assert "optim.schedule=constant (cosine), optim.warmup_steps=0 (5), train.ramp=None" in told
    assert not (tmp_path / "run").exists()


def the_tied_head_s_gradient_is_not_summed() -> None:
    step.sum_tied = lambda gradients: None


def a_copy_drifts_on_rank_1() -> None:
    update = ZeroOptimizer.step

    def drifting(self: Any, rates: list[float]) -> float:
        norm = update(self, rates)
        for f in self.fragments():
            if f.name == "blocks.1.mlp_norm.weight" and os.environ["RANK"] == "1":
                f.tensors["weight"].mul_(1.0001)
        return norm

    ZeroOptimizer.step = drifting  # type: ignore[method-assign]


# The bug, the variant and its layout, and what the verdict names.
WRONG: list[tuple[Callable[[], None], str, dict[str, Any], str]] = [
    (bugs.gradients_of_shared_parameters_are_not_summed, "mag", {"tensor": 2}, "persistent"),
    (bugs.a_state_does_not_arrive, "lmm", {"context": 2, "segments": 2}, "memory"),
    (
        bugs.a_stage_begins_a_block_early,
        "lmm",
        {"pipeline": 2},
        "blocks.3.*, which no rank has",
    ),
    (the_tied_head_s_gradient_is_not_summed, "lmm", {"pipeline": 2}, "embedding.weight"),
    (a_copy_drifts_on_rank_1, "lmm", {"tensor": 2}, "blocks.1.mlp_norm.weight, rank 1's copy"),
]


@pytest.mark.parametrize("bug", WRONG, ids=lambda bug: bug[0].__name__)
def test_a_wrong_layout_ends_with_1_and_names_the_parameter(bug: Any) -> None:
    meddle, variant, parallel, named = bug
    tied = meddle is the_tied_head_s_gradient_is_not_summed
    config = parity_config(variant, parallel, **FEW, model__tied_embeddings=tied)
    code, text, rows = verified(config, steps=1, meddle=meddle)
    assert code == 1, text
    pattern = ".*".join(map(re.escape, named.split("*")))
    assert re.search(pattern, rows[0]), text
    assert f"parameters DIFFER, {rows[0]} the most" in text


def gap(found: float, rounding: float = 0.0, tolerances: tuple[float, float] = GRADIENT) -> Gap:
    return Gap(found, rounding, tolerances)


def of(name: str, gradient: Gap, update: Gap | None = None, **more: Any) -> Difference:
    return Difference(name, gradient, update or gap(0, tolerances=UPDATE), **more)


@pytest.mark.parametrize(
    ("found", "rounding", "verdict"),
    [
        (0.9e-5, 0.0, Verdict.AGREES),
        (1.1e-5, 0.0, Verdict.DIFFERS),
        (0.9e-3, 1e-4, Verdict.AGREES),
        (1.1e-3, 1e-4, Verdict.DIFFERS),
        (0.9e-2, 0.1, Verdict.AGREES),
        (1.0, 0.1, Verdict.UNKNOWN),  # a gradient that is missing, too
        (1.0, 0.09, Verdict.DIFFERS),
        (float("nan"), 0.1, Verdict.DIFFERS),
        (1.1e-5, float("nan"), Verdict.DIFFERS),
        (float("inf"), 0.1, Verdict.DIFFERS),
    ],
)
def test_a_tolerance_grows_with_rounding_but_not_for_ever(
    found: float, rounding: float, verdict: Verdict
) -> None:
    assert gap(found, rounding).verdict == verdict


STEPS = [Step(5.0, 1.0)] * 2


def told(*differences: Difference, copies: tuple[Difference, ...] = (), **more: Any) -> str:
    layout = more.pop("layout", STEPS)
    found = Compared(layout, STEPS, more.pop("shaken", STEPS), differences, copies)
    text = report("head", [], found, everything=False)
    assert found.agrees == (" agree" in text.splitlines()[-1] and "DIFFER" not in text), text
    return text


def test_every_wrong_parameter_is_listed_in_order_of_its_own_tolerance() -> None:
    """Twelve agree with large figures, for rounding does as much; the small ones are wrong."""
    noisy = [of(f"noisy.{i}", gap(5e-3, 1e-3)) for i in range(12)]
    wrong = [of(f"wrong.{i}", gap(i * 2e-5)) for i in range(1, 12)]
    unknown = of("unknown", gap(0.5, 0.1))
    text = told(*noisy, *wrong, of("nan", gap(float("nan"))), unknown)
    rows = [line.split()[0] for line in text.split("rounding\n")[1].split("\n\n")[0].splitlines()]
    assert rows == ["nan", *(f"wrong.{i}" for i in range(11, 0, -1)), "unknown", "and"]
    assert text.count("  DIFFERS") == 12 and text.count("  cannot be judged") == 1
    assert text.endswith("12 of 25 parameters DIFFER, nan the most")


def test_what_the_verdict_says_where_no_parameter_differs() -> None:
    fine = of("a", gap(1e-7))
    assert told(fine).endswith("all 1 parameters agree")
    silent = [of(name, gap(0.0), silent=True) for name in "bcdef"]
    copy = of("a", gap(0.0), note="rank 1's copy")
    text = told(fine, *silent, copies=(copy,))
    assert "all 6 parameters agree, and so do the copies of 1 that several ranks hold" in text
    assert text.endswith("; 5 have no gradient here: b, c, d, e, ..")
    text = told(fine, of("b", gap(0.5, 0.1)))
    assert "1 of 2 parameters cannot be judged" in text and "remedy: fewer --steps" in text
    other = [STEPS[0], Step(5.0, 1.0 + 2e-5)]
    assert "though no parameter does" in told(fine, layout=other)
    assert told(fine, layout=other, shaken=other).endswith("all 1 parameters agree")
    astray = of("a", gap(0.0), gap(1.1e-3, tolerances=UPDATE), note="rank 1's copy")
    assert told(fine, copies=(astray,)).endswith(
        "1 of 1 parameters DIFFER, a, rank 1's copy the most"
    )


@pytest.mark.parametrize(
    ("entry", "noise", "verdict"),
    [
        (0, 0.0, Verdict.DIFFERS),
        (1, 0.0, Verdict.AGREES),
        (2, 0.0, Verdict.DIFFERS),  # no gradient at all
        (3, 0.0, Verdict.DIFFERS),
        (3, 1e-3, Verdict.AGREES),  # rounding grew in a later step
    ],
)
def test_an_update_counts_where_rounding_does_not_decide_it(
    monkeypatch: pytest.MonkeyPatch, entry: int, noise: float, verdict: Verdict
) -> None:
    """AdamW moves each entry by about lr, whatever its gradient, either way."""
    config = tiny_config()
    gradient = torch.ones(config.model.width)
    gradient[1:4] = torch.tensor([1e-7, 0.0, 5e-3])
    begin = torch.ones_like(gradient)  # a norm's gains
    share = gradient.masked_fill(gradient == 0, torch.inf)
    plain = Trained([], {"n.norm": gradient}, {"n.norm": begin - 0.01}, {"n.norm": share})
    shaken = replace(plain, faintest={"n.norm": share - noise})
    after = plain.weights["n.norm"].clone()
    after[entry] += 0.02
    monkeypatch.setattr(verify, "first_weight", lambda *args: begin)
    found, others = verify.differences(config, "n.norm", plain, shaken, (gradient, after), [])
    assert found.verdict == verdict and not others


def test_the_faintest_gradient_of_an_entry_in_all_steps() -> None:
    config = tiny_config(model__variant="transformer")
    steps = [made_batches(config, number) for number in (1, 2)]
    one, two = (train_plain(config, torch.device("cpu"), steps[:n]) for n in (1, 2))
    gradient = one.gradient["embedding.weight"].abs()
    faintest = one.faintest["embedding.weight"]
    assert torch.equal(faintest.isinf(), gradient == 0)
    unmet = faintest.isinf().all(1)
    torch.testing.assert_close(
        faintest[~unmet], (gradient / gradient.max())[~unmet], rtol=1e-6, atol=0
    )
    assert (two.faintest["embedding.weight"] <= faintest).all()
    assert not two.faintest["embedding.weight"].equal(faintest)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {"segments": 3}),
        (4, {"segments": 3, "context": 2, "tensor": 2, "sequence": True}),
        (4, {"pipeline": 2, "interleave": 2}),
    ],
)
def test_what_is_shrunk_is_legal(ranks: int, parallel: dict[str, Any]) -> None:
    config = as_verified(parity_config("mac", parallel), ranks, shrink=True)
    plan_layout(config, ranks)


def test_a_vocabulary_that_the_data_decides_fits_the_layout_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "world_size", lambda: 3)
    data = small_dataset(tmp_path)
    tree = small_run(tmp_path, data, parallel={"tensor": 3}, model__heads=3, model__width=48)
    config = parse_config(tree, "prepared")
    layout = plan_layout(config, 3)  # nothing is known of the vocabulary
    world: Any = SimpleNamespace(
        size=3, place=layout.place(0), layout=layout, agree=lambda act: act()
    )
    with (
        contextlib.ExitStack() as leaving,
        pytest.raises(ConfigError, match=r"model\.vocab_size=340, parallel\.tensor=3"),
    ):
        verify.rows_of(config, world, leaving, made=False)


def test_overrides_stand_on_either_side_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(verify, "run", lambda args: seen.append(args) or 0)
    assert cli.main(["verify", "c.yaml", "a=1", "--ranks", "2", "b=2", "--shrink"]) == 0
    [args] = seen
    assert (args.config, args.overrides, args.ranks) == ("c.yaml", ["a=1", "b=2"], 2)
