"""A run in words and tables (Markdown), for TensorBoard's text page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from titans_pretrain.config import ModelConfig, RunConfig, dump_config
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.model.counts import flops_per_token, parameter_count
from titans_pretrain.model.shapes import kind
from titans_pretrain.model.titans import TitansLM
from titans_pretrain.parallel.world import World


def describe_run(
    config: RunConfig,
    world: World,
    manifests: Mapping[str, Manifest],
    versions: Mapping[str, str],
) -> dict[str, str]:
    """tag -> Markdown."""
    return {
        "run/config": _block(dump_config(config)),
        "run/model": "\n\n".join((_parts(config), _parameters(config.model))),
        "run/data": _data(manifests),
        "run/machine": _machine(config, world, versions),
    }


def _parts(config: RunConfig) -> str:
    """Parameters and FLOPs by part."""
    parameters = parameter_count(config.model)
    flops = flops_per_token(config.model, config.data.sequence_length)
    rows = [
        (part, _number(parameters.get(part)), _mega(flops.get(part)))
        for part in dict.fromkeys([*parameters, *flops])
        if parameters.get(part) or flops.get(part)
    ]
    total = ("**all**", _number(sum(parameters.values())), _mega(sum(flops.values())))
    head = ("part", "parameters", "forward MFLOP a token")
    return _table(head, [*rows, total], numbers=2)


def _parameters(config: ModelConfig) -> str:
    """Every parameter of the undivided model; those of like blocks in one row."""
    with torch.device("meta"):
        model = TitansLM(config)
    groups: dict[tuple[str, ...], list[int]] = {}
    numbers: dict[tuple[str, ...], int] = {}
    for name, parameter in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)
        shape = " x ".join(map(str, parameter.shape))
        row = (re.sub(r"^blocks\.\d+\.", "blocks.*.", name), shape, kind(name))
        groups.setdefault(row, []).extend([int(block[1])] if block else [])
        numbers[row] = numbers.get(row, 0) + parameter.numel()
    rows = [
        (f"`{name}`", _span(groups[row]), shape, group, _number(numbers[row]))
        for row in groups
        for name, shape, group in [row]
    ]
    return _table(("parameter", "blocks", "shape", "group", "numbers"), rows, numbers=1)


def _data(manifests: Mapping[str, Manifest]) -> str:
    rows = [
        (
            name,
            f"`{manifest.folder}`",
            split,
            _number(held.tokens),
            _number(held.documents),
            _number(len(held.shards)),
        )
        for name, manifest in manifests.items()
        for split, held in manifest.splits.items()
    ]
    return _table(("source", "folder", "split", "tokens", "documents", "shards"), rows, numbers=3)


def _machine(config: RunConfig, world: World, versions: Mapping[str, str]) -> str:
    facts = {
        "ranks": f"{world.size} on {world.device.type}, {world.threads} threads each",
        "layout": world.layout.describe(),
        "rank 0 on": world.host,
        "precision": config.train.precision,
        **versions,
    }
    return _table(("what", ""), facts.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table whose last `numbers` columns are aligned to the right."""

    def lines() -> Iterator[str]:
        yield "| " + " | ".join(head) + " |"
        left = len(head) - numbers
        yield "|" + "---|" * left + "---:|" * numbers
        for row in rows:
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())


def _block(text: str) -> str:
    """Text shown as it stands."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _span(blocks: list[int]) -> str:
    if not blocks:
        return ""
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def _number(count: int | None) -> str:
    return f"{count:,}" if count else ""


def _mega(flops: float | None) -> str:
    return f"{flops / 1e6:,.3f}" if flops else ""
