"""`titans-pretrain generate`: text from a run's newest checkpoint, or from one that is named."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_pretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from titans_pretrain.config import RunConfig
    from titans_pretrain.data.tokens import Tokenizer
    from titans_pretrain.model.titans import TitansLM

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def register(subparsers: Subparsers) -> None:
    """Adds the command; `args.run(args)` carries it out and returns the exit code."""
    parser = subparsers.add_parser(
        "generate",
        help="write text with a trained model",
        description="Continues prompts with the model of a checkpoint, token by token.",
    )
    parser.add_argument(
        "path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run takes its newest checkpoint"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times; default: the beginning of a document",
    )
    parser.add_argument("--tokens", type=_at_least_0, default=100, metavar="N", help="at most")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.8, help="0: the likeliest token"
    )
    parser.add_argument("--top-p", type=_share, default=0.95, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="a prepared folder; default: the run's first source"
    )
    parser.set_defaults(run=_run)


def _at_least_0(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _temperature(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no temperature from 0")
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0, up to 1")
    return number


def _run(args: argparse.Namespace) -> int:
    from titans_pretrain.evaluate.generate import generate
    from titans_pretrain.evaluate.samples import continuation, seeded

    folder, state = newest(args.path)
    config, model = load_model(folder, state)
    tokenizer = load_tokenizer(config, args.tokenizer)
    texts = args.prompt or [""]
    prompts = [[tokenizer.bos, *map(int, tokenizer.encode(text))] for text in texts]
    told = generate(
        model,
        prompts,
        args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        generator=seeded(args.seed, state["step"]),
        end=tokenizer.eos,
        vocabulary=tokenizer.vocab_size,
    )
    parts = [t + continuation(tokenizer, p, ids) for t, p, ids in zip(texts, prompts, told)]
    print("\n---\n".join(parts))
    return 0


def newest(path: Path) -> tuple[Path, dict[str, Any]]:
    """(a checkpoint's folder, its state) for a checkpoint, a run or its folder of checkpoints.

    A damaged one is told and the one before it taken. Raises ConfigError where there is none,
    DataError where all are damaged.
    """
    from titans_pretrain.run import checkpoint
    from titans_pretrain.run.folder import RunFolder

    if (path / "checksums.json").exists() or path.name.startswith("step-"):
        return path, checkpoint.verify(path)
    checkpoints = path if path.name == "checkpoints" else RunFolder(path).checkpoints
    steps = checkpoint.list_steps(checkpoints)
    for step in reversed(steps):
        folder = checkpoint.folder_of(checkpoints, step)
        try:
            return folder, checkpoint.verify(folder)
        except DataError as e:
            print(f"titans-pretrain: {e.value}", file=sys.stderr)
    if steps:
        raise DataError(
            f"{checkpoints}: all {len(steps)} checkpoints are damaged",
            "text is written by an undamaged checkpoint",
            "restore the folder from a copy, or train on",
        )
    raise ConfigError(
        f"{path}: no checkpoint",
        "a run with a checkpoint, or a folder RUN/checkpoints/step-NNNNNNNN",
        "give the path of one of these",
    )


def load_model(folder: Path, state: dict[str, Any]) -> tuple[RunConfig, TitansLM]:
    """The run's config, and the model with the checkpoint's weights, in evaluation mode."""
    import torch

    from titans_pretrain.config import parse_config
    from titans_pretrain.model.titans import TitansLM
    from titans_pretrain.run import dcp

    config = parse_config(state["config"], str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = TitansLM(config.model, device=device, dtype=dtype)
    metadata = dcp.read_metadata(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dcp.load_one(folder, f"model/{name}", metadata))
    return config, model.eval()


def load_tokenizer(config: RunConfig, folder: str | None) -> Tokenizer:
    """The tokenizer of a prepared folder: the one given, or the run's first source."""
    from titans_pretrain.data.manifest import load_manifest
    from titans_pretrain.data.sources import tokenizer_of

    place = folder or next(iter(config.data.sources.values())).path
    try:
        tokenizer = load_manifest(folder).tokenizer() if folder else tokenizer_of(config.data)
    except DataError as e:
        raise DataError(
            e.value, e.rule, "run it where the run was started, or give --tokenizer FOLDER"
        ) from e
    if tokenizer.vocab_size > (config.model.vocab_size or 0):
        raise ConfigError(
            f"{place}: a tokenizer of {tokenizer.vocab_size} pieces, a model of "
            f"{config.model.vocab_size}",
            "the model knows every piece of the tokenizer",
            "give the folder that the model was trained on with --tokenizer",
        )
    return tokenizer
