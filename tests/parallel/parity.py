"""Any layout against one plain process, in float64: the loss and every named gradient.

The plain process knows no Megatron, DeepSpeed, plan or shard: the model, its loss, one backward.
Weights are those of a model whose memory matters (tests/model/helpers.py), documents are packed and
end anywhere, the last row has a ragged tail: `lacks` says what a case must have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.model.helpers import hot_model
from tests.parallel.tiny import micro_batches, tiny_config
from tests.worlds import run_world
from titans_pretrain.config import RunConfig
from titans_pretrain.data.batch import Batch, concatenate
from titans_pretrain.model.loss import token_loss, z_penalty
from titans_pretrain.model.titans import TitansLM, initialise, map_state
from titans_pretrain.parallel.context import hand_on, shard
from titans_pretrain.parallel.layout import Layout, Shard, plan_layout
from titans_pretrain.parallel.link import Link
from titans_pretrain.parallel.pipeline import Schedule, Stage, sum_tied
from titans_pretrain.parallel.tensor import fill, vocabulary_loss, vocabulary_penalty
from titans_pretrain.parallel.world import World, context_ranks, start_world, world_size
from titans_pretrain.pieces import Pieces, build_pieces

TOLERANCE = 1e-9  # of a tensor's largest entry
Z = 0.01  # z-loss: its sum over the vocabulary is one more thing to divide
HEAD_STEP = 10  # nats a label fall from above 4 to about 3
CALMER = 0.4  # heat at which memories of deep stacks are still heard, and less chaotic
Gradients = dict[str, torch.Tensor]
Meddle = Callable[[], Any]  # run on each rank before anything is built, to break something


def parity_config(variant: str, parallel: dict[str, Any], **changes: Any) -> RunConfig:
    """Eight blocks and eight heads, so that four ranks in either direction have two of each."""
    model = {
        "model__variant": variant,
        "model__blocks": 2 * parallel.get("pipeline", 1) * parallel.get("interleave", 1),
        "model__width": 32,
        "model__heads": 8,
        "model__mlp_width": 48,
        "model__vocab_size": 64,
        "model__segment": 16,
        "model__persistent_tokens": 3,
        "train__z_loss": Z,
        "train__micro_batch": 1,
        "data__sequence_length": 32 * parallel.get("context", 1) * parallel.get("segments", 1),
        "parallel": parallel,
    }
    if variant in ("transformer", "mag", "mal"):
        model["model__window"] = 11
    return tiny_config(**{**model, **changes})


def values_of(config: RunConfig, heat: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights of both sides, by unsharded name; float32 holds them, too. heat: 0 is a model as
    it is initialised, whose memory is hardly heard; 1 one whose memories are, each by the next.

    The head has gone a step down the loss of the rows at hand: to one that knows nothing of the
    labels, no memory is of use, and what one changes cancels in the mean over labels."""
    calm = TitansLM(config.model, dtype=torch.float64)
    initialise(calm, seed=0)
    cold = {n: p.detach() for n, p in calm.named_parameters()}
    hot = {n: p.detach() for n, p in hot_model(config.model).named_parameters()}
    values = {n: p.clone() if heat == 1 else cold[n].lerp(p, heat) for n, p in hot.items()}
    if not config.model.tied_embeddings:
        _, gradients = plain(config, values)
        values["head.weight"] -= HEAD_STEP * gradients["head.weight"]
    return {n: p.float().double() for n, p in values.items()}


def plain(
    config: RunConfig, weights: dict[str, torch.Tensor] | None = None
) -> tuple[float, Gradients]:
    """Nats a label of step 1's rows, and the gradient of the objective."""
    model = TitansLM(config.model, dtype=torch.float64)
    values = values_of(config) if weights is None else weights
    with torch.no_grad():
        for name, p in model.named_parameters():  # a tied head has one name
            p.copy_(values[name])
    batch = concatenate(micro_batches(config, 1, 0, 1))
    labels, state, nats = batch.loss_mask.sum(), None, 0.0
    segments = config.parallel.segments
    for i in range(segments):  # what one leaves the next starts from, without its history
        part = shard(batch, i, segments)
        logits, state = model(part.tokens, part.positions, state)
        state = map_state(state, torch.Tensor.detach)
        loss = token_loss(logits, part.labels)[part.loss_mask].sum() / labels
        z = z_penalty(logits)[part.loss_mask].sum() / labels
        (loss + config.train.z_loss * z).backward()
        nats += loss.item()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return nats, gradients


@dataclass
class Built:
    """A divided model on this rank, in float64, and its share of step 1."""

    layout: Layout
    world: World
    pieces: Pieces
    schedule: Schedule
    batches: list[Batch]
    link: Link | None


def build(config: RunConfig, values: dict[str, torch.Tensor]) -> Built:
    """Collective. values: the weights, by unsharded name."""
    layout = plan_layout(config, world_size())
    world = start_world(config.train, layout)
    pieces = build_pieces(
        config.model,
        layout,
        world.rank,
        seed=0,
        dtype=torch.float64,
        device=world.device,
        recompute=config.train.recompute == "blocks",
        sequence_length=config.data.sequence_length,
    )
    fill(pieces.root, pieces.shards, lambda name, shape: values[name])
    share = layout.tensor > 1
    loss = vocabulary_loss if share else token_loss
    z = (config.train.z_loss, vocabulary_penalty if share else z_penalty)
    where = (torch.float64, layout, config.model.width)
    stages = [Stage(p.model, loss, *where, z, first=p.first, last=p.last) for p in pieces]
    schedule = Schedule(stages, layout, world.device, world.place.context)
    batches = micro_batches(config, 1, world.place.data, layout.data_parallel)
    segments = config.parallel.segments
    link: Link | None = None
    if layout.context * segments > 1:
        join = {"segments": segments, "pieces": config.parallel.interleave}
        link = Link.join(context_ranks(), world.device, timeout_s=100, **join)
        for number, piece in enumerate(pieces):
            hand_on(piece.model, link, number)
        batches = [shard(b, i, segments) for b in batches for i in range(segments)]
        batches = [shard(b, link.index, link.size) for b in batches]
    return Built(layout, world, pieces, schedule, batches, link)


def divided(
    config: RunConfig, values: dict[str, torch.Tensor], meddle: Meddle | None
) -> tuple[float, list[tuple[Shard, torch.Tensor]]]:
    """On a rank: nats a label, and the gradients of its shards, before ZeRO's sum over
    data-parallel and context ranks."""
    if meddle is not None:
        meddle()
    built = build(config, values)
    layout, world, pieces, batches = built.layout, built.world, built.pieces, built.batches
    place = world.place
    labels = sum(int(b.loss_mask.sum()) for b in batches) * (place.tensor + place.pipeline == 0)
    tokens = int(world.sum([float(labels)])[0])
    seen = built.schedule.run(batches, tokens_in_step=tokens)
    if built.link is not None:
        built.link.drain()
    gradients = {n: p.grad for n, p in pieces.root.named_parameters() if p.grad is not None}
    if config.model.tied_embeddings and layout.pipeline > 1:
        sum_tied(gradients.items())
    nats = world.sum([seen.loss * (place.tensor == 0)])[0] / max(1, tokens)
    found = [
        (pieces.shards[path], gradients[path] / (layout.data_parallel * layout.context))
        for path, _ in pieces.root.named_parameters()
        if path in gradients
    ]
    data = [(place.data, place.context)] * len(found)
    world.shut_down()
    return nats, list(zip(found, data))  # type: ignore[return-value]


def assemble(
    results: list[Any], reference: Gradients, summed: int, whole_copies: bool
) -> Gradients:
    """Gradients of whole parameters: summed over so many data-parallel and context ranks; copies on
    other ranks must agree."""
    parts: dict[tuple[str, Any], dict[Any, torch.Tensor]] = defaultdict(dict)
    for _, found in results:
        for (piece, gradient), data in found:
            key = (piece.name, piece.box)
            if data in parts[key]:
                same = (parts[key][data] - gradient).abs().max()
                assert not whole_copies or same <= 1e-12 * gradient.abs().max(), (
                    f"{piece.name}: copies differ"
                )
            parts[key][data] = gradient
    whole = {name: torch.full_like(g, torch.nan) for name, g in reference.items()}
    for (name, (offsets, sizes)), by_data in parts.items():
        assert not whole_copies or len(by_data) == summed, name
        where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        whole[name][where] = torch.stack(list(by_data.values())).sum(0)
    return whole


def lacks(config: RunConfig, ranks: int) -> list[str]:
    """What a case would need to show a mistake wherever there is one."""
    layout, parallel, model = plan_layout(config, ranks), config.parallel, config.model
    positions = concatenate(micro_batches(config, 1, 0, 1)).positions
    length, shares = positions.shape[1], parallel.context * parallel.segments
    last = (positions >= 0) & (F.pad(positions[:, 1:], (0, 1), value=-1) <= 0)
    rows, columns = last.nonzero(as_tuple=True)
    ends, begins = columns + 1, columns - positions[last]  # of each document
    edges = length // shares * torch.arange(1, shares)[:, None]  # of ranks, and of segments in time
    over = ((begins < edges) & (edges < ends)).sum(1).tolist()
    row_ends = dict(zip(rows.tolist(), ends.tolist(), strict=True))  # the last document's
    ragged = [n < length and n % model.memory.chunk > 0 for _, n in sorted(row_ends.items())]
    has = {
        "2 blocks a stage": model.blocks >= 2 * parallel.pipeline * parallel.interleave,
        "2 heads a rank": min(model.heads, model.kv_heads or model.heads) >= 2 * parallel.tensor,
        "4 chunks a context rank": length >= 4 * model.memory.chunk * shares,
        "2 micro-batches": layout.micro_batches >= 2,
        "3 documents over MAC's segments": int((ends - begins > model.segment).sum()) >= 3,
        "3 documents over ranks' edges": shares == 1 or (sum(over) >= 3 and min(over) >= 1),
        "a ragged tail": ragged[-1] and sum(ragged) >= 2,
    }
    return [what for what, met in has.items() if not met]


def compare(
    config: RunConfig,
    ranks: int,
    meddle: Meddle | None = None,
    *,
    whole: bool = True,
    timeout: float = 240,
    heat: float = 1.0,
) -> dict[str, float]:
    """Difference of the loss ("loss", relative) and of each gradient, relative to the largest entry
    of the plain process's; NaN where a part is missing. whole: also asserts that copies agree."""
    assert not lacks(config, ranks), f"this case would hide mistakes: no {lacks(config, ranks)}"
    values = values_of(config, heat)
    nats, reference = plain(config, values)
    results = run_world(divided, ranks, config, values, meddle, timeout=timeout)
    layout = plan_layout(config, ranks)
    found = assemble(results, reference, layout.data_parallel * layout.context, whole)
    return differences((nats, reference), *((r[0], found) for r in results))


def differences(
    reference: tuple[float, Gradients], *others: tuple[float, Gradients]
) -> dict[str, float]:
    """Of the losses ("loss", the worst) and of the last one's gradients, as `compare` has them."""
    nats, gradients = reference
    off = {"loss": max(abs(other - nats) / abs(nats) for other, _ in others)}
    for name, gradient in gradients.items():
        largest = gradient.abs().max()
        assert largest > 1e-9, f"{name} has no gradient to compare"
        off[name] = float((others[-1][1][name] - gradient).abs().max() / largest)
    return off


def worst(off: dict[str, float]) -> tuple[float, str]:
    """The largest difference and whose it is; NaN is the largest of all."""
    name = max(off, key=lambda n: (off[n] != off[n], off[n]))
    return off[name], name


def assert_parity(off: dict[str, float]) -> None:
    bad = sorted(((d != d, d, n) for n, d in off.items() if not d <= TOLERANCE), reverse=True)
    told = ", ".join(f"{n} {d:.1e}" for _, d, n in bad)
    assert not bad, f"{len(bad)} of {len(off)} differ from one plain process: {told}"
