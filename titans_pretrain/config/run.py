"""RunConfig: the whole run as one frozen, validated tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from titans_pretrain.config.data import DataConfig
from titans_pretrain.config.model import ModelConfig
from titans_pretrain.config.section import (
    ALIGNMENTS,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
)

Minutes = Annotated[float, Field(ge=0)]


class OptimConfig(Section):
    """AdamW, decay groups, warm-up and schedule."""

    lr: PositiveFloat = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = 0  # wsd: steps of the final decay
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    gate_lr_scale: PositiveFloat = 1.0  # gates of the memory: their own rate and decay
    gate_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    init_lr_scale: PositiveFloat = 1.0  # learned initial fast weights: likewise
    init_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: PositiveFloat = 1.0


class RampConfig(Section):
    """A batch that grows evenly, in whole multiples of its first size."""

    start: Positive  # rows of the first step; a divisor of global_batch
    steps: Positive  # steps of growth; after them every step has global_batch rows


class TrainConfig(Section):
    steps: Positive = 1000
    global_batch: Positive = 8  # rows of sequence_length tokens in one optimizer step
    micro_batch: Positive = 8  # rows in one forward-backward of one rank
    ramp: RampConfig | None = None  # smaller batches at first; default: none
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "blocks"] = "none"  # activation checkpointing
    # Times (log sum exp logits)^2, added to each label's loss in training (e.g. 1e-4).
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # On CUDA: only algorithms that give the same bits each time, as a CPU's do; what has none ends
    # the run. Without it a resumed run is not bitwise the uninterrupted one: attention's backward.
    deterministic: bool = True
    threads: NonNegative = 0  # CPU threads of a rank; 0: cores divided by ranks on this machine

    def rows(self, step: int) -> int:
        """Rows of step number `step` (from 1) over all ranks: a function of the step alone."""
        if self.ramp is None or step > self.ramp.steps:
            return self.global_batch
        levels = self.global_batch // self.ramp.start
        return self.ramp.start * (1 + (step - 1) * (levels - 1) // self.ramp.steps)

    def all_rows(self) -> int:
        """Rows of the whole run."""
        return sum(map(self.rows, range(1, self.steps + 1)))


class ZeroConfig(Section):
    """What data-parallel ranks divide among them (DeepSpeed ZeRO, arXiv 1910.02054)."""

    # 1: optimizer state; 2: gradients, too; 3: parameters, too.
    stage: Annotated[int, Field(ge=0, le=3)] = 1
    offload: bool = False  # optimizer state in the host's memory
    bucket: Positive = 500_000_000  # elements reduced at once, at most
    # In which a bf16 run's gradients are summed over ranks; bf16 sends half the bytes, rounded.
    reduce: Literal["fp32", "bf16"] = "fp32"
    overlap: bool = False  # reduce while the backward goes on; stages 2 and 3
    # Data-parallel neighbours that hold a whole copy of the parameters between them, e.g. those of
    # a node; stage 3 (hpZ of ZeRO++, arXiv 2306.10209). 1: all ranks share one.
    copy_within: Positive = 1
    # Parameters of fewer elements than this every rank keeps whole; stage 3 (one collective each).
    whole_below: NonNegative = 100_000


class ParallelConfig(Section):
    """How ranks divide the model and the sequence; data parallelism takes what is left."""

    tensor: Positive = 1  # ranks that share each layer's heads, MLP columns and vocabulary
    sequence: bool = False  # these ranks split the tokens between layers, too
    pipeline: Positive = 1  # stages of neighbouring blocks
    interleave: Positive = 1  # pieces of the model on each stage
    context: Positive = 1  # ranks that share each row's tokens
    # How context ranks go through a step's forwards (F) and backwards (B). FB, FB, ..: one
    # micro-batch is alive, and ranks wait for one another in each. FF.., BB..: all are alive, and
    # ranks wait once a step, in forwards once more for each further segment. skewed: once a step,
    # with context - rank alive, but sends must not block.
    order: Literal["FB", "FFBB", "skewed"] = "FB"
    # Stretches of each row that are computed one after another, with what the memories carry on.
    # Gradients stop between them: their horizon is sequence_length / segments tokens.
    segments: Positive = 1
    zero: ZeroConfig = ZeroConfig()


class ValidationConfig(Section):
    every: NonNegative = 100  # steps; 0: never
    rows: NonNegative = 0  # rows of the validation split; 0: all of it


class CheckpointConfig(Section):
    every_steps: NonNegative = 100
    every_minutes: Annotated[float, Field(ge=0)] = 0.0
    keep_last: Positive = 2
    keep_best: bool = True  # by validation loss
    keep_every: NonNegative = 0  # steps; keep each n-th for good
    # async: training waits for a copy into host memory, the rest is done behind it; local: for a
    # write to the node's own disk (TMPDIR) instead, if memory is scarce. The same files in each.
    mode: Literal["async", "local", "sync"] = "async"


class SampleConfig(Section):
    """Text that the model writes at each validation."""

    tokens: Annotated[int, Field(ge=0, le=1024)] = 32  # of each text; 0: none is written
    # Default: the beginning of a document of the validation split.
    prompts: list[str] = Field(default=[], max_length=16)
    temperature: Annotated[float, Field(ge=0)] = 0.8  # 0: the likeliest token
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95  # draw among the likeliest, so much in all


class StragglerConfig(Section):
    """A rank that holds the others up is named: in the log, metrics.jsonl and TensorBoard."""

    every: NonNegative = 20  # steps between two looks at each rank's own time; 0: never
    factor: Annotated[float, Field(gt=1)] = 1.5  # over the median of the ranks with equal work
    looks: Positive = 3  # in a row


class LogConfig(Section):
    every: Positive = 1  # steps between metric records
    console_every: Positive = 10  # steps between console lines
    memory_every: NonNegative = 50  # steps between the memory's panels; 0: never
    tensorboard: bool = True
    sample: SampleConfig = SampleConfig()
    straggler: StragglerConfig = StragglerConfig()


class ProfileConfig(Section):
    """A look at some steps of a run, below RUN/profile; it changes no number. Default: none."""

    steps: tuple[Positive, Positive] | None = None  # the first and the last of them
    ranks: tuple[NonNegative, ...] = (0,)  # that look

    @model_validator(mode="after")
    def _forward(self) -> ProfileConfig:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            first, last = self.steps
            raise ValueError(
                f"profile.steps=[{first},{last}]; the first step comes before the last; "
                f"try profile.steps=[{last},{first}]"
            )
        return self


class WatchdogConfig(Section):
    """How long a rank may make no progress before all end with 77, their stacks told. Progress is
    the beginning or end of a phase (see phases.py): each micro-batch, also of a validation, counts.
    So a step may take as long as it likes while its parts go on: one that is slow is no hang, and
    is told of elsewhere (time/step_s, log.straggler). 0: no such limit."""

    step_minutes: Minutes = 10.0  # anywhere not listed below
    # Until the first step is done: joining, building; and wherever a checkpoint is loaded.
    start_minutes: Minutes = 30.0
    data_minutes: Minutes = 30.0  # waiting for batches: a fetch that is tried again may take long
    checkpoint_minutes: Minutes = 30.0  # saving one, where training waits for it
    # A rank that gives no sign of life for so long, while this one makes no progress, is lost.
    silent_seconds: Annotated[float, Field(ge=0)] = 45.0


class DivergenceConfig(Section):
    """What becomes of a step whose loss or gradients are not finite, or whose loss is a spike. In
    no case does it change a weight or a moment."""

    # stop: exit 4. skip: the step is done with the next batch instead. rewind: back to a checkpoint
    # (the newest of checkpoint.every_steps, if there is one), and on behind the bad batch.
    on: Literal["stop", "skip", "rewind"] = "stop"
    # A loss so many robust standard deviations (1.4826 times the median absolute deviation) above
    # the median of the last `window` losses is a spike, e.g. 12; 0: spikes are not looked at.
    spike: Annotated[float, Field(ge=0)] = 0.0
    window: Annotated[int, Field(ge=8)] = 100  # steps; before so many losses none is a spike
    # So many skips or rewinds in the last `within` steps; one more ends the run with exit 4.
    budget: Positive = 3
    within: Positive = 1000  # steps

    @property
    def watches(self) -> bool:
        """Whether it does more than stop at what is not finite."""
        return self.on != "stop" or self.spike > 0


class RunConfig(Section):
    folder: str  # everything the run writes
    model: ModelConfig = ModelConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    divergence: DivergenceConfig = DivergenceConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        t, align = self.data.sequence_length, self.model.alignment
        if t % align:
            raise ValueError(
                f"data.sequence_length={t}, model.memory.chunk={align}; a row must be a whole "
                f"number of chunks; try data.sequence_length={max(align, t // align * align)}"
            )
        if align not in ALIGNMENTS:
            raise ValueError(
                f"model.memory.chunk={align}; documents are padded to one of {ALIGNMENTS}; "
                "use one of these chunks"
            )
        streamed = [name for name, source in self.data.sources.items() if source.stream]
        if streamed and self.validation.every and not self.data.validation:
            raise ValueError(
                f"data.sources.{streamed[0]}.stream=true, validation.every="
                f"{self.validation.every}; a streamed source has no validation split; name "
                "prepared folders in data.validation, or set validation.every=0"
            )
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.global_batch={self.train.global_batch}, train.micro_batch="
                f"{self.train.micro_batch}; micro-batches must fill the global batch; use a "
                "micro_batch that divides it"
            )
        ramp = self.train.ramp
        if ramp and (self.train.global_batch % ramp.start or ramp.start % self.train.micro_batch):
            raise ValueError(
                f"train.ramp.start={ramp.start}, train.micro_batch={self.train.micro_batch}, "
                f"train.global_batch={self.train.global_batch}; a batch grows in multiples of "
                "ramp.start, each whole micro-batches, up to global_batch; use a ramp.start that "
                "micro_batch divides and that divides global_batch"
            )
        o, steps = self.optim, self.train.steps
        if o.schedule == "wsd" and not o.decay_steps:
            raise ValueError(
                "optim.decay_steps=0, optim.schedule=wsd; wsd ends with a decay; set "
                "optim.decay_steps (about a tenth of the run), or optim.schedule=constant"
            )
        if o.schedule == "wsd" and o.warmup_steps + o.decay_steps > steps:
            raise ValueError(
                f"optim.warmup_steps={o.warmup_steps} + optim.decay_steps={o.decay_steps} > "
                f"train.steps={steps}; warm-up and decay must fit into the run; shorten them"
            )
        saves = self.checkpoint.every_steps or self.checkpoint.every_minutes
        if self.divergence.on == "rewind" and not saves:
            raise ValueError(
                "divergence.on=rewind, checkpoint.every_steps=0, checkpoint.every_minutes=0; a "
                "rewind goes back to a checkpoint; set checkpoint.every_steps"
            )
        if o.min_lr > o.lr:
            raise ValueError(
                f"optim.min_lr={o.min_lr}, optim.lr={o.lr}; the floor lies below the peak; "
                "lower optim.min_lr"
            )
        return self
