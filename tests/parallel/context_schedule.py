"""Context ranks under Megatron's schedule, and what a rank keeps alive."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.helpers import hot_model
from tests.parallel.context_runs import (
    CPU,
    Run,
    batch_loss,
    count_labels,
    join,
    micro_batches,
    model_config,
    reduced,
    unit,
)
from titans_pretrain.config import ParallelConfig
from titans_pretrain.data.batch import Batch
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.model.loss import token_loss
from titans_pretrain.model.titans import TitansLM, map_state
from titans_pretrain.parallel.context import hand_on, shard
from titans_pretrain.parallel.layout import Layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.megatron import parallel_state
from titans_pretrain.parallel.pipeline import Schedule, Stage


def through_megatron() -> dict[str, tuple[float, int, dict[str, Tensor]]]:
    """Loss and labels over all ranks, and gradients averaged over them as ZeRO averages."""
    dist.init_process_group("gloo")
    parallel = ParallelConfig(context=dist.get_world_size())
    layout = Layout(parallel.context, parallel, data_parallel=1, micro_batches=3)
    parallel_state.initialize_model_parallel(1, 1, context_parallel_size=layout.context)
    link = Link.join(parallel_state.get_context_parallel_global_ranks(), CPU, timeout_s=60)
    out = {}
    for case in ("mac", "mag-window"):
        model = hot_model(model_config(case))
        hand_on(model, link)
        whole = micro_batches(model.config)
        labels = count_labels(whole)
        stage = Stage(model, token_loss, torch.float64, layout, model.config.width)
        schedule = Schedule([stage], layout, CPU)
        shares = [shard(b, link.index, link.size) for b in whole]
        sums = schedule.run(shares, tokens_in_step=labels)
        link.drain()
        seen = schedule.run(shares, tokens_in_step=labels, train=False)
        link.drain()
        assert abs(seen.loss - sums.loss) < 1e-12 * sums.loss and not link.open
        nats = torch.tensor([sums.loss, sums.tokens], dtype=torch.float64)
        dist.all_reduce(nats)
        gradients = {n: g / link.size for n, g in reduced(model).items()}
        out[case] = (nats[0].item(), int(nats[1]), gradients)
    parallel_state.destroy_model_parallel()
    return out


def alive_after_forward() -> dict[str, tuple[int, int]]:
    """By how much what is alive between forward and backward grows with 32 units more of a row,
    in bytes: where the row is whole, and on this rank."""
    link, out = join(), {}
    for case in ("lmm", "mac", "mag-window"):
        config = model_config(case)
        found: dict[bool, list[int]] = {False: [], True: []}
        for units in (16, 48):
            batch = micro_batches(config, [[[units * unit(config)]] * 2], units)[0]
            for cut in (False, True):
                model, part = hot_model(config), batch
                if cut:
                    hand_on(model, link)
                    part = shard(batch, link.index, link.size)
                with LiveBytes() as live:
                    loss = batch_loss(model, part)
                    found[cut].append(live.now)
                del loss
                link.open.clear()  # there is no backward
                link.drain()
        (small, large), (mine_small, mine_large) = found[False], found[True]
        out[case] = (large - small, mine_large - mine_small)
    return out


SEGMENTS = 3


def stretches(model: TitansLM) -> list[Batch]:
    """Two sequences of three segments each, as micro-batches one after another."""
    u = unit(model.config)
    rows = [[[24 * u], [5 * u, 10 * u + 1, 7 * u]], [[8 * u, 16 * u], [18 * u - 1, 3 * u]]]
    whole = micro_batches(model.config, rows, 8 * SEGMENTS)
    return [shard(b, i, SEGMENTS) for b in whole for i in range(SEGMENTS)]


def in_segments_plain(case: str) -> Run:
    """One process: the state that a segment leaves is the next one's, without its history."""
    model = hot_model(model_config(case))
    state, total = None, 0.0
    for i, batch in enumerate(stretches(model)):
        state = None if i % SEGMENTS == 0 else map_state(state, Tensor.detach)
        logits, state = model(batch.tokens, batch.positions, state)
        loss = torch.where(batch.loss_mask, token_loss(logits, batch.labels), 0).sum()
        loss.backward()
        total += loss.item()
    return Run(total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def in_segments(cases: list[str]) -> dict[str, Run]:
    link = join_in_segments()
    return {case: segments_run(link, case) for case in cases}


def join_in_segments() -> Link:
    dist.init_process_group("gloo")
    return Link.join(range(dist.get_world_size()), CPU, timeout_s=60, segments=SEGMENTS)


def segments_run(link: Link, case: str, order: str = "FB") -> Run:
    model = hot_model(model_config(case))
    model.recompute = case == "mac"
    hand_on(model, link)
    losses: list[Tensor] = []
    for batch in stretches(model):
        losses.append(batch_loss(model, shard(batch, link.index, link.size)))
        if order == "FB":
            losses[-1].backward()
    for loss in losses if order == "FFBB" else ():
        loss.backward()
    link.drain()
    total = torch.stack([loss.detach() for loss in losses]).sum()
    dist.all_reduce(total)
    return Run(total.item(), reduced(model))
