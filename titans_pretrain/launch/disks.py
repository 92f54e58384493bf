"""What lies on a disk that the nodes of a job might not share: a warning, since nothing is sure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

RUN = "run folder"
MOUNTS = Path("/proc/self/mountinfo")
IN_MEMORY = ("tmpfs", "ramfs", "overlay")  # of this machine, or of the container around
ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "vfat", "ntfs3")


class Mount(NamedTuple):
    point: Path
    kind: str  # e.g. ext4, nfs4, lustre


def warnings(paths: Mapping[str, Path], nodes: int) -> Iterator[str]:
    """A line for each path (by what it is) that is not here, and one for each disk that nodes might
    not see as this machine does."""
    mounts = read_mounts()
    doubtful: dict[Mount, list[str]] = {}
    for what, path in paths.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        if what != RUN and there != path:
            yield f"{what} {path} is not there, seen from this machine"
            continue
        mount = mount_of(there, mounts)
        if mount is not None and mount.kind in IN_MEMORY + ONE_MACHINE:
            doubtful.setdefault(mount, []).append(f"{what} {path}")
    for mount, those in doubtful.items():
        how = "never shared" if mount.kind in IN_MEMORY else "shared only if exported"
        who = f"all {nodes} nodes have" if nodes > 1 else "the node has"
        yield (
            f"{who} to see what lies on {mount.point} of this machine ({mount.kind}, {how}): "
            f"{', '.join(those)}"
        )


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """Where `path` is mounted; None where that cannot be known."""
    real = path.resolve()
    found = [m for m in mounts if m.point == real or m.point in real.parents]
    # Of two on one point the later covers the earlier.
    return max(reversed(found), key=lambda m: len(m.point.parts), default=None)


def read_mounts() -> list[Mount]:
    """Linux's table of mounts; none elsewhere."""
    if not MOUNTS.exists():
        return []
    found = []
    for line in MOUNTS.read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        found.append(Mount(Path(point), after.split()[0]))
    return found
