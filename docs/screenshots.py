"""Takes the pictures in docs/images from a run, by TensorBoard in a headless Chromium.

    titans-pretrain train configs/demo.yaml train.steps=120 log.memory_every=5 \
        checkpoint.every_steps=40           # once with --stop-after 80, then to its end
    python docs/screenshots.py runs/demo

Speaks the DevTools protocol over a pipe, so that it needs nothing but Chromium and TensorBoard.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image

OUT = Path(__file__).parent / "images"
# Picture -> page, width and height in pixels, seconds until it is drawn.
PAGES = {
    "curves": ("custom_scalars", 1480, 1390, 12.0),
    "memory": ("images&tagFilter=condition|gain|theta|drift", 1520, 1350, 8.0),
    "text": ("text&tagFilter=start|run/model|samples", 1480, 1330, 8.0),
}


class Browser:
    """A page of a headless Chromium."""

    def __init__(self, profile: str) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def wire() -> None:  # Chromium reads from 3 and writes to 4
            out = os.dup(theirs_out)
            os.dup2(theirs_in, 3)
            os.dup2(out, 4)

        program = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb", 0)
        self._count, self._session = 0, ""
        [page] = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _message(self) -> bytes:
        read = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            read += byte
        return bytes(read)

    def picture(self, url: str, width: int, height: int, seconds: float) -> bytes:
        """A PNG of the page at `url`."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=url)
        time.sleep(seconds)
        return base64.b64decode(self("Page.captureScreenshot", format="png")["data"])


def small(png: bytes) -> bytes:
    """The same picture in 256 colours: about half of the bytes."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        runs.mkdir()
        (runs / args.run.name).symlink_to((args.run / "tensorboard").resolve())
        options = f"--logdir runs --port {port} --samples_per_plugin images=100,text=100"
        board = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *options.split()],
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )
        browser = Browser(folder)
        try:
            wait_for(f"http://127.0.0.1:{port}/data/runs")
            for name, (page, width, height, seconds) in PAGES.items():
                url = f"http://127.0.0.1:{port}/?darkMode=false#{page}"
                picture = small(browser.picture(url, width, height, seconds))
                (args.out / f"{name}.png").write_bytes(picture)
                print(f"{args.out / name}.png: {len(picture):,} bytes")
        finally:
            board.terminate()
            browser.process.terminate()
            board.wait()
            browser.process.wait()


def wait_for(url: str, seconds: float = 120.0) -> None:
    """Until TensorBoard answers with the run."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url) as answer:
                if json.load(answer):
                    return
        except OSError:
            pass  # it is starting
        time.sleep(0.5)
    raise SystemExit("TensorBoard does not answer")


if __name__ == "__main__":
    main()
