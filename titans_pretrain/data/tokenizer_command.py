"""`titans-pretrain tokenizer train|inspect|import`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from titans_pretrain.data.content import BadDocument, Reading
from titans_pretrain.data.files import write_atomically
from titans_pretrain.data.inputs import documents, find_inputs
from titans_pretrain.data.tokens import LIBRARY, SentencePiece, Tokenizer, cut, train
from titans_pretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LONGEST_LINE = 8192  # characters; longer lines are cut for training


def register(subparsers: Subparsers) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    parser = subparsers.add_parser("tokenizer", help="train, inspect or import a tokenizer")
    actions = parser.add_subparsers(dest="action", required=True)

    learn = actions.add_parser("train", help="train a sentencepiece BPE model on text")
    learn.add_argument("inputs", nargs="+", metavar="INPUT", help=".txt, .jsonl, or folders")
    learn.add_argument("--out", required=True, metavar="MODEL", help="the .model file to write")
    learn.add_argument("--vocab-size", type=int, default=32_000)
    learn.add_argument(
        "--no-byte-fallback",
        action="store_true",
        help="cover every character of the text instead of falling back to bytes (small models)",
    )
    learn.add_argument("--text-key", default="text", help="key of the text in JSON lines")
    learn.add_argument("--limit", type=int, metavar="MB", help="read so much text at most")
    learn.set_defaults(run=_run_train)

    inspect = actions.add_parser("inspect", help="say what a model is")
    inspect.add_argument("model", help="a .model file, or bytes, or integers:VOCAB")
    inspect.add_argument("--text", help="also show how this text is cut")
    inspect.set_defaults(run=_run_inspect)

    adopt = actions.add_parser("import", help="check an existing model and copy it, with a card")
    adopt.add_argument("model")
    adopt.add_argument("--out", required=True, metavar="MODEL")
    for name in ("bos", "eos", "pad"):
        adopt.add_argument(f"--{name}", type=int, metavar="ID", help=f"id to use as {name}")
    adopt.set_defaults(run=_run_import)


def train_model(
    inputs: list[str],
    vocab_size: int,
    *,
    byte_fallback: bool = True,
    text_key: str = "text",
    limit_mb: int | None = None,
) -> Tokenizer:
    """A sentencepiece BPE model of the non-empty lines of the documents.

    The same text gives the same bytes. Raises DataError where it cannot fill the vocabulary.
    """
    lines = _lines(inputs, text_key, limit_mb)
    return SentencePiece(train(lines, vocab_size, byte_fallback, 8 * LONGEST_LINE), "trained")


def _lines(inputs: list[str], text_key: str, limit_mb: int | None) -> Iterator[str]:
    room = float("inf") if limit_mb is None else limit_mb * 1e6
    used = 0
    for file in find_inputs(inputs):
        for document in documents(file, Reading(text_key)):
            if document.bad:
                continue
            rest = ""
            try:
                for part in document.texts():
                    *lines, rest = (rest + part).split("\n")
                    for line in lines:
                        yield from _pieces(line)
            except BadDocument:
                continue
            yield from _pieces(rest)
            used += 1
            room -= sum(len(part.encode()) for part in document.texts())
            if room <= 0:
                return
    if not used:
        raise DataError(
            f"input {', '.join(inputs)}: no usable document",
            "a tokenizer is trained on text",
            "check the inputs and --text-key",
        )


def _pieces(line: str) -> Iterator[str]:
    line = line.strip()
    if line:
        yield from (piece for piece, _ in cut([line], at_spaces=True, size=LONGEST_LINE))


def bytes_per_token(tokenizer: Tokenizer, inputs: list[str], text_key: str = "text") -> float:
    """Mean over all documents, bos and eos not counted."""
    size = tokens = 0
    for file in find_inputs(inputs):
        for document in documents(file, Reading(text_key)):
            try:
                size += sum(len(part.encode()) for part in document.texts())
                tokens += len(tokenizer.encode_parts(document.texts()))
            except BadDocument:
                continue
    return size / max(tokens, 1)


def _card(title: str, origin: str, tokenizer: Tokenizer, more: str = "") -> str:
    return f"# {title}\n\n{origin}\n\n```\n{tokenizer.describe()}\n```\n{more}"


def _write(tokenizer: Tokenizer, out: str, card: str) -> None:
    path = Path(out)
    if path.suffix != ".model":
        raise ConfigError(f"--out {out}", "a model file ends in .model", f"--out {out}.model")
    write_atomically(path, tokenizer.model)
    write_atomically(path.with_suffix(".md"), card.encode())
    print(tokenizer.describe())
    print(f"written: {path} and its card {path.with_suffix('.md')}")


def _run_train(args: argparse.Namespace) -> int:
    tokenizer = train_model(
        args.inputs,
        args.vocab_size,
        byte_fallback=not args.no_byte_fallback,
        text_key=args.text_key,
        limit_mb=args.limit,
    )
    density = bytes_per_token(tokenizer, args.inputs, args.text_key)
    command = ["titans-pretrain", "tokenizer", "train", *args.inputs]
    command += ["--vocab-size", str(args.vocab_size), "--out", args.out]
    command += ["--no-byte-fallback"] if args.no_byte_fallback else []
    command += ["--text-key", args.text_key] if args.text_key != "text" else []
    command += ["--limit", str(args.limit)] if args.limit is not None else []
    names = ", ".join(file.name for file in find_inputs(args.inputs)[:10])
    card = _card(
        Path(args.out).stem,
        f"Trained on {names} by\n\n```\n{shlex.join(command)}\n```\n\n"
        f"({LIBRARY}); the command gives this file again, byte for "
        "byte.",
        tokenizer,
        f"\n{density:.3f} bytes per token on its training text.\n",
    )
    _write(tokenizer, args.out, card)
    print(f"{density:.3f} bytes per token on its training text")
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    tokenizer = Tokenizer.load(args.model, complete=False)
    print(tokenizer.describe())
    if args.text is not None:
        ids = [int(i) for i in tokenizer.encode(args.text)]
        print(f"{len(ids)} tokens: " + " ".join(tokenizer.pieces(ids)))
        print(f"ids: {ids}\ndecoded: {tokenizer.decode(ids)!r}")
    return 0


def _run_import(args: argparse.Namespace) -> int:
    tokenizer = Tokenizer.load(args.model, bos=args.bos, eos=args.eos, pad=args.pad)
    given = [
        f"--{n} {getattr(args, n)}" for n in ("bos", "eos", "pad") if getattr(args, n) is not None
    ]
    note = f" Pass {' '.join(given)} to `prepare` too." if given else ""
    _write(tokenizer, args.out, _card(Path(args.out).stem, f"Imported unchanged.{note}", tokenizer))
    return 0
