"""`titans-pretrain prepare`: text, bytes or integers in, WebDataset shards and a manifest out."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from titans_pretrain.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    parser = subparsers.add_parser(
        "prepare",
        help="tokenize text into shards and a manifest",
        description="Tokenizes text, bytes or integers into WebDataset shards and a manifest. A "
        "killed or failed run is finished by the same command; nothing is done twice.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".txt (one document a file), .jsonl (one a line), .tar (WebDataset: .txt, .json or "
        ".jsonl members), plain or .gz .xz .zst; .parquet (one a row); or folders of them. For "
        "integers also .npy (1-D: one document; 2-D: one a row) and .bin; for bytes any file",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="MODEL",
        help="sentencepiece .model; or bytes; or integers:VOCAB for inputs that are ids already",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument(
        "--validation", type=float, default=0.03, metavar="SHARE", help="held out (default 0.03)"
    )
    parser.add_argument(
        "--on-bad", choices=("skip", "stop"), default="skip", help="empty or unreadable documents"
    )
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        help="of JSON objects, and column of parquet (default: text; for integers: input_ids)",
    )
    parser.add_argument(
        "--document-length",
        type=int,
        metavar="N",
        help="cut long sequences into documents of N: files as bytes, .npy (1-D) and .bin",
    )
    parser.add_argument(
        "--separator", type=int, metavar="ID", help="between the documents of a .bin file"
    )
    parser.add_argument("--member-tokens", type=int, default=1 << 20, metavar="N")
    parser.add_argument("--shard-tokens", type=int, default=1 << 27, metavar="N")
    parser.add_argument(
        "--unit-bytes", type=int, metavar="N", help="text of one unit of work (default: by size)"
    )
    for name in ("bos", "eos", "pad"):
        parser.add_argument(f"--{name}", type=int, metavar="ID", help=f"id to use as {name}")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from titans_pretrain.data.content import KEYS
    from titans_pretrain.data.inspect import summary
    from titans_pretrain.data.prepare import Settings, prepare
    from titans_pretrain.data.tokens import Tokenizer

    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}", "at least one process works", "--workers 1")
    tokenizer = Tokenizer.load(args.tokenizer, bos=args.bos, eos=args.eos, pad=args.pad)
    settings = Settings(
        validation=args.validation,
        on_bad=args.on_bad,
        text_key=KEYS[tokenizer.content] if args.text_key is None else args.text_key,
        member_tokens=args.member_tokens,
        shard_tokens=args.shard_tokens,
        unit_bytes=args.unit_bytes,
        document_length=args.document_length,
        separator=args.separator,
    )
    print("\n".join(summary(prepare(args.inputs, args.out, tokenizer, settings, args.workers))))
    return 0
