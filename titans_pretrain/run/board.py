"""What TensorBoard's Custom Scalars page shows: the curves that one looks at, in that order.

The one place that says so. A chart names tags by regular expressions, matched from the beginning.
"""

from __future__ import annotations

from typing import Any

from titans_pretrain.config import RunConfig

Charts = dict[str, list[Any]]  # title -> ["Multiline", regular expressions on tags]


def layout(config: RunConfig) -> dict[str, Charts]:
    """Category -> its charts, for the curves that a run of `config` records."""
    sets = config.data.validation or config.data.sources
    phases = r"time/(step|data_wait|forward_backward|optimizer|watch)_s$"
    training = {
        "loss: training, validation": _lines(r"train/loss$", r"validation/loss$"),
        "perplexity: training, validation": _lines(r"(train|validation)/perplexity$"),
        "gradient norm (before clipping)": _lines(r"train/grad_norm$"),
        "learning rate": _lines(r"train/lr$"),
        "tokens a second": _lines(r"speed/tokens_per_s$"),
        "seconds of a step, by phase": _lines(phases),
    }
    if len(config.data.sources) > 1:
        training["training loss, by source"] = _lines(r"train_loss_by_source/.*")
    if len(sets) > 1:
        training["validation loss, by set"] = _lines(r"validation/[^/]+/loss$")
    memory = {
        "heads that are dead or diverge": _lines(r"memory_health/.*"),
        "gain: surprise taken off by learning": _lines(r"memory_gain/.*"),
        "drift of the fast weights": _lines(r"memory_drift/.*"),
        "theta, step size (median)": _lines(r"memory_theta/.*\.p50$"),
        "alpha, forgetting (median)": _lines(r"memory_alpha/.*\.p50$"),
        "stability radius (stable below 1)": _lines(r"memory_radius/.*"),
    }
    if config.model.variant == "transformer" or not config.log.memory_every:
        return {"Training": training}
    return {"Training": training, "Memory": memory}


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]
