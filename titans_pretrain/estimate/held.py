"""Bytes that each rank of a layout holds while it trains, by kind, from the config alone.

What ZeRO holds is portion.py's; what a forward keeps follows model/saved.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from titans_pretrain.config import ModelConfig
from titans_pretrain.estimate.portion import Portion
from titans_pretrain.memory.sizes import runs
from titans_pretrain.model.counts import memory_elements, memory_shapes
from titans_pretrain.model.saved import saved_bytes
from titans_pretrain.parallel.wavefront import Chain, Order, Task, most_alive, program

# Of a memory's backward, counted (tests/estimate/test_working.py): states (W, S) beside a run's,
# of its tokens features in the hidden layers, and of width d; of all tokens, of width D.
STATES, HIDDEN, NARROW, WIDE, MESSAGES = 4.5, 8, 14, 4, 6
REUSED = 1_000_000_000  # elements between two uses of a weight that stage 3 keeps it for


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, at the time of a step when it holds most."""

    parameters: int
    gradients: int
    optimizer: int
    host: int  # of the optimizer's state where it is offloaded
    buffers: int  # of collectives: buckets, gathered parameters
    activations: float  # the stream, mixers, MLPs, masks
    states: float  # of memories: boundaries inside a row, and between segments and ranks
    logits: float
    working: float  # the largest passing thing: a block's backward, the logits' gradient

    @property
    def device(self) -> float:
        """Of the GPU's memory. Activations and a reduction's buffers live one after the other, but
        buckets that DeepSpeed never gives back are counted beside them."""
        fixed = self.parameters + self.gradients + self.optimizer
        return fixed + self.buffers + self.passing

    @property
    def passing(self) -> float:
        """What forwards made and backwards use up."""
        return self.activations + self.states + self.logits + self.working

    def by_kind(self) -> dict[str, float]:
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "memory states": self.states,
            "logits": self.logits,
            "buffers": self.buffers,
            "working": self.working,
        }


def most(found: Iterable[Portion]) -> Held:
    """Of the rank that holds most; of context ranks the first, which holds most."""
    return max(map(held_by, found), key=lambda held: held.device)


def held_by(portion: Portion) -> Held:
    """What such a rank holds."""
    engine, passing = portion.engine, _at_most(portion)
    return Held(
        parameters=engine.parameters,
        gradients=engine.gradients,
        optimizer=0 if engine.zero.offload else engine.optimizer,
        host=engine.optimizer if engine.zero.offload else 0,
        buffers=engine.buffers + _gathered(portion),
        activations=passing["activations"],
        states=passing["memory states"],
        logits=passing["logits"],
        working=passing["working"],
    )


def _gathered(portion: Portion) -> int:
    """Stage 3: weights that a rank has gathered and not given up, since it will use them again."""
    if portion.engine.zero.stage < 3:
        return 0
    return portion.element * min(portion.engine.total, REUSED)


def alive(portion: Portion) -> float:
    """Forwards of the stage's pieces whose backwards are to come, at most: in pieces over the
    number of pieces, i.e. 1 for a micro-batch in all of them."""
    p = portion.config.parallel
    if p.interleave > 1:  # Megatron's warm-up, in pieces
        ahead = 2 * (p.pipeline - portion.stage - 1) + (p.interleave - 1) * p.pipeline
        return min(ahead + 1, portion.passes * p.interleave) / p.interleave
    # The first context rank has most forwards ahead.
    return _ahead(p.context, portion.passes, p.order, p.pipeline, p.segments, portion.stage)


@lru_cache(maxsize=4096)
def _ahead(
    context: int, passes: int, order: Order, pipeline: int, segments: int, stage: int
) -> float:
    nothing = Task(0, 0, 0)
    chain = Chain(context, passes, 1, nothing, nothing, order, pipeline, segments)
    return most_alive(program(chain, 0, stage))


def kept_of_a_block(portion: Portion) -> dict[str, float]:
    """What a forward keeps for its backward, by kind: of a block; "masks" of all blocks together,
    "logits" of a head."""
    p = portion.config.parallel
    return _saved(
        portion.config.model, portion.rows, portion.length, portion.element,
        p.tensor, p.sequence, portion.handed,
    )  # fmt: skip


@lru_cache(maxsize=8192)
def _saved(
    model: ModelConfig,
    rows: int,
    length: int,
    element: int,
    tensor: int,
    sequence: bool,
    handed: bool,
) -> dict[str, float]:
    return saved_bytes(
        model, rows, length, element, blocks=1, tensor=tensor, sequence=sequence, handed=handed
    )


def kept(portion: Portion) -> dict[str, float]:
    """Of all forwards that are alive at once, by kind, before the first of their backwards."""
    p, one = portion.config.parallel, kept_of_a_block(portion)
    many = alive(portion)
    layers, states = one["stream"] + one["mixers"] + one["mlps"], one["memory states"]
    if portion.again:  # each block's input alone, and the state that it was handed
        stream = portion.length * portion.config.model.width / (p.tensor if p.sequence else 1)
        layers = portion.rows * stream * portion.element
        states = states_handed(portion) if portion.handed else 0.0
    # A pipeline's last forward ends in its own backward; under FFBB, and ahead of a skewed chain,
    # others wait with their logits.
    heads = (many if p.pipeline == 1 else 1.0) * portion.last
    return {
        "activations": (portion.blocks * layers + one["masks"]) * many,
        "memory states": portion.blocks * states * many,
        "logits": one["logits"] * heads,
    }


def _at_most(portion: Portion) -> dict[str, float]:
    """What forwards keep, and "working" beside it, as the loss's backward begins; or later, in a
    block's: this micro-batch's logits are gone then, and under recompute the block is whole."""
    model, tensor = portion.config.model, portion.config.parallel.tensor
    found, one = kept(portion), kept_of_a_block(portion)
    logits = 4 * portion.tokens * (model.vocab_size or 0) / tensor
    # Their probabilities and gradient; or, without them, what the final norm's backward takes.
    in_loss = max(2 * logits, 4 * 4 * portion.tokens * model.width - logits)
    in_head = {**found, "working": in_loss if portion.last else 0.0}
    in_block = {**found, "working": _in_a_block(portion)}
    if portion.last:
        in_block["logits"] -= one["logits"]
    if portion.again:
        in_block["activations"] += one["stream"] + one["mixers"] + one["mlps"]
        in_block["memory states"] += one["memory states"]
    return max(in_head, in_block, key=lambda kinds: sum(kinds.values()))


def states_handed(portion: Portion) -> float:
    """Bytes of a block's state from the tokens before, (W, S) in fp32, on a tensor-parallel rank:
    what a block that is computed again keeps of it."""
    model = portion.config.model
    if model.variant == "transformer":
        return 0.0
    return 2.0 * 4 * portion.rows * memory_elements(model) / portion.config.parallel.tensor


def _in_a_block(portion: Portion) -> float:
    """What a block's backward works with, beyond what its forward kept: in its MLP the gradients of
    two wide tensors; in its mixer, by then without what the MLP kept, the memory's."""
    model, tensor = portion.config.model, portion.config.parallel.tensor
    n, one = portion.tokens, kept_of_a_block(portion)
    in_mlp = n * (2 * model.mlp_hidden * portion.element / tensor + 4 * model.width)
    in_norm = 4 * 4 * n * model.width
    in_mixer = _in_a_memory(portion) - one["mlps"] - one["stream"]
    return max(in_mlp, in_norm, in_mixer)


def _in_a_memory(portion: Portion) -> float:
    """Backward of a memory, run of chunks by run (memory/again.py): states of one run, (W, S) as
    they were and their gradients; of its tokens, features of all layers; of all, (q, k, v).

    Where a state is handed on, all runs are computed again while its gradient is waited for, but
    under recompute; and there are messages, packed and unpacked."""
    model, tensor = portion.config.model, portion.config.parallel.tensor
    if model.variant == "transformer":
        return 0.0
    tokens = min(portion.length, model.segment) if model.variant == "mac" else portion.length
    chunks = -(-tokens // model.memory.chunk)
    run = max(end - begin for begin, end in runs(chunks))
    state = 2 * memory_elements(model)
    hidden, narrow = sum(o for _, o in memory_shapes(model)[:-1]), model.head_width
    states: float = 2 * run + STATES
    features: float = run * model.memory.chunk * (HIDDEN * hidden + NARROW * narrow)
    if portion.handed:
        states += MESSAGES * (1.5 if model.variant == "mac" else 1)  # twice W, and S
    if portion.handed and not portion.again:
        others = -(-portion.length // model.memory.chunk) - run
        states += others
        features += others * model.memory.chunk * (HIDDEN / 2 * hidden + NARROW / 2 * narrow)
    whole = WIDE * tokens * model.width
    return 4 * portion.rows * (states * state + model.heads * features + whole) / tensor
