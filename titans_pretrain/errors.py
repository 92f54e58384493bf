"""Errors that a user can act on: each gives the value, the rule and the remedy, and an exit code.

| exit code | meaning                                        |
|-----------|------------------------------------------------|
| 0         | done                                           |
| 1         | anything not listed here                       |
| 2         | configuration                                  |
| 3         | data                                           |
| 4         | diverged (loss or gradient not finite; spike)  |
| 75        | saved on request, to be continued              |
| 76        | node fault (disk, device, lost peer)           |
| 77        | hang: no progress, or a rank not heard of      |
"""

from __future__ import annotations

import errno
import os
import signal
import socket

EXIT_DONE = 0
EXIT_OTHER = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_SAVED = 75
EXIT_NODE = 76
EXIT_HANG = 77


class TitansError(Exception):
    """An expected failure in one message: what was found, which rule it breaks, what to do."""

    exit_code = EXIT_OTHER

    def __init__(self, value: str, rule: str, remedy: str) -> None:
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(f"{value}\n  rule:   {rule}\n  remedy: {remedy}")

    def __reduce__(self) -> tuple[type[TitansError], tuple[str, ...]]:
        return type(self), (self.value, self.rule, self.remedy)  # ranks tell each other


class ConfigError(TitansError):
    """The configuration, the command line, or what they ask of this machine."""

    exit_code = EXIT_CONFIG


class OutOfMemoryError(ConfigError):
    """What the configuration asks for does not fit into memory. Starting again does not help."""


class DataError(TitansError):
    """Text, shards, manifests, tokenizers, or a checkpoint's content."""

    exit_code = EXIT_DATA


class DivergedError(TitansError):
    """A non-finite loss or gradient, or a spike, found before any weight or moment changed."""

    exit_code = EXIT_DIVERGED


class NodeError(TitansError):
    """A machine failed the run: disk full, folder not writable, device or peer lost.

    node: the one at fault, as Slurm calls it, where it is that node's alone (its own disk, its
    device); "" where it is a shared disk's, or nobody's. Kept as other ranks are told.
    """

    exit_code = EXIT_NODE

    def __init__(self, value: str, rule: str, remedy: str, node: str = "") -> None:
        super().__init__(value, rule, remedy)
        self.node = node

    def __reduce__(self) -> tuple[type[TitansError], tuple[str, ...]]:
        return type(self), (self.value, self.rule, self.remedy, self.node)


class HangError(TitansError):
    """No progress for longer than the watchdog allows, or a rank that is not heard of."""

    exit_code = EXIT_HANG


class LostPeerError(NodeError):
    """Another rank is gone: this one leaves alone."""


def exit_code_of(error: BaseException) -> int:
    """With which a process ends that ends with `error`."""
    if isinstance(error, TitansError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EXIT_NODE
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else EXIT_OTHER


def this_node() -> str:
    """This machine as Slurm calls it, else by its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
