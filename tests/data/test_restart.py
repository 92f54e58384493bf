"""prepare killed at any moment, with any number of processes: the same bytes in the end."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.conftest import SETTINGS, quiet
from titans_pretrain.data import encode
from titans_pretrain.data import prepare as module
from titans_pretrain.data.prepare import prepare
from titans_pretrain.errors import DataError

DEMO = str(Path(__file__).parents[2] / "tokenizers" / "demo.model")


def content(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def killed_at(step, corpus, tokenizer, out, settings=SETTINGS):
    """A forked child prepares and kills itself before its step-th change of the disk.

    Returns False once the child gets through.
    """
    child = os.fork()
    if child == 0:
        left = step

        def deadly(real):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "utime"):
            setattr(os, name, deadly(getattr(os, name)))
        code = 1
        try:
            prepare([str(corpus)], out, tokenizer, settings, say=quiet)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_before_any_change_of_the_disk(corpus, tokenizer, prepared, tmp_path):
    """Each moment in its own folder; then finished by the same call."""
    wanted = content(prepared)
    step, moments = 1, 0
    while killed_at(step, corpus[0], tokenizer, tmp_path / str(step)):
        out = tmp_path / str(step)
        prepare([str(corpus[0])], out, tokenizer, SETTINGS, say=quiet)
        assert content(out) == wanted, f"killed at step {step}"
        moments += 1
        step += 1 if step < 12 else 7
    assert moments > 20


def test_killed_again_and_again(corpus, tokenizer, prepared, tmp_path):
    """The same folder, killed a little later each time."""
    step = 3
    while killed_at(step, corpus[0], tokenizer, tmp_path / "out"):
        step += 2
    assert content(tmp_path / "out") == content(prepared)


def test_finished_units_are_not_done_again(corpus, tokenizer, tmp_path, monkeypatch):
    killed_at(40, corpus[0], tokenizer, tmp_path / "out")
    units = tmp_path / "out" / ".work" / "units"
    before = {p.name: p.stat().st_mtime_ns for p in units.iterdir() if p.suffix != ".tmp"}
    assert len(before) >= 2
    done = []
    real = encode.encode_unit
    monkeypatch.setattr(encode, "encode_unit", lambda *a: (done.append(a[1]), real(*a))[1])
    prepare([str(corpus[0])], tmp_path / "out", tokenizer, SETTINGS, say=quiet)
    assert not {f"{n:05d}" for n in done} & set(before) and done


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    workers, corpus, tokenizer, prepared, tmp_path
):
    prepare([str(corpus[0])], tmp_path / "out", tokenizer, SETTINGS, workers, say=quiet)
    assert content(tmp_path / "out") == content(prepared)


SCRIPT = """
import sys
from titans_pretrain.data.prepare import Settings, prepare
from titans_pretrain.data.tokens import Tokenizer
if __name__ == "__main__":
    settings = Settings(unit_bytes=30_000, member_tokens=4_000, shard_tokens=16_000)
    prepare([sys.argv[1]], sys.argv[2], Tokenizer.load(sys.argv[3]), settings, int(sys.argv[4]))
"""


def test_killed_with_its_processes(corpus, tokenizer, prepared, tmp_path):
    """The parent of two processes is killed; they end, too, and the command finishes."""
    out = tmp_path / "out"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), str(corpus[0]), str(out), DEMO, "2"]
    command = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    units = out / ".work" / "units"
    deadline = time.monotonic() + 60
    while command.poll() is None and time.monotonic() < deadline:
        if units.exists() and any(units.iterdir()):
            break
        time.sleep(0.002)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.kill()
    command.wait()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert content(out) == content(prepared)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_two_commands_at_once_are_refused(corpus, tokenizer, tmp_path):
    out = tmp_path / "out"
    with (
        module._work_folder(out, {}),
        pytest.raises(DataError, match="another prepare is at work"),
    ):
        prepare([str(corpus[0])], out, tokenizer, SETTINGS, say=quiet)


def test_unfinished_work_on_other_inputs_is_refused(corpus, tokenizer, tmp_path):
    source = tmp_path / "docs.jsonl"
    source.write_bytes(Path(corpus[0]).read_bytes())
    assert killed_at(30, source, tokenizer, tmp_path / "out")
    source.write_bytes(Path(corpus[0]).read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(DataError, match="unfinished work on other inputs"):
        prepare([str(source)], tmp_path / "out", tokenizer, SETTINGS, say=quiet)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_document_of_100_mb_in_bounded_memory(kind, tmp_path):
    """Peak memory stays far below what encoding it in one piece takes (several GB)."""
    import json

    paragraph = "It was the best of times, it was the worst of times. Call me what you like.\n\n"
    huge = paragraph * (100_000_000 // len(paragraph))
    source = tmp_path / "in"
    source.mkdir()
    if kind == "txt":
        (source / "huge.txt").write_text(huge)
        (source / "small.txt").write_text(paragraph)
    else:
        lines = [json.dumps({"text": huge}), json.dumps({"text": paragraph})]
        (source / "in.jsonl").write_text("\n".join(lines))
    del huge
    script = tmp_path / "script.py"
    # Not ru_maxrss: it begins with what the process held that started this one.
    script.write_text(
        SCRIPT.replace("settings = ", "settings = Settings() or ")
        + "    print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    model = DEMO.replace("demo", "titans-32k")
    told = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "out"), model, "1"],
        check=True,
        capture_output=True,
        text=True,
    )
    peak = int(told.stdout.split()[-1]) * 1024
    assert peak < (0.9e9 if kind == "txt" else 1.4e9), peak
