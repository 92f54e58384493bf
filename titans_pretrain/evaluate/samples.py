"""The text that a run writes at each validation: prompts, and what the model makes of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from titans_pretrain.config import SampleConfig
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.shards import BlockReader
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.evaluate.generate import generate

OPENING = 32  # tokens of a validation document that stand for a prompt
SECONDS = 60.0  # the other ranks wait so long at most


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str  # what follows


class Sampler:
    """Writes samples for the prompts of `config`; without any, for the beginning of a document of
    the manifest's validation split. Raises DataError if that or the tokenizer cannot be read."""

    def __init__(self, config: SampleConfig, manifest: Manifest, seed: int) -> None:
        self.config, self.seed = config, seed
        self.tokenizer = manifest.tokenizer()
        if config.prompts:
            bos = self.tokenizer.bos
            self.prompts = [[bos, *self.tokenizer.encode(p).tolist()] for p in config.prompts]
        else:
            self.prompts = [opening(manifest)]

    def __call__(self, model: nn.Module, step: int) -> list[Sample]:
        """The samples of `step`: the same whenever the model is the same."""
        told = generate(
            model,
            self.prompts,
            self.config.tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            generator=seeded(self.seed, step),
            end=self.tokenizer.eos,
            vocabulary=self.tokenizer.vocab_size,
            seconds=SECONDS,
        )
        return [
            Sample(self.tokenizer.decode(prompt), continuation(self.tokenizer, prompt, ids))
            for prompt, ids in zip(self.prompts, told, strict=True)
        ]


def opening(manifest: Manifest, tokens: int = OPENING) -> list[int]:
    """The first ids of the first document of validation that has more (else of the longest)."""
    align = manifest.header["alignments"][0]
    reader = BlockReader(manifest, "validation", align, align)
    try:
        lengths = reader.lengths(0)
        longer = (lengths > tokens).nonzero()[0]
        document = int(longer[0]) if len(longer) else int(lengths.argmax())
        begin = int(lengths[:document].sum())
        return reader.ids(0, begin, begin + min(tokens, int(lengths[document]))).tolist()
    finally:
        reader.close()


def continuation(tokenizer: Tokenizer, prompt: list[int], told: list[int]) -> str:
    """The text that `told` adds to the prompt's (a space between words is part of it)."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *told])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(told)


def seeded(seed: int, step: int) -> torch.Generator:
    """Random numbers for the samples of a step, apart from those of the training."""
    digest = hashlib.sha256(f"sample:{seed}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
