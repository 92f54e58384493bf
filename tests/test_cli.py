"""The command line: quick answers before torch, exit codes, and what `train` hands over."""

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from titans_pretrain import cli
from titans_pretrain.errors import DivergedError
from titans_pretrain.run import signals
from titans_pretrain.run.folder import RunFolder

ENGINES = ("torch", "deepspeed", "megatron", "webdataset", "matplotlib", "tensorboard")


def _cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own; its last line lists the engines imported."""
    code = (
        "import atexit, sys; from titans_pretrain.cli import main\n"
        f"atexit.register(lambda: print('loaded', *[m for m in {ENGINES} if m in sys.modules]))\n"
        "sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"folder: {tmp_path / 'run'}\ndata:\n  sources: {{a: {{path: nowhere}}}}\n")
    return path


def test_help_names_every_command_before_any_engine_is_imported():
    out = _cli("--help")
    assert out.returncode == 0, out.stderr
    for command in ("prepare", "tokenizer", "train", "inspect", "bench", "plot", "generate"):
        assert re.search(rf"\n    {command}\s", out.stdout)
    assert out.stdout.splitlines()[-1] == "loaded"
    help_of_train = _cli("train", "--help")
    assert "--stop-after N" in help_of_train.stdout
    assert "--init-from CHECKPOINT" in help_of_train.stdout
    assert help_of_train.stdout.splitlines()[-1] == "loaded"


@pytest.mark.parametrize(
    ("extra", "begins", "words"),
    [
        (["optim.lrr=3e-4"], "config ", "did you mean optim.lr?"),
        (["--ranks", "4", "optim.lrr=3e-4"], "config ", "did you mean optim.lr?"),
        (["--ranks", "2", "parallel.tensor=3"], "parallel.tensor=3, 2 ranks", "parallel.tensor=1"),
    ],
)
def test_a_config_error_comes_once_and_before_any_engine_is_imported(
    config, extra, begins, words, tmp_path
):
    out = _cli("train", str(config), *extra)
    assert out.returncode == 2
    assert out.stdout.splitlines() == ["loaded"]
    assert out.stderr.count(words) == 1
    assert out.stderr.startswith(f"titans-pretrain: {begins}")
    assert not (tmp_path / "run").exists()


def test_wrong_arguments_exit_with_2(config):
    for arguments in (
        ["train"],
        ["train", str(config), "--ranks", "0"],
        ["train", str(config), "--rank", "1", "optim.lr=1"],
        ["train", str(config), "--nonsense=3"],
        ["train", str(config), "plain"],
        ["bench", "nothing"],
        ["nothing"],
        [],
    ):
        out = _cli(*arguments)
        assert out.returncode == 2, arguments
        assert "Traceback" not in out.stderr


def test_ranks_within_a_rank_are_refused(config):
    out = _cli("train", str(config), "--ranks", "2", RANK="0")
    assert out.returncode == 2
    assert "--ranks 2 with RANK=0" in out.stderr


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for the training program; notes what it was given."""
    seen = []

    def run_training(config, *, stop_after, init_from):
        handler = signal.getsignal(signal.SIGUSR1)  # already, before the trainer asks for it
        handled = getattr(handler, "__self__", None) is signals.install()
        seen.append((config, stop_after, init_from, handled))
        return 75

    module = types.ModuleType("titans_pretrain.train")
    module.run_training = run_training
    monkeypatch.setitem(sys.modules, "titans_pretrain.train", module)
    yield seen, module
    signals.install().restore()


def test_train_hands_over_config_and_options_with_the_handlers_set(config, trainer):
    seen, _ = trainer
    arguments = ["train", str(config), "optim.lr=0.25", "--stop-after", "7"]
    arguments += ["train.steps=9", "--init-from", "runs/a", "train.seed=3"]
    assert cli.main(arguments) == 75
    [(given, stop_after, init_from, handled)] = seen
    assert (given.optim.lr, given.train.steps, given.train.seed) == (0.25, 9, 3)
    assert (stop_after, init_from, handled) == (7, "runs/a", True)


def test_a_run_on_the_cpu_sees_no_gpu(config, trainer, monkeypatch):
    _, module = trainer
    names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    module.run_training = lambda *_, **__: seen.append([os.environ[name] for name in names]) or 0
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for device in ("cuda", "auto", "cpu"):
        assert cli.main(["train", str(config), f"train.device={device}"]) == 0
    assert seen == [["3", "cuda"], ["3", "cuda"], ["", "cpu"]]


def test_what_the_user_says_of_cuda_s_memory_stays(config, trainer, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert cli.main(["train", str(config)]) == 75
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert cli.main(["train", str(config)]) == 75
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_errors_become_a_message_and_their_exit_code(config, trainer, capsys):
    _, module = trainer

    def diverge(*args, **kwargs):
        raise DivergedError("loss=nan at step 3", "losses are finite", "lower optim.lr")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    module.run_training = diverge
    assert cli.main(["train", str(config)]) == 4
    assert capsys.readouterr().err == (
        "titans-pretrain: loss=nan at step 3\n  rule:   losses are finite\n"
        "  remedy: lower optim.lr\n"
    )
    module.run_training = interrupt
    assert cli.main(["train", str(config)]) == 130


def test_ranks_starts_the_same_command_as_that_many_processes(config, tmp_path):
    """Through the real command, with a trainer that only says what it got."""
    stand_in = tmp_path / "path" / "sitecustomize.py"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "import os, sys, types\n"
        "def run_training(config, *, stop_after, init_from):\n"
        "    print(os.environ['RANK'], os.environ['WORLD_SIZE'], config.optim.lr, stop_after,\n"
        "          init_from, flush=True)\n"
        "    return 75\n"
        "module = types.ModuleType('titans_pretrain.train')\n"
        "module.run_training = run_training\n"
        "sys.modules['titans_pretrain.train'] = module\n"
    )
    arguments = ["train", str(config), "--ranks", "2", "optim.lr=0.5", "train.micro_batch=4"]
    path = os.pathsep.join(filter(None, [str(stand_in.parent), os.environ.get("PYTHONPATH")]))
    out = _cli(*arguments, "--stop-after", "3", "--init-from", "x", PYTHONPATH=path)
    assert out.returncode == 75, out.stderr
    assert out.stdout.splitlines() == ["0 2 0.5 3 x", "loaded"]
    other = tmp_path / "run" / "logs" / "rank-00001.out"
    assert other.read_text() == "1 2 0.5 3 x\n"


def test_bench_passes_its_arguments_on(monkeypatch):
    seen = []
    module = types.ModuleType("titans_pretrain.memory.benchmark")
    module.main = lambda argv: seen.append(argv)
    monkeypatch.setitem(sys.modules, "titans_pretrain.memory.benchmark", module)
    assert cli.main(["bench", "memory", "--tokens", "64", "--help"]) == 0
    assert seen == [["--tokens", "64", "--help"]]


@pytest.mark.parametrize("command", ["prepare", "tokenizer"])
def test_data_commands_explain_themselves_without_torch(command):
    out = _cli(command, "--help")
    assert out.returncode == 0, out.stderr
    assert f"titans-pretrain {command}" in out.stdout
    assert "torch" not in out.stdout.splitlines()[-1]


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("titans-pretrain")
    out = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0
    assert "usage: titans-pretrain" in out.stdout


def test_a_run_folder_in_use_is_refused_before_any_engine_is_imported(config, tmp_path):
    folder = tmp_path / "run"
    with RunFolder(folder).take():
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        for extra in ([], ["--ranks", "2"]):
            out = _cli("train", str(config), *extra)
            assert out.returncode == 2
            assert f"run folder in use: {folder} is held by life 1" in out.stderr
            assert f"kill {os.getpid()}" in out.stderr
            assert out.stdout.splitlines() == ["loaded"]
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_of_several_ranks_none_is_refused_alone(config, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunFolder(tmp_path / "run").take():
        assert cli.main(["train", str(config)]) == 75  # the trainer decides, with all ranks


def _into_closed_pipe(code, *arguments, error=False):
    """Runs `code` writing to a pipe that nobody reads: (exit code, what stderr holds)."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=writer,
        stderr=writer if error else subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def test_a_full_disk_below_stdout_and_stderr(config):
    with Path("/dev/full").open("w") as full:
        script = [sys.executable, "-c", COMMAND]
        arguments = ["tokenizer", "inspect", "tokenizers/demo.model"]
        for unbuffered in ("", "1"):  # refused at the end, and at once
            out = subprocess.run(
                [*script, *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
            assert out.returncode == 76
            assert out.stderr.startswith("titans-pretrain: writing: No space left")
            assert "Traceback" not in out.stderr
        # Where there is no room for the message, the exit code still tells.
        arguments = ["train", str(config), "x.y=1"]
        assert subprocess.run([*script, *arguments], stdout=full, stderr=full).returncode == 2


COMMAND = "import sys; from titans_pretrain.cli import main; sys.exit(main())"


def test_a_reader_that_leaves_is_no_error(config):
    assert _into_closed_pipe(COMMAND, "--help") == (0, "")
    # More than the buffer of stdout holds: cut short in the middle.
    wordy = "from titans_pretrain import cli; cli._inspect = lambda _: print('x' * 9**6); "
    assert _into_closed_pipe(wordy + COMMAND, "inspect", "x") == (141, "")
    # A pipe of the program's own is another matter.
    own = "import os; from titans_pretrain import cli; r, w = os.pipe(); os.close(r); "
    own += "cli._inspect = lambda _: os.write(w, b'x'); sys.stdout = sys.stderr; "
    code, told = _into_closed_pipe("import sys; " + own + COMMAND, "inspect", "x")
    assert code == 1 and "BrokenPipeError" in told
    # An error that nobody reads keeps its exit code.
    assert _into_closed_pipe(COMMAND, "train", str(config), "x.y=1", error=True)[0] == 2
