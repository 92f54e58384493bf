"""A signal sets a flag; the second Ctrl-C interrupts; children follow their parent."""

import os
import signal
import subprocess
import sys

import pytest

from titans_pretrain.run import signals


def test_each_signal_sets_the_flag_and_the_first_one_is_the_reason():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with signals.stop_request() as stop:
            assert not stop.requested
            assert stop.reason == ""
            os.kill(os.getpid(), number)
            assert stop.requested
            assert stop.reason == signal.Signals(number).name
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.reason == signal.Signals(number).name


def test_a_second_ctrl_c_interrupts_and_the_handlers_go_back(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = [signal.getsignal(s) for s in signals.SIGNALS]
    with signals.stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        now[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)  # the same one, forwarded
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before
    assert not stop.requested


def test_installed_twice_is_one_request_that_keeps_an_early_signal():
    with signals.stop_request() as first:
        os.kill(os.getpid(), signal.SIGUSR1)  # e.g. while torch is being imported
        assert signals.install() is first
        assert signals.install().requested


def test_a_forked_child_ignores_group_signals_but_can_be_terminated():
    script = """
import os, signal, time
from titans_pretrain.run import signals
stop = signals.install()
read, write = os.pipe()
child = os.fork()
if child == 0:
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
        os.kill(os.getpid(), number)
    os.write(write, b"alive")
    time.sleep(60)
assert os.read(read, 5) == b"alive"
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), stop.requested)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.split() == ["-15", "False"]


def test_signals_import_no_torch():
    code = "import sys; from titans_pretrain.run import signals, optim, folder; " + (
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "False", out.stderr
