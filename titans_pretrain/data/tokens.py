"""The one tokenizer interface, and sentencepiece's: documents to ids and back, in bounded memory
for any document. Vocabularies that are the data itself (bytes, integers) are in raw_tokens.py.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from titans_pretrain.data.content import Part
from titans_pretrain.errors import DataError

LIBRARY = f"sentencepiece {sentencepiece.__version__}"
PIECE = 1 << 16  # characters encoded at a time


class Tokenizer(ABC):
    """Documents to ids and back.

    `model` is what a file keeps of it, `hash` that file's sha256; `content` is what documents hold
    ("text", "bytes" or "integers"). `unk` is -1 where nothing is unknown.
    """

    kind: str
    content: str
    model: bytes
    name: str
    vocab_size: int
    unk: int
    bos: int
    eos: int
    pad: int

    @staticmethod
    def load(which: str | Path, **special: Any) -> Tokenizer:
        """The tokenizer that a file holds, or "bytes", or "integers:VOCAB". Raises DataError.

        `bos`, `eos` and `pad` may be given as ids to stand in for the tokenizer's own.
        """
        from titans_pretrain.data import raw_tokens  # built on this module

        if raw_tokens.is_named(which):
            return raw_tokens.named(str(which), **special)
        try:
            model = Path(which).read_bytes()
        except OSError as e:
            raise DataError(
                f"tokenizer {which}: {e.strerror}",
                "a tokenizer is a sentencepiece .model file, or bytes, or integers:VOCAB",
                "give the path of a .model file, e.g. tokenizers/titans-32k.model",
            ) from e
        if raw_tokens.is_model(model):
            return raw_tokens.loaded(model, str(which), **special)
        return SentencePiece(model, str(which), **special)

    @property
    def hash(self) -> str:
        """sha256 of the model (hex)."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def header(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "tokenizer": {
                **({} if self.kind == "sentencepiece" else {"kind": self.kind}),
                "sha256": self.hash,
                "vocab_size": self.vocab_size,
                "bos": self.bos,
                "eos": self.eos,
                "pad": self.pad,
                "unk": self.unk,
            },
            "dtype": self.dtype.str,
        }

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of a text, without bos and eos."""
        return self.encode_parts([text])

    @abstractmethod
    def encode_parts(self, parts: Iterable[Part]) -> NDArray[np.integer]:
        """Ids [n] (of `dtype`) of the content that `parts` join to, whatever the parts: as
        `encode`, but holding only a few pieces of it at a time."""

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray]:
        """bos + text + eos for each document."""
        ends = np.asarray([self.bos], self.dtype), np.asarray([self.eos], self.dtype)
        return [np.concatenate([ends[0], self.encode(text), ends[1]]) for text in texts]

    @abstractmethod
    def decode(self, ids: Sequence[int] | NDArray) -> str:
        """The text of ids; bos, eos and pad vanish."""

    @abstractmethod
    def pieces(self, ids: Sequence[int] | NDArray) -> list[str]:
        """What each id stands for, to be shown."""

    @abstractmethod
    def describe(self) -> str:
        """What the tokenizer is, in words."""


class SentencePiece(Tokenizer):
    """A sentencepiece model with its special ids. Raises DataError if the model lacks one.

    `bos`, `eos` and `pad` may be given as ids to stand in for those that the model lacks;
    `complete=False` lets a model without them be looked at (its id is -1).
    """

    kind = "sentencepiece"
    content = "text"

    def __init__(
        self,
        model: bytes,
        name: str = "tokenizer",
        *,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        complete: bool = True,
    ) -> None:
        self.model, self.name, self._complete = model, name, complete
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise DataError(
                f"tokenizer {name}: {str(e).strip() or 'cannot be parsed'}",
                "a tokenizer is a sentencepiece .model file",
                "give the .model file, not the .vocab or a folder; fetch it again if it was cut",
            ) from e
        self.vocab_size = self.processor.get_piece_size()
        self.unk = self.processor.unk_id()
        self.bos = self._special("bos", self.processor.bos_id(), bos)
        self.eos = self._special("eos", self.processor.eos_id(), eos)
        self.pad = self._special("pad", self.processor.pad_id(), pad)
        # Text is cut at single spaces where pieces take the space in front of them: there, and
        # only there, encoding parts equals encoding the whole.
        self._dummy = self.processor.encode("a b") == [
            *self.processor.encode("a"),
            *self.processor.encode("b"),
        ]
        newline = self.processor.encode("\n")
        joined = self.processor.encode("\na")
        self._newline = newline if joined[: len(newline)] == newline else []

    def _special(self, name: str, own: int, given: int | None) -> int:
        value = own if given is None else given
        if not 0 <= value < self.vocab_size and (self._complete or given is not None):
            found = f"no {name} id" if given is None else f"{name} id {given}"
            raise DataError(
                f"tokenizer {self.name}: {found}",
                f"documents need bos, eos and pad ids within 0..{self.vocab_size - 1}",
                f"import the model with --{name} ID, naming a piece that text never produces",
            )
        return value

    def encode_parts(self, parts: Iterable[Part]) -> NDArray[np.integer]:
        texts = (part for part in parts if isinstance(part, str))
        ids = [np.asarray(piece, self.dtype) for piece in self._encode_pieces(texts)]
        return np.concatenate([np.zeros(0, self.dtype), *ids])

    def _encode_pieces(self, parts: Iterable[str], size: int = PIECE) -> Iterator[list[int]]:
        for piece, joint in cut(parts, self._dummy, size):
            if joint == "inside":
                # A dummy space must not appear inside a word: put a newline in front, and take
                # its ids off again.
                ids = self.processor.encode("\n" + piece) if self._newline else []
                yield ids[len(self._newline) :] if ids else self.processor.encode(piece)
            else:
                yield self.processor.encode(piece)

    def decode(self, ids: Sequence[int] | NDArray) -> str:
        return self.processor.decode([int(i) for i in ids])

    def pieces(self, ids: Sequence[int] | NDArray) -> list[str]:
        return self.processor.id_to_piece([int(i) for i in ids])

    def describe(self) -> str:
        kinds = {"byte": 0, "control": 0}
        for i in range(self.vocab_size):
            kinds["byte"] += self.processor.is_byte(i)
            kinds["control"] += self.processor.is_control(i)
        fallback = (
            "unknown characters become bytes, so any text round-trips"
            if kinds["byte"]
            else "no byte fallback: a character outside the vocabulary becomes unk"
        )
        return (
            f"sentencepiece model, {self.vocab_size:,} pieces "
            f"({kinds['byte']} bytes, {kinds['control']} control)\n"
            f"sha256 {self.hash}\n"
            f"special ids: unk {self.unk}, bos {self.bos}, eos {self.eos}, pad {self.pad}\n"
            f"tokens are stored as {self.dtype.itemsize * 8}-bit integers\n{fallback}"
        )


def cut(parts: Iterable[str], at_spaces: bool, size: int = PIECE) -> Iterator[tuple[str, str]]:
    """Cuts a text into pieces of about `size` characters, the same for any cutting into `parts`.

    Yields (piece, joint); the joint tells what precedes the piece: "start" of the text, a
    "space" (which is left out: encoding puts one before each piece), or "inside", a cut within a
    stretch without single spaces. Where `at_spaces` is False every cut is "inside".
    """
    text, joint, source = "", "start", iter(parts)
    more = True
    while more:
        held: list[str] = [text]
        length = len(text)
        while length <= size + 1 and more:
            part = next(source, None)
            more = part is not None
            held.append(part or "")
            length += len(held[-1])
        text = "".join(held)
        begin = 0
        # One character beyond the cut must be known, to tell a single space from several.
        while len(text) - begin > size + 1:
            stop = _single_space(text, begin, begin + size) if at_spaces else -1
            yield text[begin : stop if stop > 0 else begin + size], joint
            begin, joint = (stop + 1, "space") if stop > 0 else (begin + size, "inside")
        text = text[begin:]
    if text:
        yield text, joint


def _single_space(text: str, begin: int, end: int) -> int:
    """The last single space between two other characters in the later half of begin..end."""
    place = end
    while True:
        place = text.rfind(" ", begin + (end - begin) // 2, place)
        if place < 0:
            return -1
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place


def train(lines: Iterable[str], vocab_size: int, byte_fallback: bool, longest: int) -> bytes:
    """A BPE model of the lines (`longest` bytes at most), serialised.

    Identity normalisation, digits split, no whitespace removed: decoding gives back the text.
    One thread, no sampling and no path in the model: the same lines give the same bytes. Raises
    DataError where they cannot fill the vocabulary.
    """
    writer = io.BytesIO()
    # Newlines never reach the trainer (they end its sentences): bytes stand for them, or a symbol.
    coverage: dict[str, Any] = {"byte_fallback": True, "character_coverage": 0.9995}
    if not byte_fallback:
        coverage = {"user_defined_symbols": ["\n"], "character_coverage": 1.0}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            max_sentence_length=longest,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
            **coverage,
        )
    except RuntimeError as e:
        why = (str(e).strip().splitlines() or ["training failed"])[-1]
        raise DataError(
            f"tokenizer train --vocab-size {vocab_size}: {why}",
            "the text holds enough different words to fill the vocabulary, and the vocabulary "
            "holds the special pieces, the bytes (256) or characters, and some merges",
            "give more text, or another --vocab-size",
        ) from e
    return writer.getvalue()
