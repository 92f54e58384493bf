"""The continuous check's own rules: skips fail it, the time limit names tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _pytest(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess:
    (folder / "test_it.py").write_text("import pytest, time\n" + source)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = cuda: x\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.ci_plugin", *options, str(folder)]
    return subprocess.run(
        [*command, "-c", str(folder / "pytest.ini"), "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


CUDA = "@pytest.mark.cuda\ndef test_a(): pytest.skip('no device')\n"


def test_a_skip_for_want_of_cuda_is_listed_and_passes(tmp_path):
    out = _pytest(tmp_path, CUDA + "def test_b(): pass\n")
    assert out.returncode == 0
    assert "needs CUDA: test_it.py::test_a: Skipped: no device" in out.stdout
    assert "1 passed, 1 skipped" in out.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "source",
    [
        "def test_b(): pytest.skip('tired')\n",
        "@pytest.mark.skipif(True, reason='tired')\ndef test_b(): pass\n",
        "pytest.skip('tired', allow_module_level=True)\n",
    ],
)
def test_any_other_skip_fails(tmp_path, source):
    out = _pytest(tmp_path, CUDA + source + "def test_c(): pass\n")
    assert out.returncode != 0
    assert "NOT ALLOWED" in out.stdout
    assert "tired" in out.stdout


STOP = "request.config.pluginmanager.get_plugin('time-limit-and-skips')._stop()"


def test_the_time_limit_names_the_running_and_the_slowest_test(tmp_path):
    source = (
        "def test_a(): time.sleep(0.3)\n"
        f"def test_b(request):\n    {STOP}\n    time.sleep(60)\n"  # the limit comes here
    )
    out = _pytest(tmp_path, source, "--time-limit", "1000")
    assert out.returncode == 2  # interrupted
    assert "stopped after 1000 s in test_it.py::test_b; slowest so far:" in out.stderr
    assert " s  test_it.py::test_a" in out.stderr
    assert " s  test_it.py::test_a" in out.stdout
    assert "= 1 passed in" in out.stdout.splitlines()[-1]


def test_with_two_workers_all_that_runs_is_named_and_a_skip_of_a_module_once(tmp_path):
    (tmp_path / "test_skipped.py").write_text(
        "import pytest\npytest.skip('t', allow_module_level=True)"
    )
    (tmp_path / "test_other.py").write_text("import time\ndef test_b(): time.sleep(30)\n")
    out = _pytest(tmp_path, "def test_a(): time.sleep(30)\n", "-n", "2", "--time-limit", "12")
    assert out.returncode == 2
    named = out.stderr.split("stopped after 12 s in ")[1].split(";")[0]
    assert sorted(named.split(", ")) == ["test_it.py::test_a", "test_other.py::test_b"]
    assert out.stdout.count("NOT ALLOWED (only cuda tests may be skipped): test_skipped.py") == 1


def test_a_test_that_does_not_let_go_is_ended(tmp_path):
    source = (
        f"def test_a(request):\n    stop = {STOP.removesuffix('()')}\n"
        "    while True:\n"
        "        try:\n"
        "            stop(), time.sleep(60)\n"
        "        except BaseException:\n"
        "            stop = int\n"
    )
    out = _pytest(tmp_path, source, "--time-limit-patience", "0.5")
    assert out.returncode == 124
    assert "stopped after 4500 s in test_it.py::test_a" in out.stderr


@pytest.mark.parametrize("background", [False, True])
def test_the_clock_starts_with_the_session_and_stops_it(background, tmp_path):
    """Also where a shell's background ignores SIGINT for all that it starts."""
    handler = signal.SIG_IGN if background else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)
    try:
        out = _pytest(tmp_path, "def test_a(): time.sleep(60)\n", "--time-limit", "1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.returncode == 2
    assert "stopped after 1 s in " in out.stderr
