"""Checkpoints by way of each node's own disk (`checkpoint.mode: local`).

Training stands still while a rank writes its part to a disk of its node, which needs no copy of it
in host memory; a thread then brings the files into the run folder. Only there do they count: what
lies on a node's disk is lost with the node, and the checkpoint before it holds.

The disk is that of TMPDIR, which job scripts set to the site's `local_disk`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from titans_pretrain.errors import TitansError, this_node
from titans_pretrain.parallel.layout import Fragment
from titans_pretrain.run import checkpoint

if TYPE_CHECKING:
    from titans_pretrain.parallel.world import World

PIECE = 1 << 24  # bytes copied at once


class LocalDisk:
    """The files of one run on this node's disk, until they are in the run folder.

    Args:
        checkpoints: RUN/checkpoints; runs of other folders do not meet.
    """

    def __init__(self, checkpoints: Path, world: World) -> None:
        name = hashlib.sha256(str(checkpoints.absolute()).encode()).hexdigest()[:12]
        # Not gettempdir() first: it goes elsewhere without a word if TMPDIR cannot be written.
        disk = os.environ.get("TMPDIR") or tempfile.gettempdir()
        self._home = Path(disk) / f"titans-checkpoints-{name}"
        self._world = world

    def clear(self) -> None:
        """Collective. Removes what an earlier life has left on this node."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            shutil.rmtree(self._home, ignore_errors=True)
        self._world.gather_objects(None)

    def write(
        self,
        step: int,
        fragments: Sequence[Fragment],
        tensors: dict[str, torch.Tensor],
        go_on: Callable[[], None],
    ) -> Path:
        """Collective. This rank's tensors, into a folder that is returned.

        Raises NodeError on every rank, if any rank could not write, with that one's node.
        """
        folder = self._home / f"step-{step:08d}"

        def act() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_files(fragments, tensors, self._world, go_on, folder, this_node())

        try:
            self._world.agree(checkpoint.told(act, self._world, this_node()))
        except TitansError:
            self.drop(folder)
            raise
        return folder

    def bring(self, source: Path, go_on: Callable[[], None], folder: Path) -> dict[str, str]:
        """Copies this rank's files into `folder`: the sha256 of each by name. Raises OSError."""
        try:
            return {
                path.name: _copy(path, folder / path.name, go_on)
                for path in checkpoint.files_of(source, self._world.rank)
            }
        finally:
            self.drop(source)

    def drop(self, source: Path) -> None:
        """Removes this rank's files, and the folder once no rank's are left."""
        for path in checkpoint.files_of(source, self._world.rank):
            path.unlink(missing_ok=True)
        for folder in (source, self._home):
            with contextlib.suppress(OSError):  # another rank's files are in it, or it is gone
                folder.rmdir()


def _copy(source: Path, target: Path, go_on: Callable[[], None]) -> str:
    """Copies a file, down to the disk: its sha256. `go_on` is called before each piece."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while piece := read.read(PIECE):
            go_on()
            digest.update(piece)
            write.write(piece)
        write.flush()
        os.fsync(write.fileno())
    return digest.hexdigest()
