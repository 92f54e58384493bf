"""The lock of a run folder: one life at a time, on shared file systems too, without flock.

Each start of a run is a life, numbered from 1. Life n claims the folder by creating `lock.<n>`
through a hard link, which fails if the name exists: of two processes that want the same life one
wins. The highest number holds the folder; nobody ever removes or renames a claim that could still
be the highest, so a slow process cannot remove a newer claim. A claim is dead when

- its process says so (`released`);
- it is an earlier life of the Slurm job that claims now: Slurm starts a job again only once it has
  ended it or given its node up;
- it was made on this host: in another boot, or by a pid that is gone (or has been reused: the start
  time differs);
- it was made elsewhere (also in another pid namespace): its file was not touched for `bound`
  seconds. A thread touches it every `beat` seconds. The age is taken between two stamps of the
  file system, so that clocks of hosts need not agree.

A process that was taken for dead and comes back finds a higher number: `still_mine` is read before
every rename, so that an older life never overwrites files of a newer one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from titans_pretrain.errors import ConfigError
from titans_pretrain.run import marks
from titans_pretrain.run.files import storage_error

_log = logging.getLogger(__name__)
_CLAIM = re.compile(r"lock\.(\d{6,})")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Claim:
    """The content of a lock file (JSON)."""

    host: str
    boot: str  # boot id of the kernel; "" where it cannot be known
    namespace: str  # pid namespace: a pid means nothing outside it
    pid: int
    started: str  # start time of the process in ticks since boot: tells a reused pid
    life: int
    heartbeat: float  # Unix time, for the reader; the file's own stamp decides
    released: bool = False
    job: str = ""  # Slurm's job, where a job script has started the life,
    restart: int = 0  # and how often that job had been queued again

    @staticmethod
    def of_this_process(life: int) -> Claim:
        pid, host, slurm = os.getpid(), socket.gethostname(), marks.here()
        place = (host, _boot(), _namespace(), pid, _started(pid))
        job, restart = (slurm.job, slurm.life) if slurm else ("", 0)
        return Claim(*place, life, time.time(), job=job, restart=restart)

    def was_ended_by_slurm(self) -> bool:
        """Whether this process belongs to a later life of the same job."""
        mine = marks.here()
        return mine is not None and mine.job == self.job and mine.life > self.restart


class RunLock:
    """The claim of this life. Use as a context manager, or call `release` at the end."""

    def __init__(self, folder: Path, claim: Claim, beat: float) -> None:
        self._folder, self._claim, self._beat = folder, claim, beat
        self._path = _path(folder, claim.life)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._thread.start()

    @property
    def life(self) -> int:
        return self._claim.life

    @staticmethod
    def take(folder: Path, *, bound: float = 120.0, beat: float = 15.0) -> RunLock:
        """Claims the next life. Raises ConfigError if a living process holds the folder, OSError
        if the file system refuses."""
        while True:
            highest = max(_claims(folder), default=0)
            if highest:
                _refuse_if_alive(folder, highest, bound)
            claim = Claim.of_this_process(highest + 1)
            if not _create(folder, claim):
                continue  # another process was quicker: look at its claim
            if max(_claims(folder), default=0) == claim.life:
                break
            _path(folder, claim.life).unlink(missing_ok=True)  # we were asleep for a whole life
        for old in _claims(folder):
            if old < claim.life:
                _path(folder, old).unlink(missing_ok=True)
        if highest:
            _log.info("life %d of the run in %s", claim.life, folder)
        return RunLock(folder, claim, beat)

    def still_mine(self) -> bool:
        """Whether no newer life has claimed the folder; read before any rename into it. False too
        if the file system does not answer: whoever wanted to rename could not have either."""
        try:
            return self._newest() == self.life
        except OSError:
            return False

    def require_mine(self) -> None:
        """Raises ConfigError if a newer life has claimed the folder, NodeError on a bad disk."""
        try:
            newest = self._newest()
        except OSError as e:
            raise storage_error(e, f"reading the lock of {self._folder}") from e
        if newest != self.life:
            raise ConfigError(
                f"run folder {self._folder} no longer belongs to life {self.life} "
                f"(newest claim: life {newest})",
                "only the newest life writes; this process was taken for dead",
                "nothing to do here: the newer life continues from the last checkpoint",
            )

    def _newest(self) -> int:
        """The highest claim, 0 if there is none."""
        with contextlib.suppress(FileNotFoundError):  # a newer life has cleared ours
            # Our own change makes a network file system look afresh instead of into its cache.
            self._touch()
        return max(_claims(self._folder), default=0)

    def release(self) -> None:
        """Ends the heartbeat and marks the claim as given up; its number stays taken."""
        if self._end.is_set() or os.getpid() != self._claim.pid:
            return  # twice, or in a forked child
        self._end.set()
        self._thread.join()
        if self.still_mine():
            try:
                self._write(Claim(**{**asdict(self._claim), "released": True}))
            except OSError as e:  # the disk is full: the dead pid will free the folder as well
                _log.warning("releasing %s: %s", self._path, e)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def _keep_beating(self) -> None:
        while not self._end.wait(self._beat):
            try:
                self._write(self._claim)
                if self._is_overtaken():
                    return
            except FileNotFoundError:
                return  # a newer life has cleared our claim
            except OSError as e:  # a full disk must not look like a dead process
                _log.warning("heartbeat of %s: %s", self._path, e)
                try:
                    self._touch()
                except OSError as again:
                    _log.warning("heartbeat of %s: %s", self._path, again)

    def _is_overtaken(self) -> bool:
        """Whether a newer life holds the folder. It may have cleared our claim while we wrote it,
        between our last look and the rename: what that brought back goes again."""
        if max(_claims(self._folder), default=0) <= self.life:
            return False
        self._path.unlink(missing_ok=True)
        return True

    def _touch(self) -> None:
        os.utime(self._path)

    def _write(self, claim: Claim) -> None:
        """Rewrites our own claim; fails with FileNotFoundError if it is gone."""
        temporary = _temporary(self._folder, claim)
        try:
            temporary.write_text(_dump(claim), encoding="utf-8")
            self._touch()  # gone: raises rather than bring a cleared claim back
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Holder:
    """The newest claim on a folder, as somebody sees it who only reads."""

    life: int
    claim: Claim | None  # None: unreadable
    age: float  # seconds since its last sign of life, by this machine's clock
    alive: bool  # as far as can be told from here

    @property
    def released(self) -> bool:
        return self.claim is not None and self.claim.released


def look(folder: Path, now: float, bound: float = 120.0) -> Holder | None:
    """Who holds the folder; None if nobody ever has. Writes nothing, so that ages are right only as
    far as clocks agree; `now`: Unix time. Raises OSError."""
    life = max(_claims(folder), default=0)
    if not life:
        return None
    try:
        claim = _load(_path(folder, life))
        age = max(0.0, now - _path(folder, life).stat().st_mtime)
    except FileNotFoundError:
        return look(folder, now, bound)  # cleared by a newer life
    lives = _lives_here(claim) if claim is not None else None
    alive = age <= bound if lives is None else lives
    released = claim is not None and claim.released
    return Holder(life, claim, age, alive and not released)


def newest_claim(folder: Path) -> Claim | None:
    """The claim with the highest number, for a reader; None if there is none to read."""
    try:
        life = max(_claims(folder), default=0)
        return _load(_path(folder, life)) if life else None
    except FileNotFoundError:
        return None


def refuse_if_held_here(folder: Path) -> None:
    """Raises ConfigError if a living process of this host holds the folder; writes nothing.

    A first look, before anything slow: all other cases are for `RunLock.take` to judge.
    """
    with contextlib.suppress(OSError):
        claim = newest_claim(folder)
        if claim is not None and not claim.released and _lives_here(claim):
            raise _in_use(folder, claim, claim.life, f"stop it: kill {claim.pid}")


def _load(path: Path) -> Claim | None:
    """None: being written where hard links do not exist, or damaged."""
    try:
        return Claim(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None


def _claims(folder: Path) -> list[int]:
    found = (_CLAIM.fullmatch(name) for name in os.listdir(folder))  # noqa: PTH208 (names only)
    return [int(m[1]) for m in found if m]


def _path(folder: Path, life: int) -> Path:
    return folder / f"lock.{life:06d}"


def _temporary(folder: Path, claim: Claim) -> Path:
    return folder / f".lock.{claim.life:06d}.{claim.host}.{claim.pid}.{threading.get_ident()}"


def _dump(claim: Claim) -> str:
    return json.dumps({**asdict(claim), "heartbeat": time.time()}) + "\n"


def _create(folder: Path, claim: Claim) -> bool:
    """Creates the claim's file with its content, or returns False if the name is taken."""
    temporary = _temporary(folder, claim)
    try:
        temporary.write_text(_dump(claim), encoding="utf-8")
        try:
            os.link(temporary, _path(folder, claim.life))
        except FileExistsError:
            # A network file system may report failure for a link that it made (a lost answer).
            return temporary.stat().st_nlink == 2
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            try:
                with _path(folder, claim.life).open("x", encoding="utf-8") as file:
                    file.write(_dump(claim))
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_if_alive(folder: Path, life: int, bound: float) -> None:
    path = _path(folder, life)
    try:
        claim = _load(path)
    except FileNotFoundError:
        return  # cleared by a newer life: creating ours will show it
    if claim is not None and (claim.released or claim.was_ended_by_slurm()):
        return
    lives = _lives_here(claim) if claim is not None else None
    if claim is not None and lives:
        raise _in_use(folder, claim, life, f"stop it: kill {claim.pid}")
    if lives is False:
        return
    age = _age(folder, path)
    if age > bound:
        return
    raise _in_use(
        folder,
        claim,
        life,
        f"stop it, or, if it died (last sign of life {age:.0f} s ago), start again in "
        f"{max(1, round(bound - age))} s",
    )


def _lives_here(claim: Claim) -> bool | None:
    """Whether the claim's process lives on this host; None if that cannot be told from here."""
    if claim.host != socket.gethostname() or not claim.boot or not _boot():
        return None
    if claim.boot != _boot():
        return False
    if claim.namespace != _namespace() or not claim.started:
        return None
    return _started(claim.pid) == claim.started


def _in_use(folder: Path, claim: Claim | None, life: int, remedy: str) -> ConfigError:
    if claim is None:
        who = f"life {life} (unreadable claim)"
    else:
        seen = time.time() - claim.heartbeat
        job = f" (Slurm job {claim.job})" if claim.job else ""
        who = f"life {life}, pid {claim.pid} on {claim.host}{job}, heartbeat {seen:.0f} s old"
    return ConfigError(
        f"run folder in use: {folder} is held by {who}",
        "one process group at a time writes to a run folder",
        f"{remedy}; or set another folder=",
    )


def _age(folder: Path, path: Path) -> float:
    """Seconds since `path` was touched, by the file system's clock."""
    probe = folder / f".age.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start time of a process (ticks since boot), "" if it is gone or only waits to be reaped."""
    # The second field is the command in brackets, which may itself hold brackets and blanks.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in "ZX":
        return ""
    return fields[19]
