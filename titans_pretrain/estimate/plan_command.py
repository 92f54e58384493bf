"""`titans-pretrain plan CONFIG --gpu h100 --nodes 8`: what fits, how long it takes, which layout.

Imports no torch, but for --measure.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from titans_pretrain.arguments import positive
from titans_pretrain.config import HardwareConfig, RunConfig, load_config
from titans_pretrain.errors import EXIT_DONE, ConfigError
from titans_pretrain.estimate import report
from titans_pretrain.estimate.choose import Candidate, candidates, judge, nearest, ranked
from titans_pretrain.estimate.hardware import hardware_of, known
from titans_pretrain.estimate.options import require_some
from titans_pretrain.parallel.layout import plan_layout


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits where, how long it takes, and which layout to choose",
        description="Memory, time and traffic of every legal layout of CONFIG on these GPUs, from "
        "counts and from what a hardware file says. Nothing runs.",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", nargs="?", help="YAML file")
    add("overrides", nargs="*", metavar="a.b=c", help="e.g. model.variant=mag")
    add("--gpu", metavar="NAME", help=f"{', '.join(known())}, or a hardware file")
    add("--nodes", type=positive, default=1, metavar="N", help="default: 1")
    add("--gpus-per-node", type=positive, metavar="G", help="default: the hardware file's")
    add("--tokens", type=float, metavar="N", help="to train on, e.g. 100e9; default: the config's")
    add("--top", type=positive, default=10, metavar="N", help="layouts shown; default: 10")
    add("--offload", action="store_true", help="with the optimizer's state in the host's memory")
    add("--csv", type=Path, metavar="FILE", help="every legal layout, a line each")
    add("--json", type=Path, metavar="FILE", help="the same, with seconds and collectives")
    add("--plot", type=Path, metavar="FILE", help="a PNG: memory by kind, of the layouts shown")
    add("--measure", type=Path, metavar="FILE", help="time this machine; write its hardware file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises ConfigError."""
    if args.measure is not None:
        from titans_pretrain.measure.hardware import write_hardware

        write_hardware(args.measure)
        return EXIT_DONE
    if args.config is None or args.gpu is None:
        missing = "CONFIG" if args.config is None else "--gpu"
        raise ConfigError(
            f"plan without {missing}",
            "a plan is one of a config on some GPU",
            f"titans-pretrain plan CONFIG --gpu {known()[0]} --nodes 1",
        )
    config = load_config(args.config, args.overrides)
    hardware = hardware_of(args.gpu)
    if args.gpus_per_node is not None:
        hardware = hardware.model_copy(update={"gpus_per_node": args.gpus_per_node})
    _require_vocabulary(config)
    gpus = args.nodes * hardware.gpus_per_node
    tokens = _tokens(config, args.tokens)
    require_some(config, gpus)
    own, why_not = _own(config, gpus, hardware)
    found = candidates(config, gpus, hardware, offload=args.offload)
    fitting, unfit = ranked(found), nearest(found)
    for line in report.lines(
        config, hardware, own, fitting, unfit, tokens=tokens, top=args.top, why_not=why_not
    ):
        print(line)
    if args.csv is not None:
        report.write_csv(args.csv, [*fitting, *unfit], tokens)
    if args.json is not None:
        report.write_json(args.json, config, hardware, own, [*fitting, *unfit], tokens)
    if args.plot is not None:
        from titans_pretrain.estimate.plot import draw

        shown = ([own] if own is not None else []) + [*fitting[: args.top], *unfit[:3]]
        draw(args.plot, shown, hardware)
    for path in (args.csv, args.json, args.plot):
        if path is not None:
            print(f"written: {path}")
    return EXIT_DONE


def _own(config: RunConfig, gpus: int, hardware: HardwareConfig) -> tuple[Candidate | None, str]:
    """The layout that the config asks for; or why it is not legal."""
    try:
        return judge(config, plan_layout(config, gpus), hardware), ""
    except ConfigError as e:
        return None, f"{e.value}; {e.remedy}"


def _tokens(config: RunConfig, asked: float | None) -> float:
    whole = config.train.all_rows() * config.data.sequence_length
    tokens = asked if asked is not None else float(whole)
    step = config.train.global_batch * config.data.sequence_length
    if tokens < step:
        raise ConfigError(
            f"--tokens {tokens:g}",
            f"a run has a step at least, train.global_batch x data.sequence_length = {step:,}",
            f"--tokens {step:g} or more, e.g. 100e9",
        )
    return tokens


def _require_vocabulary(config: RunConfig) -> None:
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is not set",
            "embedding and head are part of a plan; a run takes their size from its data",
            "add model.vocab_size=32000, or what the tokenizer has",
        )
