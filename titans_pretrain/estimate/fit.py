"""Whether a run fits into the memory of the GPUs that it is submitted to."""

from __future__ import annotations

from titans_pretrain.config import HardwareConfig, RunConfig
from titans_pretrain.errors import ConfigError
from titans_pretrain.estimate.choose import (
    GIB,
    arguments,
    candidates,
    cheapest_change,
    difference,
    judge,
    ranked,
)
from titans_pretrain.parallel.layout import plan_layout


def require_fit(
    config: RunConfig, ranks: int, hardware: HardwareConfig, *, force: bool = False
) -> str:
    """What the run is estimated to hold and take, in one line.

    Raises ConfigError where it holds more than there is, unless `force`.
    """
    if config.model.vocab_size is None:
        return "not estimated: model.vocab_size comes with the data; set it, and it will be"
    layout = plan_layout(config, ranks)
    own = judge(config, layout, hardware)
    days = own.days(config.train.all_rows() * config.data.sequence_length)
    line = (
        f"{own.held.device / GIB:.1f} of {own.room / GIB:.1f} GiB of each {hardware.name}; "
        f"{own.pace.seconds:.2f} s a step, {days:.1f} days in all (estimates: titans-pretrain plan)"
    )
    if own.fits:
        return line
    if force:
        return f"{line}: DOES NOT FIT, --force"
    better = cheapest_change(own, ranked(candidates(config, ranks, hardware)))
    remedy = "use more GPUs, or a smaller model"
    if better is not None:
        remedy = f"{arguments(difference(own, better))} ({better.held.device / GIB:.1f} GiB)"
    raise ConfigError(
        f"{layout.describe()} on {ranks} x {hardware.name}: {own.held.device / GIB:.1f} GiB, "
        f"{own.over / GIB:.1f} too much",
        "what a rank holds fits into its GPU; by estimate: titans-pretrain plan",
        f"{remedy}; or submit it all the same: --force",
    )
