"""A node's disk cache of shards: one folder that all processes of all runs on the node share.

    FOLDER/shards/SHA256.BYTES            a shard, complete and checked (the name is its content)
    FOLDER/shards/SHA256.BYTES.part       one on its way
    FOLDER/shards/SHA256.BYTES.damaged    what came of one that failed, with SHA256.failed: why
    FOLDER/locks/                         files that only carry locks
    FOLDER/manifests/HASH/                manifests with their tables and tokenizers

Every rule is a lock of the kernel (flock), so it ends with the process that holds it:
- who fetches a shard holds its lock: a node fetches it once, the others wait;
- who needs a shard in its current or next window holds a shared lock on the file: eviction takes
  the exclusive one, oldest use first, and passes over files where it cannot;
- PARALLEL locks bound the transfers ahead of time on a node (a fetch that a row waits for is
  never held up by them).
An evicted file that is open stays readable. webdataset's own FileCache has no lock, no checksum
and no bound on what two processes fetch together.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from titans_pretrain.config import CacheConfig
from titans_pretrain.data.files import file_sha256
from titans_pretrain.data.remote import FetchFailed, Patience, Wanted, fetch
from titans_pretrain.errors import NodeError, this_node

log = logging.getLogger("titans_pretrain.data.cache")

PARALLEL = 4  # transfers ahead of time on one node
LOOK = 0.3  # seconds between looks at what others fetch
ENTRY = re.compile(r"([0-9a-f]{64})\.(\d+)(\.part|\.damaged)?")


def default_folder() -> Path:
    """Node-local where the environment names such a place (TMPDIR), else the user's cache."""
    if os.environ.get("TMPDIR"):
        return Path(os.environ["TMPDIR"]) / f"titans-pretrain-{os.getuid()}"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "titans-pretrain"


def open_cache(config: CacheConfig) -> Cache:
    """This process's view of the node's cache. Raises NodeError where it cannot be written."""
    return _open_cache(config, os.getpid())


@functools.lru_cache(maxsize=8)
def _open_cache(config: CacheConfig, _process: int) -> Cache:
    folder = Path(config.folder).expanduser() if config.folder else default_folder()
    patience = Patience(config.retries, config.timeout, config.backoff)
    return Cache(folder.absolute(), int(config.gib * 2**30), patience)


class Cache:
    """Args: `limit` in bytes. Raises NodeError where the folder cannot be written."""

    def __init__(self, folder: Path, limit: int, patience: Patience) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        self.shards, self.locks = folder / "shards", folder / "locks"
        # On a disk that may be all nodes', no node is at fault.
        own = os.environ.get("TMPDIR")
        self._node = this_node() if own and folder.is_relative_to(Path(own).absolute()) else ""
        with self.disk():
            for made in (self.shards, self.locks, folder / "manifests"):
                made.mkdir(parents=True, exist_ok=True)
            with locked(self.locks / "room"):
                pass
        self._begun = time.time() - 0.1  # file times are a little coarse
        self._wanted: dict[object, list[Wanted]] = {}
        self._pins: dict[str, int] = {}  # sha256 -> a file with a shared lock
        self._given_up: set[str] = set()
        self._changed = threading.Condition()
        self._ahead: threading.Thread | None = None

    def open(self, wanted: Wanted) -> int:
        """A file descriptor of the complete shard, fetched if need be.

        Raises FetchFailed (also where another process failed at it since this one began), and
        NodeError where the disk refuses.
        """
        while True:
            pin = self._pin(wanted)
            if pin is not None:
                try:
                    with self.disk():
                        return os.open(f"/proc/self/fd/{pin}", os.O_RDONLY | os.O_CLOEXEC)
                finally:
                    self._keep(wanted, pin)
            self._bring(wanted)

    def damaged(self, wanted: Wanted) -> int | None:
        """What came of a shard that failed, if anything."""
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._path(wanted, ".damaged"), os.O_RDONLY | os.O_CLOEXEC)
        return None

    def discard(self, wanted: Wanted) -> bool:
        """Throws a shard away if its copy here is no longer what arrived (a failing disk).
        Returns whether there was one, so that opening it again may help."""
        path = self._path(wanted)
        with self._changed:
            self._drop(str(wanted.sha256))
        with self.disk():
            try:
                if file_sha256(path) != wanted.sha256:
                    path.unlink()
            except FileNotFoundError:
                return False
        return True

    def want(self, owner: object, wanted: Iterable[Wanted]) -> None:
        """From now on `owner` needs these shards, most urgent first: they are fetched in the
        background as far as there is room, and kept. Replaces what it needed before."""
        with self._changed:
            self._wanted[owner] = list(wanted)
            if not self._wanted[owner]:
                del self._wanted[owner]
            keep = {str(w.sha256) for each in self._wanted.values() for w in each}
            for sha256 in self._pins.keys() - keep:
                self._drop(sha256)
            if keep and (self._ahead is None or not self._ahead.is_alive()):
                self._ahead = threading.Thread(target=self._fetch_ahead, daemon=True, name="cache")
                self._ahead.start()
            self._changed.notify_all()

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """What the operating system says against the cache, as a NodeError."""
        try:
            yield
        except OSError as e:
            raise NodeError(
                f"cache of shards {self.folder}: {e.strerror or e}",
                "shards from URLs are kept on a disk of this node that has room for them",
                "free space, lower data.cache.gib, or give another data.cache.folder",
                self._node,
            ) from e

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                missing = self._missing()
                while not missing:
                    self._changed.wait()
                    missing = self._missing()
            try:
                progress = any(self._one_ahead(wanted) for wanted in missing)
            except NodeError as e:
                # The row that needs the shard raises it where it stops the run.
                log.warning("fetching ahead: %s", e)
                progress = False
            if not progress:
                with self._changed:
                    self._changed.wait(LOOK)

    def _missing(self) -> list[Wanted]:
        wanted = [w for each in self._wanted.values() for w in each]
        return [w for w in wanted if w.sha256 not in self._pins and w.sha256 not in self._given_up]

    def _one_ahead(self, wanted: Wanted) -> bool:
        """Pins one shard, having fetched it where nobody else does and there is room."""
        pin = self._pin(wanted)
        if pin is None:
            with contextlib.ExitStack() as stack:
                slots = (locked(self.locks / f"slot-{n}", wait=False) for n in range(PARALLEL))
                if not any(stack.enter_context(slot) for slot in slots):
                    return False
                try:
                    if not self._bring(wanted, ahead=True):
                        return False
                except FetchFailed:
                    if self._is_wanted(wanted):
                        self._given_up.add(str(wanted.sha256))  # the row that needs it tries again
                    return True
            pin = self._pin(wanted)
        if pin is None:
            return False
        self._keep(wanted, pin)
        return True

    def _is_wanted(self, wanted: Wanted) -> bool:
        return any(w.sha256 == wanted.sha256 for each in self._wanted.values() for w in each)

    def _keep(self, wanted: Wanted, pin: int) -> None:
        with self._changed:
            if self._is_wanted(wanted) and wanted.sha256 not in self._pins:
                self._pins[str(wanted.sha256)] = pin
            else:
                os.close(pin)

    def _drop(self, sha256: str) -> None:
        if sha256 in self._pins:
            os.close(self._pins.pop(sha256))

    def _pin(self, wanted: Wanted) -> int | None:
        """The complete file with a shared lock, its use noted; None if it is not here."""
        path = self._path(wanted)
        with self.disk():
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)  # an eviction under way takes a moment
            told = os.fstat(file)
            if told.st_nlink == 0 or told.st_size != wanted.bytes:
                if told.st_nlink:
                    path.unlink(missing_ok=True)
                os.close(file)
                return None
            with contextlib.suppress(OSError):  # another user's file: its use is not ours to note
                os.utime(file)
            return file

    def _bring(self, wanted: Wanted, ahead: bool = False) -> bool:
        """Fetches a shard unless it is there. `ahead`: only if nobody else does and there is
        room beside all that is in use. Returns whether the shard is there."""
        sha256, path = str(wanted.sha256), self._path(wanted)
        part, failed = self._path(wanted, ".part"), self.shards / f"{sha256}.failed"
        stopped: Callable[[], bool] = (lambda: not self._is_wanted(wanted)) if ahead else _never
        with self.disk(), locked(self.locks / sha256, wait=not ahead) as mine:
            if not mine:
                return False
            if path.exists():
                return True
            self._raise_failure(failed, wanted)
            if not self._make_room(wanted, part, ahead):
                return False
            try:
                fetch(wanted, part, self.patience, stopped)
            except FetchFailed as e:
                if not ahead:  # those who waited, or come later, share the outcome
                    if e.whole:
                        part.replace(self._path(wanted, ".damaged"))
                    failed.write_text(json.dumps([e.offset, e.reason, e.whole]))
                raise
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            for old in (failed, self._path(wanted, ".damaged")):
                old.unlink(missing_ok=True)
            return True

    def _raise_failure(self, failed: Path, wanted: Wanted) -> None:
        try:
            if failed.stat().st_mtime < self._begun:
                return
            told = json.loads(failed.read_text())
        except (FileNotFoundError, ValueError):
            return
        raise FetchFailed(wanted.url, *told)

    def _make_room(self, wanted: Wanted, part: Path, ahead: bool) -> bool:
        """Evicts what was not used for longest and is in no window, until the shard fits."""
        with locked(self.locks / "room"):
            held, total = [], int(wanted.bytes or 0)
            for entry in os.scandir(self.shards):
                match = ENTRY.fullmatch(entry.name)
                if match is None or entry.name == part.name:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    told = entry.stat()
                    # A file on its way counts as what it will be.
                    size = int(match[2]) if match[3] == ".part" else told.st_size
                    held.append((told.st_mtime, size, Path(entry.path), match))
                    total += size
            for _, size, path, match in sorted(held, key=lambda h: h[0]):
                if total <= self.limit:
                    break
                if self._evict(path, match):
                    total -= size
            if total > self.limit:
                if ahead:
                    return False
                log.warning(
                    "cache of shards %s: %.2f GiB in use at once, data.cache.gib=%.2f",
                    self.folder,
                    total / 2**30,
                    self.limit / 2**30,
                )
            part.touch()
        return True

    def _evict(self, path: Path, match: re.Match[str]) -> bool:
        if match[3] == ".damaged":  # who needs it again tries again
            (self.shards / f"{match[1]}.failed").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return True
        if match[3] == ".part":  # left by a process that died, if its lock is free
            with locked(self.locks / match[1], wait=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                return free
        try:
            with locked(path, wait=False, create=False) as free:
                if free:
                    path.unlink(missing_ok=True)
                return free
        except FileNotFoundError:
            return True

    def _path(self, wanted: Wanted, suffix: str = "") -> Path:
        return self.shards / f"{wanted.sha256}.{wanted.bytes}{suffix}"


def _never() -> bool:
    return False


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, create: bool = True) -> Iterator[bool]:
    """Holds the exclusive lock of a file; yields whether it does (always, if it may wait)."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
