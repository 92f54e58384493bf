"""The console line's figures, and the log files of the ranks."""

import io
import logging
import math
import os
import subprocess
import sys

import pytest

from titans_pretrain.errors import ConfigError
from titans_pretrain.run.console import Progress, close_log, duration, open_log, perplexity
from titans_pretrain.run.folder import RunFolder


def test_the_line_holds_rates_since_the_last_line():
    times = iter([100.0, 110.0, 114.0])
    progress = Progress(1000, 200, 200 * 50, clock=lambda: next(times))
    first = progress.line(220, 220 * 50, math.log(20), 3e-4, 1.25)
    assert first == (
        "step  220/1000  22.0%  loss 2.9957  ppl 20.00  lr 3.000e-04  grad 1.250"
        "  100 tok/s  eta 0:06:30"  # 20 steps in 10 s: 780 more in 390 s
    )
    second = progress.line(240, 240 * 50, 0.0, 1e-3, 0.5)
    assert "  ppl 1.00  " in second
    assert second.endswith("  250 tok/s  eta 0:02:32")  # 20 steps in 4 s: 760 in 152 s


def test_durations_and_perplexities():
    assert [duration(s) for s in (0.4, 59.6, 3661, 86_399, 2 * 86_400 + 3723)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "23:59:59",
        "2d 01:02:03",
    ]
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.fixture(autouse=True)
def _closed():
    yield
    close_log()


def test_each_rank_has_its_file_and_rank_0_the_console(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    open_log(folder, 0).info("first life")
    open_log(folder, 1)
    logging.getLogger("titans_pretrain.data").warning("a module's word")
    open_log(folder, 0).info("second life")
    close_log()
    zero = folder.log(0).read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in zero] == [
        "INFO titans_pretrain: first life",
        "INFO titans_pretrain: second life",
    ]
    assert folder.log(1).read_text().endswith("WARNING titans_pretrain.data: a module's word\n")
    assert capsys.readouterr().out == "first life\nsecond life\n"
    assert logging.getLogger("titans_pretrain").handlers == []


def test_a_console_whose_reader_left_falls_silent_and_the_file_goes_on(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as console:
        monkeypatch.setattr(sys, "stdout", console)
        told = io.StringIO()
        monkeypatch.setattr(sys, "stderr", told)
        log = open_log(RunFolder(tmp_path), 0)
        log.info("one")
        log.info("two")
        close_log()
    lines = RunFolder(tmp_path).log(0).read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["one", "two"]
    assert told.getvalue() == ""


def test_a_log_that_cannot_be_opened_is_a_config_error(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="File exists"):
        open_log(RunFolder(tmp_path), 0)


def test_a_log_on_a_full_disk_is_a_node_error(tmp_path):
    script = """
import resource, sys
from titans_pretrain.errors import NodeError
from titans_pretrain.run.console import open_log
from titans_pretrain.run.folder import RunFolder
log = open_log(RunFolder(sys.argv[1]), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    log.info("lost")
except NodeError as e:
    print(e.exit_code)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert out.stdout.strip() == "76", out.stderr
