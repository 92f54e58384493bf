"""A folder behind HTTP on this machine, with faults on order."""

import contextlib
import functools
import http.server
import itertools
import re
import threading
from pathlib import Path


class Faulty:
    """`faults[name]`: what happens to the requests for a file, one after another; afterwards they
    are answered as they should be.

        "cut 1000"     the connection ends after so many bytes
        "stall 1000"   it stays open and says nothing more
        "short 1000"   the file ends there
        "flip 1000"    a bit of that byte is another
        "503"          an answer of that status
    """

    def __init__(self, folder):
        self.folder, self.faults, self.requests = Path(folder), {}, []
        self.over, self.lock = threading.Event(), threading.Lock()

    def always(self, name, fault):
        self.faults[name] = itertools.repeat(fault)

    def fault(self, name):
        with self.lock:
            faults = self.faults.get(name)
            if isinstance(faults, list):
                return faults.pop(0) if faults else ""
            return next(faults) if faults is not None else ""

    def fetched(self, suffix=".tar"):
        """The names of the files that were asked for, in order."""
        return [name for name, _ in self.requests if name.endswith(suffix)]


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, server, *args):
        self.ours = server
        super().__init__(*args)

    def do_GET(self):
        name = self.path.strip("/").split("?")[0]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begun = int(asked[1]) if asked else 0
        with self.ours.lock:
            self.ours.requests.append((name, begun))
        kind, _, at = self.ours.fault(name).partition(" ")
        try:
            content = (self.ours.folder / name).read_bytes()
        except OSError:
            kind = kind or "404"
        if kind.isdecimal():
            self.send_error(int(kind))
            return
        if kind == "flip":
            content = bytearray(content)
            content[int(at)] ^= 1
        if kind == "short":
            content = content[: int(at)]
        if begun >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - begun))
        if asked:
            self.send_header("Content-Range", f"bytes {begun}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = int(at) if kind in ("cut", "stall") else len(content)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[begun:stop])
            self.wfile.flush()
            if kind == "stall":
                self.ours.over.wait(60)
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder):
    """(the server's `Faulty`, the folder's URL)."""
    faulty = Faulty(folder)
    handler = functools.partial(_Handler, faulty)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield faulty, f"http://127.0.0.1:{server.server_port}"
    finally:
        faulty.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
