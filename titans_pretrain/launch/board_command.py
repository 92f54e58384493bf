"""`titans-pretrain board RUN ...`: TensorBoard on runs side by side."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from titans_pretrain.errors import ConfigError
from titans_pretrain.launch.runs import is_run
from titans_pretrain.run.folder import RunFolder

PORT = 6006  # TensorBoard's own
# It shows ten pictures and texts of a tag otherwise, of a whole run.
KEPT = "images=200,text=1000"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    board = commands.add_parser(
        "board",
        help="start TensorBoard on runs",
        description="Starts TensorBoard on the runs side by side, on this machine alone. A folder "
        "of runs shows those that come later, too.",
    )
    board.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="or a folder of runs")
    board.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    board.set_defaults(run=board_command)


def board_command(args: argparse.Namespace) -> int:
    """The command; becomes TensorBoard. Raises ConfigError."""
    where = _where(args.runs)
    _require_tensorboard()
    _require_free(args.port)
    print(f"http://localhost:{args.port}/#custom_scalars")
    print(
        f"from another machine: ssh -N -L {args.port}:localhost:{args.port} "
        f"{getpass.getuser()}@{socket.gethostname()}",
        flush=True,
    )
    options = [*where, "--port", str(args.port), "--samples_per_plugin", KEPT]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *options])


def _where(runs: Sequence[Path]) -> list[str]:
    """TensorBoard's option for what it shows. Raises ConfigError."""
    folders = {}
    for path in runs:
        folder = path.resolve()
        if not folder.is_dir():
            raise ConfigError(
                f"{path}: no such folder",
                "a run's folder is named, or a folder of runs",
                "titans-pretrain runs lists the runs below runs",
            )
        of_run = is_run([entry.name for entry in folder.iterdir()])
        shown = RunFolder(folder).tensorboard if of_run else folder
        if next(shown.rglob("events.out.tfevents.*"), None) is None:
            raise ConfigError(
                f"{path}: no data for TensorBoard",
                "a run with log.tensorboard=true writes it from its first step on",
                "wait for the first step, or look at what the run says: titans-pretrain runs "
                f"{path}",
            )
        folders[shown] = of_run
    if len(folders) == 1 and not all(folders.values()):
        return ["--logdir", str(next(iter(folders)))]
    shown_as = _names([folder.parent if of_run else folder for folder, of_run in folders.items()])
    if odd := next((f for f in folders if "," in str(f)), None):
        raise ConfigError(
            f"{odd} holds a comma",
            "TensorBoard divides folders by commas",
            "rename it, or name the folder that all runs lie in",
        )
    pairs = (f"{name}:{folder}" for name, folder in zip(shown_as, folders, strict=True))
    return ["--logdir_spec", ",".join(pairs)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Of each folder as many of its last parts as tell it from the others."""
    for parts in range(1, max(len(folder.parts) for folder in folders)):
        names = ["/".join(folder.parts[-parts:]).replace(":", "_") for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(number) for number in range(len(folders))]


def _require_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        raise ConfigError(
            f"no tensorboard for {sys.executable}",
            "TensorBoard is one of the packages in requirements.txt",
            "pip install -r requirements.txt",
        )


def _require_free(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("localhost", port))
        except (OSError, OverflowError) as e:
            raise ConfigError(
                f"--port {port}: {e.strerror if isinstance(e, OSError) else e}",
                "TensorBoard listens at a port of its own",
                f"end what listens there, or choose another: --port {min(port + 1, 65_535)}",
            ) from e
