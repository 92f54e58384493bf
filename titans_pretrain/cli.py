"""The one command, `titans-pretrain`. Imports neither torch nor an engine before a subcommand runs.

Exit codes: see errors.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from titans_pretrain.arguments import positive
from titans_pretrain.errors import EXIT_DONE, EXIT_NODE, ConfigError, TitansError
from titans_pretrain.importing import for_good

if TYPE_CHECKING:
    from titans_pretrain.config import RunConfig

# Commands whose module brings its own arguments: `register(subparsers)` sets `args.run`. Imported
# only when called: their libraries take seconds.
_ELSEWHERE = {
    "prepare": ("text to token shards", "titans_pretrain.data.prepare_command"),
    "tokenizer": ("train, inspect or import a tokenizer", "titans_pretrain.data.tokenizer_command"),
    "submit": ("submit a run to Slurm", "titans_pretrain.launch.submit_command"),
    "runs": ("list runs and their states", "titans_pretrain.launch.runs_command"),
    "board": ("start TensorBoard on runs", "titans_pretrain.launch.board_command"),
    "stop": ("save a run and end it for good", "titans_pretrain.launch.stop_command"),
    "generate": ("write text with a trained model", "titans_pretrain.evaluate.generate_command"),
    "plan": ("what fits where, and how long it takes", "titans_pretrain.estimate.plan_command"),
    "verify": ("check a layout against one plain process", "titans_pretrain.verify"),
    "gpu-check": ("check and time this machine's GPU", "titans_pretrain.measure.gpu_check.command"),
}
_BENCHMARKS = {
    "memory": "titans_pretrain.memory.benchmark",
    "data": "titans_pretrain.data.benchmark",
    "step": "titans_pretrain.measure.step_benchmark",
    "save": "titans_pretrain.measure.save_benchmark",
    "wave": "titans_pretrain.measure.wave_benchmark",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    code = 128 + signal.SIGPIPE
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        if not (_unread(sys.stdout) or _unread(sys.stderr)):
            raise  # a pipe of our own
    finally:
        lost = _flush(sys.stdout)
        _flush(sys.stderr)
    return _full_disk(lost) if lost is not None and code == EXIT_DONE else code


def _run(argv: Sequence[str]) -> int:
    try:
        args = _parse(argv)
        return args.run(args)
    except TitansError as e:
        _complain(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return 128 + signal.SIGINT
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _full_disk(e)


def _full_disk(e: OSError) -> int:
    _complain(
        f"writing{f' {e.filename}' if e.filename else ''}: {e.strerror}\n"
        "  rule:   what is written to has room\n  remedy: free space and start again"
    )
    return EXIT_NODE


def _complain(what: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens, or no room: the exit code still tells
        print(f"titans-pretrain: {what}", file=sys.stderr)


def _flush(stream: TextIO) -> OSError | None:
    """Flushes; if that fails, what is left goes nowhere, so that Python's own exit stays silent.
    Returns the failure, unless it is a reader (`| head`) that has read enough."""
    try:
        stream.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return None if isinstance(e, BrokenPipeError) else e
    return None


def _unread(stream: TextIO) -> bool:
    """Whether `stream` is a pipe whose reader is gone."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # closed, or no file at all
        return False


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="titans-pretrain", description="Pretraining of Titans language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, module) in _ELSEWHERE.items():
        if argv[:1] == [name]:
            with for_good():
                elsewhere = importlib.import_module(module)
            elsewhere.register(commands)
        else:
            commands.add_parser(name, help=about)
    _add_train(commands)
    inspect = commands.add_parser(
        "inspect", help="say what a config, run, checkpoint, shard or manifest holds"
    )
    inspect.add_argument("path", type=Path, help="of one of these, or of a folder of checkpoints")
    inspect.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of a config")
    inspect.add_argument("--verify", action="store_true", help="read every shard of a manifest")
    inspect.add_argument(
        "--samples", type=int, default=3, metavar="N", help="documents shown of a prepared folder"
    )
    inspect.add_argument(
        "--sequence-length", type=int, metavar="T", help="also how rows of T tokens are filled"
    )
    inspect.set_defaults(run=_inspect)
    bench = commands.add_parser(
        "bench", help="measure the memory, the data, a step, a save or the wavefront"
    )
    bench.add_argument("what", choices=sorted(_BENCHMARKS))
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; try --help")
    bench.set_defaults(run=_bench)
    compare = commands.add_parser(
        "compare",
        help="train several models on equal tokens, several seeds each, and tabulate them",
        description="Trains every run of STUDY that is not done yet and reports all of them.",
    )
    compare.add_argument("study", metavar="STUDY", type=Path, help="YAML file")
    compare.add_argument("overrides", nargs="*", metavar="a.b=c", help="for every run")
    compare.add_argument("--jobs", type=positive, metavar="N", help="runs at a time")
    compare.set_defaults(run=_compare)
    plot = commands.add_parser("plot", help="draw a run's loss curve")
    plot.add_argument("folder", metavar="RUN", type=Path, help="the run folder")
    plot.add_argument("--out", type=Path, help="PNG to write; default: RUN/loss.png")
    plot.add_argument("--no-baselines", action="store_true", help="do not read the run's data")
    plot.set_defaults(run=_plot)

    args, rest = parser.parse_known_args(argv)
    # Overrides may stand on either side of an option; argparse takes only the first group.
    if args.command in ("train", "compare", "submit", "plan", "verify"):
        args.overrides += [a for a in rest if "=" in a and not a.startswith("-")]
        rest = [a for a in rest if "=" not in a or a.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train, or continue, the run of a config",
        allow_abbrev=False,
        description="Trains the run that CONFIG describes. A run folder that holds a checkpoint "
        "is continued. Exit codes: 0 done, 2 configuration, 3 data, 4 diverged, 75 saved on "
        "request, 76 node fault, 77 hang.",
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. optim.lr=3e-4")
    train.add_argument(
        "--ranks", type=positive, metavar="N", help="processes to start on this machine"
    )
    train.add_argument(
        "--stop-after",
        type=positive,
        metavar="N",
        help="save after N steps of this start; exit 75",
    )
    train.add_argument(
        "--init-from", metavar="CHECKPOINT", help="weights to start a new run from (step 0)"
    )
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from titans_pretrain.launch.task import SlurmTask

    with SlurmTask():
        return _train_here(args)


def _train_here(args: argparse.Namespace) -> int:
    from titans_pretrain.run.lock import refuse_if_held_here

    config = _load(args.config, args.overrides)
    _before_torch(config)
    if args.ranks is not None:
        if "RANK" in os.environ:
            raise ConfigError(
                f"--ranks {args.ranks} with RANK={os.environ['RANK']} in the environment",
                "either this command starts the ranks or another launcher does",
                "drop --ranks, or unset RANK",
            )
        refuse_if_held_here(Path(config.folder))
        from titans_pretrain.launch.local import launch
        from titans_pretrain.parallel.layout import plan_layout

        plan_layout(config, args.ranks)  # before ranks start, and leave logs, to be told the same
        command = [sys.executable, "-m", "titans_pretrain", "train", args.config, *args.overrides]
        if args.stop_after is not None:
            command += ["--stop-after", str(args.stop_after)]
        if args.init_from is not None:
            command += ["--init-from", args.init_from]
        return launch(command, args.ranks, logs=Path(config.folder) / "logs")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        # Of several ranks none leaves alone: they agree on it later.
        refuse_if_held_here(Path(config.folder))
    # Before torch is imported: a request to stop may come meanwhile.
    from titans_pretrain.run import signals

    signals.install()
    with for_good():
        from titans_pretrain.train import run_training

    return run_training(config, stop_after=args.stop_after, init_from=args.init_from)


def _load(path: str, overrides: list[str]) -> RunConfig:
    """The config. Of several ranks none is refused alone: the others are told."""
    from titans_pretrain.config import load_config

    try:
        return load_config(path, overrides)
    except ConfigError:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise  # before torch is imported
        from titans_pretrain.parallel.rendezvous import told_to_all

        with told_to_all():
            raise


def _before_torch(config: RunConfig) -> None:
    """What torch, the engines and CUDA read as they begin. Ranks started from here inherit it."""
    env = os.environ
    if config.train.device == "cpu":
        _hide_gpus()
    if config.parallel.context > 1:
        # Ranks wait for one another on several streams; those that share one of CUDA's queues,
        # eight unless told otherwise, would wait for each other, too.
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if "PYTORCH_CUDA_ALLOC_CONF" not in env:  # its former name
        # Documents of any length: what is given back rarely fits what is asked for next.
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _hide_gpus() -> None:
    """What runs on the CPU sees no GPU, wherever it runs: torch and the engines choose their device
    by themselves, and must choose the same."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def _inspect(args: argparse.Namespace) -> int:
    from titans_pretrain.inspect_command import inspect

    print(inspect(args.path, args.verify, args.samples, args.sequence_length, args.overrides))
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.what == "wave":  # on the CPU always
        _hide_gpus()
    with for_good():
        benchmark = importlib.import_module(_BENCHMARKS[args.what])
    return benchmark.main(args.arguments) or 0


def _compare(args: argparse.Namespace) -> int:
    from titans_pretrain.compare import compare

    return compare(args.study, args.overrides, args.jobs)


def _plot(args: argparse.Namespace) -> int:
    from titans_pretrain.config import load_config
    from titans_pretrain.run.folder import RunFolder
    from titans_pretrain.run.plot import plot_run

    found: dict[str, float] = {}
    if not args.no_baselines:
        from titans_pretrain.data.baselines import fit_baselines

        config = load_config(RunFolder(args.folder).config)
        fitted = fit_baselines(
            config.data,
            align=config.model.alignment,
            rows=config.validation.rows,
            samples=config.train.all_rows(),
        )
        several = len(config.data.sources) > 1 or len(config.data.validation) > 1
        of = " of all sources on all sets" if several else ""
        found = {f"unigram{of}": fitted.unigram, f"bigram{of}": fitted.bigram}
    print(plot_run(args.folder, args.out or args.folder / "loss.png", found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
