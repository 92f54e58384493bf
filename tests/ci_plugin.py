"""What the continuous check adds to pytest: a time limit for all tests, and no silent skip.

    pytest -p tests.ci_plugin --time-limit SECONDS

A test that was skipped and is not marked `cuda` fails the session; skips are listed in either case.
At the limit the running tests (with pytest -n one a worker) and the slowest so far are named and
the session ends; if a running test does not let go, the process is ended.
"""

from __future__ import annotations

import os
import signal
import threading

import pytest

PATIENCE = 60.0  # seconds from the limit to the end of the process
NAMED = 30  # slowest tests, files
_STDERR = os.dup(2)  # pytest imports a -p plugin before it starts to capture


class Watch:
    """Durations, skips, and the clock."""

    def __init__(self, limit: float, patience: float = PATIENCE) -> None:
        self.limit, self.patience = limit, patience
        self.running: list[str] = []  # as many as there are workers
        self.durations: dict[str, float] = {}
        self.skips: list[tuple[str, str, bool]] = []  # test, reason, allowed
        self.timed_out = False
        self.timer = threading.Timer(limit, self._stop)
        self.timer.daemon = True

    def pytest_sessionstart(self) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.timer.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.append(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.remove(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        so_far = self.durations.get(report.nodeid, 0.0)
        self.durations[report.nodeid] = so_far + report.duration
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skips.append((report.nodeid, _reason(report), "cuda" in report.keywords))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            skip = (report.nodeid, _reason(report), False)
            if skip not in self.skips:  # each worker collects
                self.skips.append(skip)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.timer.cancel()
        if self.timed_out or any(not allowed for _, _, allowed in self.skips):
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skips:
            terminalreporter.section(f"{len(self.skips)} skipped")
        for test, reason, allowed in self.skips:
            verdict = "needs CUDA" if allowed else "NOT ALLOWED (only cuda tests may be skipped)"
            terminalreporter.line(f"{verdict}: {test}: {reason}")
        if len(files := self.by_file()) > 1:
            terminalreporter.section("slowest files")
            for file, seconds in files[:NAMED]:
                terminalreporter.line(f"{seconds:8.1f} s  {file}")
        if self.timed_out:
            terminalreporter.section("time limit")
            for line in self.slowest():
                terminalreporter.line(line)

    def by_file(self) -> list[tuple[str, float]]:
        """Seconds of each file's tests, the slowest file first."""
        found: dict[str, float] = {}
        for test, seconds in self.durations.items():
            file = test.partition("::")[0]
            found[file] = found.get(file, 0.0) + seconds
        return sorted(found.items(), key=lambda item: -item[1])

    def slowest(self) -> list[str]:
        ranked = sorted(self.durations.items(), key=lambda item: -item[1])[:NAMED]
        running = ", ".join(self.running) or "no test"
        return [
            f"stopped after {self.limit:.0f} s in {running}; slowest so far:",
            *(f"{seconds:8.1f} s  {test}" for test, seconds in ranked),
        ]

    def _stop(self) -> None:
        self.timed_out = True
        # At once and past pytest's capture: the summary may never come.
        os.write(_STDERR, "\n".join(["", *self.slowest(), ""]).encode())
        end = threading.Timer(self.patience, lambda: os._exit(124))
        end.daemon = True
        end.start()
        # To the main thread itself: another one's handler would not wake it from a sleep.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--time-limit", type=float, default=4500.0, help="seconds for all tests")
    parser.addoption("--time-limit-patience", type=float, default=PATIENCE)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker of pytest-xdist: its controller watches
    watch = Watch(config.getoption("--time-limit"), config.getoption("--time-limit-patience"))
    config.pluginmanager.register(watch, "time-limit-and-skips")
