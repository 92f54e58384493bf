"""What a rank is fed: its share of each step's rows, step after step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titans_pretrain.config import RunConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.data.quarantine import new_entries
from titans_pretrain.data.streaming import Stream, open_batches
from titans_pretrain.errors import ConfigError, TitansError
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.world import World, world_size
from titans_pretrain.phases import phase


def open_stream(config: RunConfig, world: World) -> Stream:
    """This rank's training data. Raises ConfigError, DataError, NodeError."""
    return open_batches(
        config.data,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        align=config.model.alignment,
        dp_rank=world.place.data,
        dp_size=world.layout.data_parallel,
        vocab_size=config.model.vocab_size,
        rows=config.train.rows,
    )


def with_vocabulary(config: RunConfig, stream: Stream) -> RunConfig:
    """`config` with the vocabulary's size resolved from the data.

    Raises ConfigError where that size does not suit the layout, as a config's own does before.
    """
    have, need = config.model.vocab_size, stream.manifest.vocab_size
    if have is not None and have < need:
        raise ConfigError(
            f"model.vocab_size={have}, the tokenizer of the data has {need} pieces",
            "every token has a row in the embedding",
            f"set model.vocab_size={need}, or leave it out",
        )
    model = config.model.model_copy(update={"vocab_size": have or need})
    config = config.model_copy(update={"model": model})
    plan_layout(config, world_size())
    return config


@phase("data")
def fetch(
    world: World,
    batches: Iterator[tuple[list[Batch], dict[str, Any]]],
    stream: Stream,
    before: dict[str, Any],
) -> tuple[list[Batch], dict[str, Any]]:
    """The next step's micro-batches of this rank, and the stream's state after them as all ranks
    see it (`before`: the state before them). A data error stops every rank."""
    failure: TitansError | None = None
    micro_batches: list[Batch] = []
    data, met = before, []
    try:
        micro_batches, data = next(batches)
        met = new_entries(before["quarantine"], data["quarantine"])
    except TitansError as e:
        failure = e
    failed, found = world.max([float(failure is not None), float(bool(met))])
    if failed:
        world.raise_any(failure)
    if found:
        told = world.gather_objects(met)
        return micro_batches, world.agree(lambda: stream.agreed(before, data, told))
    return micro_batches, {**data, "quarantine": before["quarantine"]}
