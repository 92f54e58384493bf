"""RunConfig: the whole run as one frozen, validated tree.

defaults <- YAML file <- `a.b=c` on the command line. Unknown keys are refused with their path and
the nearest known name; the resolved tree is saved with the run and with each checkpoint. It is
handed down, never fetched, never changed. Imports neither torch nor any engine.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from titans_pretrain.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

# Document alignments for which the manifest holds padded token counts (columns of the address).
ALIGNMENTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class MemoryConfig(Section):
    """The neural long-term memory (Titans, arXiv 2501.00663, section 3)."""

    rule: Literal["titans"] = "titans"  # memory/rules.py
    depth: Annotated[int, Field(ge=1, le=3)] = 2
    expansion: Positive = 4  # hidden width of the memory MLP = expansion * head width
    activation: Literal["gelu", "silu"] = "gelu"
    residual_norm: bool = True  # M(x) = x + LayerNorm(F(x)); false: M(x) = F(x)
    chunk: Positive = 16  # tokens whose gradients share one anchor: part of the function
    decay_to: Literal["init", "zero"] = "init"
    read: Literal["inclusive", "exclusive"] = "inclusive"  # read at W_t or at W_{t-1}
    retrieved: Literal["pool1", "pool2", "learned"] = "pool1"  # MAC: where memory tokens come from
    learned_queries: Positive = 256  # MAC with retrieved=learned: memory tokens a segment


class ModelConfig(Section):
    """A stack of blocks; `variant` picks the wiring of its token mixer."""

    variant: Literal["mac", "mag", "mal", "lmm", "transformer"] = "mac"
    blocks: Positive = 12
    width: Positive = 768
    heads: Positive = 16
    kv_heads: Positive | None = None  # attention: heads of keys and values; default: as many
    mlp_width: Positive | None = None  # SwiGLU hidden width; default 8/3 width, rounded up to 64
    vocab_size: Positive | None = None  # default: the tokenizer's size, from the manifest
    tied_embeddings: bool = False
    persistent_tokens: NonNegative = 128  # learned vectors before each document (MAC: segment)
    segment: Positive = 512  # MAC: tokens of one attention segment
    # Sliding window of attention; default: 2048 in MAG and MAL, the transformer's whole document.
    window: Positive | None = None
    rope_base: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    dropout: float = Field(default=0.0, exclude=True)  # there is none; other values are refused
    memory: MemoryConfig = MemoryConfig()

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Width of attention's keys and values."""
        return (self.kv_heads or self.heads) * self.head_width

    @property
    def mlp_hidden(self) -> int:
        return self.mlp_width or -(-8 * self.width // (3 * 64)) * 64

    @property
    def attention_window(self) -> int | None:
        """Tokens that attention sees back, itself included; None: the whole document."""
        if self.variant in ("mag", "mal"):
            return self.window or 2048
        return self.window

    @property
    def alignment(self) -> int:
        """Each packed document is padded to a multiple of so many tokens: the memory's chunk."""
        return 1 if self.variant == "transformer" else self.memory.chunk

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(
                f"model.width={self.width}, model.heads={self.heads}; heads must divide width; "
                f"try model.heads={_nearest_divisor(self.width, self.heads)}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"model.width/model.heads={self.head_width}; rotary embeddings need an even head "
                "width; change model.width or model.heads"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads}, model.kv_heads={self.kv_heads}; heads of queries share "
                "those of keys and values evenly: kv_heads must divide heads; "
                f"try model.kv_heads={_nearest_divisor(self.heads, self.kv_heads)}"
            )
        if self.dropout:
            raise ValueError(
                f"model.dropout={self.dropout}; there is no dropout: its random states, one a rank "
                "(Megatron's RNG tracker), would have to be kept over recompute and in checkpoints "
                "for a run to resume exactly; remove model.dropout"
            )
        chunk = self.memory.chunk
        if self.variant == "mac" and self.segment % chunk:
            raise ValueError(
                f"model.segment={self.segment}, model.memory.chunk={chunk}; a segment must be a "
                "whole number of chunks; "
                f"try model.segment={max(chunk, self.segment // chunk * chunk)}"
            )
        if self.variant == "mac" and self.memory.retrieved == "pool2" and self.segment % 2:
            raise ValueError(
                f"model.segment={self.segment}, model.memory.retrieved=pool2; queries are pooled "
                "by two; use an even model.segment"
            )
        return self


class SetConfig(Section):
    """A prepared dataset: the folder that `titans-pretrain prepare` wrote."""

    path: str


class SourceConfig(SetConfig):
    # Share in the mix, relative to the other sources': a number, or points [sample number, weight]
    # with straight lines between them, constant beyond the first and the last.
    weight: float | list[tuple[int, float]] = 1.0
    # Read tars of texts as they are, weaker in several ways (data/streaming.py): `path` is a folder
    # of .tar files, or URLs with braces; `tokenizer` a .model file, bytes or integers:VOCAB.
    stream: bool = False
    tokenizer: str | None = None
    virtual_workers: Positive = 64  # of a streamed source; data-parallel ranks divide them

    @model_validator(mode="after")
    def _streamed(self) -> SourceConfig:
        if self.stream and self.tokenizer is None:
            raise ValueError(
                f"a source with stream: true and no tokenizer ({self.path}); texts are tokenized "
                "as they come; name a .model file as its tokenizer"
            )
        if not self.stream and self.tokenizer is not None:
            raise ValueError(
                f"a source with a tokenizer and no stream: true ({self.path}); a prepared folder "
                "holds its tokenizer; leave it out, or set stream: true"
            )
        return self

    @property
    def points(self) -> list[tuple[int, float]]:
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


def weight_at(points: Sequence[tuple[int, float]], sample: int) -> float:
    """The weight at a sample number."""
    for (start, low), (stop, high) in itertools.pairwise(points):
        if start <= sample < stop:
            return low + (sample - start) / (stop - start) * (high - low)
    return points[0][1] if sample < points[0][0] else points[-1][1]


class CacheConfig(Section):
    """Shards of sources behind URLs, kept on a disk of each node and shared by its processes."""

    folder: str | None = None  # default: $TMPDIR/titans-pretrain-UID, else ~/.cache/titans-pretrain
    gib: PositiveFloat = 50.0  # GiB of shards kept; at least two windows of 16 shards a source
    retries: NonNegative = 5  # of a fetch that failed
    timeout: PositiveFloat = 60.0  # seconds without a byte end an attempt
    backoff: PositiveFloat = 1.0  # seconds before the first retry, doubled for each later one


class DataConfig(Section):
    sources: dict[str, SourceConfig] = Field(min_length=1, max_length=256)
    # Sets that validation reads; default: the validation split of each source, under its name.
    validation: dict[str, SetConfig] = Field(default={}, max_length=256)
    sequence_length: Positive = 4096
    seed: int = 0
    workers: NonNegative = 1  # loader processes of each rank
    cache: CacheConfig = CacheConfig()
    # What stays missing, cut or damaged: stop, or leave it out and train on other rows in its place
    # (validation stops in any case).
    on_bad: Literal["stop", "quarantine"] = "stop"
    max_bad: Fraction = 0.01  # quarantine: a larger share of a source's members stops the run
    allow_changed: bool = False  # resume although sources, tokenizer or sequence length changed

    @field_validator("sources", "validation", mode="before")
    @classmethod
    def _named(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        for name, entry in value.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", str(name)):
                raise ValueError(
                    f"data.{info.field_name}: the name {name!r}; names of metrics are made of it: "
                    "letters, digits, _ . and -, 64 at most; choose another name"
                )
            if info.field_name == "sources" and isinstance(entry, dict) and "weight" in entry:
                _check_weight(f"data.sources.{name}.weight", entry["weight"])
        # The order of names in a file is no part of the mix.
        return {name: value[name] for name in sorted(value, key=str)}

    @model_validator(mode="after")
    def _mix(self) -> DataConfig:
        for kind, sets in (("sources", self.sources), ("validation", self.validation)):
            folders: dict[str, str] = {}
            for name, one in sets.items():
                other = folders.setdefault(str(Path(one.path).resolve()), name)
                if other != name:
                    raise ValueError(
                        f"data.{kind}.{other} and data.{kind}.{name} are one folder, {one.path}; "
                        "each has a folder of its own; leave one out"
                        + (" and give the other both weights" if kind == "sources" else "")
                    )
        for name, source in self.sources.items():
            if source.stream and len(self.sources) > 1:
                raise ValueError(
                    f"data.sources.{name}.stream=true among {len(self.sources)} sources; a "
                    "streamed source cannot be mixed; prepare it (titans-pretrain prepare)"
                )
            if source.stream and self.on_bad == "quarantine":
                raise ValueError(
                    f"data.on_bad=quarantine, data.sources.{name}.stream=true; only prepared "
                    "sources know what a shard should hold; prepare it, or leave on_bad out"
                )
        edges = sorted({n for source in self.sources.values() for n, _ in source.points})
        for n in edges:
            if not any(weight_at(source.points, n) for source in self.sources.values()):
                raise ValueError(
                    f"data.sources: at sample {n} every weight is 0; at any time some source is "
                    "read; give one of them a weight above 0 there"
                )
        return self


def _check_weight(where: str, weight: Any) -> None:
    """Raises ValueError (found; rule; remedy) for what is no weight."""
    rule = "a weight is a number from 0 to 1e9, or a list of points [sample number, weight]"
    points = weight if isinstance(weight, list) else [[0, weight]]
    if not points or not all(isinstance(p, list | tuple) and len(p) == 2 for p in points):
        raise ValueError(f"{where}={weight!r}; {rule}; e.g. [[0, 0.3], [1000000, 0.5]]")
    for n, w in points:
        # Text that is a number (YAML reads 1e-3 as text) will do; NaN compares with nothing.
        with contextlib.suppress(ValueError):
            w = float(w) if isinstance(w, str) else w
        if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w <= 1e9:
            raise ValueError(f"{where}={weight!r}: {w!r}; {rule}; change {where}")
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 1 << 40:
            raise ValueError(
                f"{where}={weight!r}: {n!r}; sample numbers are whole, from 0 to 2^40; "
                f"change {where}"
            )
    numbers = [n for n, _ in points]
    if sorted(set(numbers)) != numbers:
        raise ValueError(
            f"{where}={weight!r}; sample numbers of the points increase; put them in order, each "
            "once (a jump is two points one sample apart)"
        )


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
    threads: NonNegative = 0  # CPU threads of a rank; 0: cores divided by ranks on this machine

    def rows(self, step: int) -> int:
        """Rows of step number `step` (from 1) over all ranks: a function of the step alone."""
        if self.ramp is None or step > self.ramp.steps:
            return self.global_batch
        levels = self.global_batch // self.ramp.start
        return self.ramp.start * (1 + (step - 1) * (levels - 1) // self.ramp.steps)


class ParallelConfig(Section):
    """How ranks divide the model; data parallelism takes what is left of the world."""

    tensor: Positive = 1  # ranks that share each layer's heads and MLP columns


class ValidationConfig(Section):
    every: NonNegative = 100  # steps; 0: never
    rows: NonNegative = 0  # rows of the validation split; 0: all of it


class CheckpointConfig(Section):
    every_steps: NonNegative = 100
    every_minutes: Annotated[float, Field(ge=0)] = 0.0
    keep_last: Positive = 2
    keep_best: bool = True  # by validation loss
    keep_every: NonNegative = 0  # steps; keep each n-th for good


class SampleConfig(Section):
    """Text that the model writes at each validation."""

    tokens: Annotated[int, Field(ge=0, le=1024)] = 32  # of each text; 0: none is written
    # Default: the beginning of a document of the validation split.
    prompts: list[str] = Field(default=[], max_length=16)
    temperature: Annotated[float, Field(ge=0)] = 0.8  # 0: the likeliest token
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95  # draw among the likeliest, so much in all


class LogConfig(Section):
    every: Positive = 1  # steps between metric records
    console_every: Positive = 10  # steps between console lines
    memory_every: NonNegative = 50  # steps between the memory's panels; 0: never
    tensorboard: bool = True
    sample: SampleConfig = SampleConfig()


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
        if o.min_lr > o.lr:
            raise ValueError(
                f"optim.min_lr={o.min_lr}, optim.lr={o.lr}; the floor lies below the peak; "
                "lower optim.min_lr"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads `path` (YAML), applies `a.b=c` overrides and validates. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"config {path}: {e.strerror}", "the first argument is a YAML file", "give its path"
        ) from e
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"config {path}: {e}", "the file is YAML", "mend the line named") from e
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path} holds {type(tree).__name__}",
            "a config is a mapping of sections",
            "see configs/ for examples",
        )
    for override in overrides or []:
        apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str) -> RunConfig:
    """Validates a tree of plain values. Raises ConfigError naming every wrong key by its path."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise _explain(e, where) from None


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets the leaf that `a.b=c` names in a tree of plain values. Raises ConfigError."""
    key, sep, value = override.partition("=")
    if not sep or not key:
        raise ConfigError(
            f"argument {override!r}", "an override is written a.b=c", "e.g. optim.lr=3e-4"
        )
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(
                f"argument {override!r}: {name} is a value, not a section",
                "an override names a leaf of the config tree",
                "see the resolved config of a run for the tree",
            )
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise ConfigError(
            f"argument {override!r}: {e}", "the right side is a YAML value", "quote it"
        ) from e


def _explain(error: ValidationError, where: str) -> ConfigError:
    problems, rules, remedies = [], [], []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            close = _nearest_key(item["loc"])
            problems.append(f"{path}={item['input']!r}: no such key")
            rules.append("every key is known")
            remedies.append(f"did you mean {close}?" if close else f"remove {path}")
        elif item["type"] == "missing":
            problems.append(f"{path}: missing")
            rules.append("what has no default is given")
            remedies.append(f"set {path} in the file or on the command line")
        elif item["type"] == "value_error":
            found, rule, remedy = [*str(item["ctx"]["error"]).split("; ", 2), "", ""][:3]
            problems.append(found)
            rules.append(rule)
            remedies.append(remedy)
        else:
            problems.append(f"{path}={item['input']!r}")
            rules.append(item["msg"][0].lower() + item["msg"][1:])
            remedies.append(f"change {path}")
    return ConfigError(
        f"config {where}: " + "; ".join(problems),
        "; ".join(dict.fromkeys(rules)),
        "; ".join(remedies),
    )


ANY = "*"  # in a known key: any name


def _nearest_key(loc: tuple[int | str, ...]) -> str | None:
    """The known dotted key nearest to a mistyped one: a sibling first, else anywhere."""
    everything = list(_keys(RunConfig, ()))
    wrong = tuple(str(p) for p in loc)
    siblings = [
        k
        for k in everything
        if len(k) == len(wrong) and all(a in (ANY, b) for a, b in zip(k[:-1], wrong[:-1]))
    ]
    near = difflib.get_close_matches(wrong[-1], [k[-1] for k in siblings], n=1, cutoff=0.5)
    if near:
        return ".".join((*wrong[:-1], near[0]))
    by_leaf = {k[-1]: k for k in reversed(everything) if ANY not in k}
    near = difflib.get_close_matches(wrong[-1], list(by_leaf), n=1, cutoff=0.6)
    return ".".join(by_leaf[near[0]]) if near else None


def _keys(section: type[BaseModel], prefix: tuple[str, ...]) -> typing.Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        kind = field.annotation
        if (
            isinstance(kind, type)
            and not isinstance(kind, types.GenericAlias)
            and issubclass(kind, BaseModel)
        ):
            yield from _keys(kind, (*prefix, name))
        if typing.get_origin(kind) is dict:
            yield from _keys(typing.get_args(kind)[1], (*prefix, name, ANY))


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
