"""Vocabularies that are the data itself: bytes, and integers that are token ids already.

    bytes             ids 0..255 are bytes; bos 256, eos 257, pad 258
    integers:VOCAB    ids 0..VOCAB-1 are the data's; bos, eos and pad follow

`bos`, `eos` and `pad` may be given as ids of the data's own; then no new ids are made for them.
What a file keeps of such a tokenizer is one line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.content import Part
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import ConfigError, DataError

MOST = 1 << 31  # ids
NAMES = ("bos", "eos", "pad")


class Raw(Tokenizer):
    """`ids` ids of the data, and those of bos, eos and pad."""

    unk = -1

    def __init__(self, ids: int, name: str, bos: int, eos: int, pad: int) -> None:
        self.ids, self.name = ids, name
        self.bos, self.eos, self.pad = bos, eos, pad
        self.vocab_size = max(ids, bos + 1, eos + 1, pad + 1)
        told = {"tokenizer": self.kind, "ids": ids, "bos": bos, "eos": eos, "pad": pad}
        self.model = (json.dumps(told) + "\n").encode()

    def decode(self, ids: Sequence[int] | NDArray) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._decode([int(i) for i in ids if i not in special and 0 <= i < self.ids])

    def pieces(self, ids: Sequence[int] | NDArray) -> list[str]:
        special = {getattr(self, name): f"<{name}>" for name in NAMES}
        return [special.get(int(i)) or self._decode([int(i)]) for i in ids]

    def describe(self) -> str:
        return (
            f"{self._about()}, {self.vocab_size:,} ids\n"
            f"sha256 {self.hash}\n"
            f"special ids: bos {self.bos}, eos {self.eos}, pad {self.pad}\n"
            f"tokens are stored as {self.dtype.itemsize * 8}-bit integers"
        )

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _about(self) -> str:
        raise NotImplementedError


class Bytes(Raw):
    """A byte is a token: any text (as UTF-8), genomes, binaries."""

    kind = content = "bytes"

    def encode_parts(self, parts: Iterable[Part]) -> NDArray[np.integer]:
        data = (part.encode() if isinstance(part, str) else bytes(part) for part in parts)
        return np.frombuffer(b"".join(data), np.uint8).astype(self.dtype)

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "backslashreplace")  # \xNN where it is no UTF-8

    def _about(self) -> str:
        return "bytes: every byte is a token"


class Integers(Raw):
    """Integers are tokens already; as text they are numbers between spaces.

    What a document's ends hold of its own bos, eos and pads is taken off: every document gets one
    bos and one eos.
    """

    kind = content = "integers"

    def encode_parts(self, parts: Iterable[Part]) -> NDArray[np.integer]:
        arrays = (self._numbers(part) if isinstance(part, str) else part for part in parts)
        pieces = [np.asarray(part).astype(self.dtype) for part in arrays]
        ids = np.concatenate([np.zeros(0, self.dtype), *pieces])
        stop = len(ids)
        while stop and ids[stop - 1] == self.pad:
            stop -= 1
        stop -= bool(stop and ids[stop - 1] == self.eos)
        return ids[int(bool(stop and ids[0] == self.bos)) : stop]

    def _numbers(self, text: str) -> NDArray[np.integer]:
        try:
            ids = np.asarray([int(word) for word in text.split()], np.int64)
        except (ValueError, OverflowError) as e:
            raise DataError(
                f"tokenizer {self.name}: {e}",
                "text for it is integers between spaces",
                f"give ids in 0..{self.ids - 1}",
            ) from e
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.ids:
            raise DataError(
                f"tokenizer {self.name}: ids {ids.min()}..{ids.max()}",
                f"ids lie in 0..{self.ids - 1}",
                "name a larger VOCAB, or check the numbers",
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def _about(self) -> str:
        return f"integers: token ids 0..{self.ids - 1} as they are given"


KINDS: dict[str, type[Raw]] = {"bytes": Bytes, "integers": Integers}


def is_named(which: str | Path) -> bool:
    """Whether a --tokenizer is one of these by name. A file of such a name: ./bytes"""
    return str(which).split(":")[0] in KINDS


def named(
    which: str,
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    complete: bool = True,
) -> Raw:
    """`bytes` or `integers:VOCAB`. Raises ConfigError."""
    kind, _, size = which.partition(":")
    wrong = bool(size) if kind == "bytes" else not size.isdecimal() or not 0 < int(size) <= MOST
    if wrong:
        raise ConfigError(
            f"--tokenizer {which}",
            f"raw vocabularies are: bytes, integers:VOCAB (1 to {MOST:,} ids)",
            "e.g. --tokenizer integers:50257",
        )
    ids = 256 if kind == "bytes" else int(size)
    special = {}
    following = ids
    for name, given in zip(NAMES, (bos, eos, pad)):
        if given is None:
            special[name], following = following, following + 1
        else:
            special[name] = _within(which, name, given, ids)
    return KINDS[kind](ids, which, **special)


def is_model(model: bytes) -> bool:
    return model.startswith(b'{"tokenizer"')


def loaded(
    model: bytes,
    name: str,
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    complete: bool = True,
) -> Raw:
    """A tokenizer from its line of JSON. Raises DataError."""
    try:
        told = json.loads(model)
        made = KINDS[told["tokenizer"]](told["ids"], name, *(told[special] for special in NAMES))
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"tokenizer {name}: {type(e).__name__} {e}",
            "a raw tokenizer's file is as `prepare` wrote it",
            "put the original file back, or prepare the folder anew",
        ) from e
    for special, given in zip(NAMES, (bos, eos, pad)):
        if given is not None:
            setattr(made, special, _within(name, special, given, made.vocab_size))
    made.model = model
    return made


def _within(tokenizer: str, name: str, given: int, ids: int) -> int:
    if not 0 <= given < ids:
        raise DataError(
            f"tokenizer {tokenizer}: {name} id {given}",
            f"a {name} that is named is one of the ids 0..{ids - 1}",
            f"leave --{name} out for an id of its own, or name one that documents never hold",
        )
    return given
