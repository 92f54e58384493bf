"""Files behind URLs: opened by webdataset, watched for stalls, tried again, checked on arrival.

`webdataset.gopen` opens every URL, so its table of schemes and its environment variables hold:
`GOPEN_REWRITE="s3://=pipe:my-command s3://"`, `USE_AIS_FOR`, handlers put into
`webdataset.gopen.gopen_schemes`. Two things of 1.0.2 are replaced where the table still has them:
its `curl` hides up to 30 attempts of its own and cannot go on in the middle of a file, and it has
no `s3`, which is read by `aws s3 cp URL -` here. `gs` is its own (`gsutil cat`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import math
import os
import random
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit, urlunsplit

from titans_pretrain.errors import ConfigError, NodeError

log = logging.getLogger("titans_pretrain.data.remote")

READ = 1 << 20  # bytes read at a time
LONGEST = 60.0  # seconds between two attempts at most
GONE = re.compile(
    r"returned error: (401|403|404|410)\b|No such file"
)  # asking again would not help
WHOLE = re.compile(r"returned error: 416\b|exit 33\b|support byte ranges")  # cannot be continued


@dataclass(frozen=True)
class Wanted:
    """A file and what is known of its content; `bytes` None: whatever comes."""

    url: str
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Patience:
    """`retries` more attempts, the first after about `backoff` seconds, each later one after
    twice as long; `timeout` seconds without a byte end an attempt."""

    retries: int
    timeout: float
    backoff: float

    def pause(self, attempt: int) -> float:
        """Seconds to wait after attempt number `attempt` (from 0), with jitter: the ranks of a
        job that failed together do not come back together."""
        return min(LONGEST, self.backoff * 2**attempt) * random.Random().uniform(0.5, 1.5)


class FetchFailed(Exception):
    """A file that did not come, or not as it should be, after all attempts.

    `whole`: it came as it is there, to its end, and is another one than was prepared.
    """

    def __init__(self, url: str, offset: int, reason: str, whole: bool = False) -> None:
        self.url, self.offset, self.reason, self.whole = shown(url), offset, reason, whole
        super().__init__(f"{self.url}: at byte {offset}: {reason}")


class _Broken(Exception):
    """One attempt that failed at byte `offset`."""

    def __init__(
        self, offset: int, reason: str, *, goes_on: bool = False, whole: bool = False
    ) -> None:
        self.offset, self.reason, self.goes_on, self.whole = offset, reason, goes_on, whole


def is_url(path: str) -> bool:
    """Whether a source's path names a scheme (`http:`, `s3:`, `file:`, ...)."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:", path) is not None


def join(url: str, name: str) -> str:
    """The URL of file `name` in the folder `url`; a query (a signature) stays at the end."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def shown(url: str) -> str:
    """The URL for messages: without user, password and query, which may be secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    query = "..." if parts.query else ""
    return urlunsplit(parts._replace(netloc=host, query=query))


def require_scheme(url: str) -> None:
    """Raises ConfigError where nothing can open the URL."""
    gopen = _gopen()
    known = sorted({*gopen.gopen_schemes, "file", "s3"} - {"__default__", "pipe"})
    scheme = urlsplit(gopen.rewrite_url(url)).scheme
    if scheme not in known and scheme != "pipe":
        raise ConfigError(
            f"source {shown(url)}: unknown scheme {scheme!r}",
            f"a source is a folder or a URL of {', '.join(known)}",
            "correct the URL, or map it to a command with GOPEN_REWRITE",
        )


def _never() -> bool:
    return False


def fetch(
    wanted: Wanted, part: Path, patience: Patience, stopped: Callable[[], bool] = _never
) -> None:
    """Brings the file to `part`, going on behind the bytes that lie there already.

    Each failed attempt is logged with URL, byte and reason. Raises FetchFailed after the last
    one, or once `stopped()`; `part` then holds what came. Raises NodeError where a program is
    missing, OSError where the disk refuses.
    """
    goes_on = True
    for attempt in range(patience.retries + 1):
        try:
            _attempt(wanted, part, patience.timeout, goes_on, stopped)
            return
        except _Broken as e:
            goes_on = e.goes_on
            _pause_or_fail(wanted.url, e, patience, attempt, stopped)


def _attempt(
    wanted: Wanted, part: Path, timeout: float, goes_on: bool, stopped: Callable[[], bool]
) -> None:
    with part.open("ab") as out:
        begun = out.tell()
        if begun and (not goes_on or not _continues(wanted.url) or begun >= (wanted.bytes or 0)):
            out.truncate(0)
            begun = 0
        size = _transfer(wanted, out, begun, timeout, stopped)
    if wanted.bytes is not None and size < wanted.bytes:
        raise _Broken(size, f"it ends here; {wanted.bytes} bytes were prepared", whole=True)
    if wanted.sha256 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.sha256:
            why = f"sha256 {found[:16]}... of {size} bytes, prepared {wanted.sha256[:16]}..."
            raise _Broken(0, why, whole=True)


def _transfer(
    wanted: Wanted, out: BinaryIO, begun: int, timeout: float, stopped: Callable[[], bool]
) -> int:
    """Appends the file's bytes from `begun` on; returns how many there are then."""
    at = begun
    with contextlib.closing(_pieces(wanted.url, begun, timeout, stopped)) as pieces:
        for data in pieces:
            out.write(data)
            at += len(data)
            if wanted.bytes is not None and at > wanted.bytes:
                why = f"it goes on; {wanted.bytes} bytes were prepared"
                raise _Broken(wanted.bytes, why, whole=True)
    return at


def _pieces(
    url: str, begun: int, timeout: float, stopped: Callable[[], bool] = _never
) -> Generator[bytes, None, None]:
    """One attempt: the file's bytes from `begun` on, as they come. Raises _Broken."""
    at = begun
    stream = _opened(url, begun, timeout)
    try:
        raw = getattr(stream, "stream", stream)  # a webdataset Pipe holds the stream
        poll = select.poll()
        poll.register(raw.fileno(), select.POLLIN)
        heard = time.monotonic()
        while True:
            left = heard + timeout - time.monotonic()
            if stopped():
                raise _Broken(at, "no longer wanted", goes_on=True)
            if left <= 0:
                raise _Broken(at, f"no byte for {timeout:g} s", goes_on=True)
            if not poll.poll(1000 * min(left, 0.5)):
                continue
            try:
                data = os.read(raw.fileno(), READ)
            except OSError as e:
                raise _Broken(at, e.strerror or str(e), goes_on=True) from e
            if not data:
                break
            yield data
            at, heard = at + len(data), time.monotonic()
        why = _verdict(stream, timeout)
        if why:
            raise _Broken(at, why, goes_on=not WHOLE.search(why))
    finally:
        _close(stream)


def read_through(url: str, patience: Patience) -> Generator[bytes, None, None]:
    """The bytes of a file that is read once, front to back, and kept nowhere.

    A broken transfer is tried again and goes on where it ended. Raises FetchFailed after the last
    attempt without a further byte, NodeError where a program is missing.
    """
    at = attempt = 0
    while True:
        # What cannot be continued is read again up to there.
        begun = at if _continues(url) else 0
        here = begun
        try:
            with contextlib.closing(_pieces(url, begun, patience.timeout)) as pieces:
                for data in pieces:
                    new = data[max(0, at - here) :]
                    here += len(data)
                    if new:
                        at, attempt = at + len(new), 0
                        yield new
            return
        except _Broken as e:
            _pause_or_fail(url, e, patience, attempt)
            attempt += 1


def _continues(url: str) -> bool:
    return urlsplit(_gopen().rewrite_url(url)).scheme in ("", "http", "https", "file")


def _pause_or_fail(
    url: str, e: _Broken, patience: Patience, attempt: int, stopped: Callable[[], bool] = _never
) -> None:
    """Logs a failed attempt, and waits for the next. Raises FetchFailed if it was the last."""
    if stopped():
        raise FetchFailed(url, e.offset, e.reason) from e
    last = attempt == patience.retries or GONE.search(e.reason)
    pause = 0.0 if last else patience.pause(attempt)
    log.warning(
        "%s: at byte %d: %s (attempt %d of %d%s)",
        shown(url),
        e.offset,
        e.reason,
        attempt + 1,
        patience.retries + 1,
        "" if last else f"; again in {pause:.1f} s",
    )
    if last:
        raise FetchFailed(url, e.offset, e.reason, e.whole) from e
    end = time.monotonic() + pause
    while time.monotonic() < end and not stopped():
        time.sleep(min(0.2, pause))


def _opened(url: str, begun: int, timeout: float) -> Any:
    gopen = _gopen()
    scheme = urlsplit(gopen.rewrite_url(url)).scheme
    options = {"begun": begun, "timeout": timeout} if _is_ours(gopen, scheme) else {}
    try:
        stream = gopen.gopen(url, "rb", **options)
    except FileNotFoundError as e:
        if scheme in ("", "file"):
            raise _Broken(begun, e.strerror or "not found") from e
        raise _no_program(str(e.filename)) from e
    except OSError as e:
        raise _Broken(begun, e.strerror or str(e)) from e
    if scheme in ("", "file") and begun:
        os.lseek(stream.fileno(), begun, os.SEEK_SET)
    return stream


def _verdict(stream: Any, timeout: float) -> str:
    """Why the command behind the stream failed; empty if it did not."""
    process = getattr(stream, "proc", None)
    if process is None:
        return ""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"its command does not end within {timeout:g} s"
    if code == 0:
        return ""
    said = ""
    if hasattr(stream, "said"):
        said = os.pread(stream.said, 4096, 0).decode("utf-8", "replace").strip()
    return f"{said.splitlines()[-1]} (exit {code})" if said else f"its command failed (exit {code})"


def _close(stream: Any) -> None:
    process = getattr(stream, "proc", None)
    if process is None:
        stream.close()
        return
    if process.poll() is None:
        process.kill()
    stream.stream.close()
    process.wait()
    if hasattr(stream, "said"):
        os.close(stream.said)


_table = threading.Lock()


def _gopen() -> Any:
    """webdataset's module, its table of schemes with our `curl` and `aws` in it."""
    gopen = importlib.import_module("webdataset.gopen")  # the package's own name is a function
    with _table:
        for scheme in ("http", "https"):
            if gopen.gopen_schemes.get(scheme) is gopen.gopen_curl:
                gopen.gopen_schemes[scheme] = _curl
        gopen.gopen_schemes.setdefault("s3", _aws)
    return gopen


def _is_ours(gopen: Any, scheme: str) -> bool:
    return gopen.gopen_schemes.get(scheme) in (_curl, _aws)


def _curl(
    url: str, mode: str = "rb", bufsize: int = 8192, begun: int = 0, timeout: float = 60.0
) -> Any:
    limit = str(max(1, math.ceil(timeout)))
    command = [
        "curl",
        "--fail",
        "--silent",
        "--show-error",
        "--location",
        "--globoff",
        "--no-buffer",
    ]
    # Curl ends a stalled transfer by itself, too: it must not outlive a reader that was killed.
    command += ["--connect-timeout", limit, "--speed-limit", "1", "--speed-time", limit]
    if begun:
        command += ["--continue-at", str(begun)]
    return _piped([*command, url], mode, bufsize)


def _aws(
    url: str, mode: str = "rb", bufsize: int = 8192, begun: int = 0, timeout: float = 60.0
) -> Any:
    return _piped(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode, bufsize)


def _piped(command: list[str], mode: str, bufsize: int) -> Any:
    if mode != "rb":
        raise ValueError(f"{mode}: sources are read only")
    if shutil.which(command[0]) is None:
        raise _no_program(command[0])
    said = os.memfd_create("stderr", os.MFD_CLOEXEC)
    pipe = _gopen().Pipe(command, mode=mode, bufsize=bufsize, stderr=said)
    pipe.said = said
    return pipe


def _no_program(name: str) -> NodeError:
    return NodeError(
        f"the program {name} was not found",
        "URLs are opened by commands: curl for http, aws for s3, gsutil for gs",
        f"install {name} on every node, or name another command with GOPEN_REWRITE",
    )
