"""A copy of what a job runs, so that later edits do not reach it: code, config, and where from."""

from __future__ import annotations

import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SCRIPT = "pretrain.sbatch"
_LEFT_OUT = ("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Code:
    """The package as it is imported here, and of what commit it is, if of any."""

    files: int
    bytes: int
    commit: str = ""  # "": not a git checkout
    difference: str = ""  # of the package's tracked files from the commit, a binary patch
    untracked: tuple[str, ...] = ()  # files of the package that git does not know

    def describe(self) -> str:
        if not self.commit:
            where = "not a git checkout"
        else:
            edited = self.difference.count("\ndiff --git ") + self.difference.startswith("diff ")
            where = f"commit {self.commit[:12]}"
            where += f", {edited} files edited since" if edited else ""
            where += f", {len(self.untracked)} unknown to git" if self.untracked else ""
        return f"{self.files} files, {self.bytes:,} bytes of {PACKAGE} ({where})"


def look_at_code() -> Code:
    """What `freeze` would copy. Changes nothing."""
    sizes = [path.stat().st_size for path in _files()]
    commit = _git("rev-parse", "HEAD")
    # A package that pip installed below some other repository is not that repository's.
    if not commit or not _git("ls-files", "--", "__init__.py"):
        return Code(len(sizes), sum(sizes))
    difference = _git("diff", "--binary", "HEAD", "--", ".")
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", ".").splitlines()
    return Code(len(sizes), sum(sizes), commit.strip(), difference, tuple(untracked))


def freeze(into: Path, code: Code, config: str, script: str, command: Sequence[str]) -> None:
    """Fills the empty folder `into`: code/, code.diff, config.yaml, pretrain.sbatch and env.txt.

    Raises OSError.
    """
    shutil.copytree(
        PACKAGE, into / "code" / PACKAGE.name, ignore=shutil.ignore_patterns(*_LEFT_OUT)
    )
    if code.difference:
        (into / "code.diff").write_text(code.difference, encoding="utf-8")
    (into / "config.yaml").write_text(config, encoding="utf-8")
    (into / SCRIPT).write_text(script, encoding="utf-8")
    (into / "env.txt").write_text("".join(f"{line}\n" for line in _told(code, command)), "utf-8")


def _files() -> Iterator[Path]:
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def _told(code: Code, command: Sequence[str]) -> Iterator[str]:
    yield f"time     {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"
    yield f"host     {socket.gethostname()}"
    yield f"command  {' '.join(command)}"
    yield f"python   {platform.python_version()} {sys.executable}"
    yield f"code     {code.describe()}"
    yield f"commit   {code.commit or 'none'}"
    yield from (f"unknown to git  {name}" for name in code.untracked)
    for name, version in sorted({(d.name, d.version) for d in distributions()}):
        yield f"{name}=={version}"


def _git(*arguments: str) -> str:
    """What git says of the package's folder; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""
