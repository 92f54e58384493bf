"""Context ranks under Megatron's schedule, and what a rank keeps alive."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from tests.model.helpers import hot_model
from tests.parallel.context_runs import (
    CPU,
    batch_loss,
    count_labels,
    join,
    micro_batches,
    model_config,
    reduced,
    unit,
)
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.model.loss import token_loss
from titans_pretrain.parallel.context import Link, hand_on, shard
from titans_pretrain.parallel.pipeline import Schedule, Stage


def through_megatron() -> dict[str, tuple[float, int, dict[str, Tensor]]]:
    """Loss and labels over all ranks, and gradients averaged over them as ZeRO averages."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 1, context_parallel_size=dist.get_world_size())
    link = Link.join(parallel_state.get_context_parallel_global_ranks(), CPU, timeout_s=60)
    out = {}
    for case in ("mac", "mag-window"):
        model = hot_model(model_config(case))
        hand_on(model, link)
        whole = micro_batches(model.config)
        labels = count_labels(whole)
        schedule = Schedule(Stage(model, token_loss, torch.float64), 1, CPU)
        sums = schedule.run([shard(b, link.index, link.size) for b in whole], tokens_in_step=labels)
        link.drain()
        nats = torch.tensor([sums.loss, sums.tokens], dtype=torch.float64)
        dist.all_reduce(nats)
        gradients = {n: g / link.size for n, g in reduced(model).items()}
        out[case] = (nats[0].item(), int(nats[1]), gradients)
    parallel_state.destroy_model_parallel()
    return out


def alive_after_forward() -> dict[str, tuple[int, int]]:
    """By how much what is alive between forward and backward grows with 64 units more of a row,
    in bytes: where the row is whole, and on this rank."""
    link, out = join(), {}
    for case in ("lmm", "mac", "mag-window"):
        config = model_config(case)
        found: dict[bool, list[int]] = {False: [], True: []}
        for units in (16, 80):
            batch = micro_batches(config, [[[units * unit(config)]] * 2], units)[0]
            for cut in (False, True):
                model, part = hot_model(config), batch
                if cut:
                    hand_on(model, link)
                    part = shard(batch, link.index, link.size)
                with LiveBytes() as live:
                    loss = batch_loss(model, part)
                    found[cut].append(live.now)
                    loss.backward()
                link.drain()
        (small, large), (mine_small, mine_large) = found[False], found[True]
        out[case] = (large - small, mine_large - mine_small)
    return out
