"""`titans-pretrain board`: what TensorBoard is started with, and what is refused before."""

import os
import socket
import sys
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.errors import EXIT_CONFIG


def made(run: Path, events: bool = True) -> Path:
    (run / "tensorboard").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "config.yaml").write_text("")
    if events:
        (run / "tensorboard" / "events.out.tfevents.1.host.2.3").write_bytes(b"")
    return run


class Became(Exception):
    """The process would be another one now."""


@pytest.fixture
def became(monkeypatch):
    """The command line that the process becomes."""
    commands = []

    def execv(program, arguments):
        assert program == arguments[0] == sys.executable
        commands.append(arguments[1:])
        raise Became

    monkeypatch.setattr(os, "execv", execv)
    return commands


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_runs_stand_side_by_side(tmp_path, became, port, capsys):
    runs = [made(tmp_path / name) for name in ("x/a", "y/a", "y/b")]
    with pytest.raises(Became):
        cli.main(["board", *map(str, runs), "--port", str(port)])
    [command] = became
    spec = ",".join(f"{run.parent.name}/{run.name}:{run}/tensorboard" for run in runs)
    assert command == [
        *("-m", "tensorboard.main", "--logdir_spec", spec, "--port", str(port)),
        *("--samples_per_plugin", "images=200,text=1000"),
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"http://localhost:{port}/#custom_scalars"
    assert f"ssh -N -L {port}:localhost:{port} " in second


def test_one_run_has_its_name_and_a_folder_of_runs_is_looked_into(tmp_path, became, port):
    made(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path):
        with pytest.raises(Became):
            cli.main(["board", str(folder), "--port", str(port)])
    assert became[0][2:4] == ["--logdir_spec", f"a:{tmp_path}/a/tensorboard"]
    assert became[1][2:4] == ["--logdir", str(tmp_path)]


def test_what_cannot_be_shown_is_refused(tmp_path, became, port, capsys):
    made(tmp_path / "new", events=False)
    made(tmp_path / "a,b")
    for name, value in (
        ("nowhere", "nowhere: no such folder"),
        ("new", "new: no data for TensorBoard"),
        ("a,b", "holds a comma"),
    ):
        assert cli.main(["board", str(tmp_path / name), "--port", str(port)]) == EXIT_CONFIG
        assert value in capsys.readouterr().err
    made(tmp_path / "a")
    with socket.socket() as listener:
        listener.bind(("localhost", port))
        listener.listen()
        assert cli.main(["board", str(tmp_path / "a"), "--port", str(port)]) == EXIT_CONFIG
    err = capsys.readouterr().err
    assert f"--port {port}: Address already in use" in err and f"--port {port + 1}" in err
    assert cli.main(["board", str(tmp_path / "a"), "--port", "70000"]) == EXIT_CONFIG
    assert became == []
