"""Every command that the README shows is run as written, in an empty copy of the repository.

What would take too long is cut short by arguments put behind it (the last one counts); what
installs or downloads is parsed but not run. A command without a rule below fails the test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.prepared import ROOT, short_text
from titans_pretrain.parallel import legal

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = (
    "make",
    "pip",
    "pytest",
    "python",
    "titans-pretrain",
    "train",
    "torchrun",
    ".ci/run",
    ".venv/",
)

# What stands for the reader's own: text, a config.
PLACEHOLDERS = {"TEXT...": "text.jsonl", "CONFIG": "configs/demo.yaml"}
SMALL_MODEL = (
    "model.blocks=1 model.width=32 model.heads=2 model.segment=32 data.sequence_length=64 "
    "data.workers=0 train.global_batch=2 train.micro_batch=1 train.steps=2 train.threads=1 "
    "train.device=cpu validation.rows=2"
)
OWN_DATA = "data.sources='{mine: {path: data/mine}}'"  # prepared by an earlier command

# Beginning of a command -> what is put behind it. The longest beginning that fits counts.
RUN = {
    "titans-pretrain tokenizer train": "--vocab-size 400 --limit 1",
    "titans-pretrain prepare": "--workers 1",
    "titans-pretrain train": SMALL_MODEL,
    "titans-pretrain train configs/demo.yaml folder=runs/layout": f"{SMALL_MODEL} {OWN_DATA}",
    "train CONFIG": f"{SMALL_MODEL} folder=runs/other {OWN_DATA}",
    "train CONFIG profile.steps": f"{SMALL_MODEL} folder=runs/profile {OWN_DATA} train.steps=6",
    "train CONFIG --ranks": f"{SMALL_MODEL} folder=runs/ranks {OWN_DATA} --ranks 2",
    "titans-pretrain inspect": "",
    "titans-pretrain plan": "",
    "titans-pretrain plan --measure": "--help",  # half a minute; its own test runs it
    "titans-pretrain verify": "",
    "titans-pretrain compare": "--help",  # its own test runs a small one
    "titans-pretrain plot": "",
    "titans-pretrain generate": "--tokens 4",
    "titans-pretrain bench memory": "--quick --repeats 1",
    "titans-pretrain bench step": f"--steps 1 --warm-up 0 {SMALL_MODEL}",
    "titans-pretrain bench wave": "--ranks 2 --layers 2 --micro-batches 1",
    "titans-pretrain bench save": f"--saves 1 {SMALL_MODEL}",
    "titans-pretrain bench data": "--help",  # its own test runs it: it judges the machine's speed
    "titans-pretrain runs": "",
    "titans-pretrain runs --watch": "--help",  # has no end
    "titans-pretrain board": "--help",  # nor has this; its own test starts it
    "titans-pretrain submit": "--dry-run",  # the real one: slurm/README.md
    "titans-pretrain stop": "--help",
    "titans-pretrain gpu-check": "--help",  # minutes, and held by its own test
}
PARSE = (  # beginnings of what is not run
    "make ",
    "PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/wheels make environment",
    "pip install torch==<the pin in requirements.txt>",
    "DS_BUILD_OPS=0 DS_ACCELERATOR=cpu TORCH_CUDA_ARCH_LIST=9.0 .venv/bin/pip wheel",
    ".ci/run",
    "pytest tests/",
)


def commands(text: str) -> list[str]:
    """The shell commands of a markdown text in its order: lines of code blocks, and inline code
    that begins with a program."""
    found = []
    for block, inline in re.findall(r"^```\n(.*?)^```|`([^`]+)`", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            found.append(line)
        program = re.sub(r"^(\w+=\S+\s+)*", "", inline)
        if program.startswith(PROGRAMS) and (" " in inline or inline == ".ci/run"):
            found.append(inline)
    stripped = (" ".join(re.sub(r"\s#\s.*", "", line).split()) for line in found)
    return [line for line in stripped if line]


def options(text: str) -> set[str]:
    """Options that inline code names alone, e.g. `--help`."""
    return set(re.findall(r"`(--[a-z-]+)[^`]*`", text))


def rule(command: str) -> str | None:
    """The beginning in RUN or PARSE that fits."""
    fitting = [b for b in (*RUN, *PARSE) if command.startswith(b)]
    return max(fitting, key=len, default=None)


def test_commands_are_found():
    text = (
        "```\nmake a    # why\n\nB=1 pip x \\\n   -r y\n```\n`make c` and `make`, `train CONFIG\n"
        "a=1`, `A=2 make e`, `kill -9`, `train.steps`, `.ci/run`; `--stop-after N`\n"
    )
    assert commands(text) == [
        "make a",
        "B=1 pip x -r y",
        "make c",
        "train CONFIG a=1",
        "A=2 make e",
        ".ci/run",
    ]
    assert options(text) == {"--stop-after"}


def test_every_command_has_a_rule():
    found = commands(README)
    assert len(found) > 15
    assert [c for c in found if rule(c) is None] == []


def as_run(command: str) -> Iterator[str]:
    """What is run in place of `command`."""
    beginning = rule(command)
    if beginning in RUN:
        for name, value in PLACEHOLDERS.items():
            command = command.replace(name, value)
        if command.startswith("train "):
            command = f"titans-pretrain {command}"
        yield f"{command} {RUN[beginning]}"
    elif "make " in command:
        yield command.replace("make ", "make --dry-run ")
    elif "pip wheel" in command:
        known = subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--help"], capture_output=True, text=True
        ).stdout
        assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", known))
        yield "test -s requirements.txt"
    elif command.startswith("pytest "):
        yield f"ls -d {command.removeprefix('pytest ')}"
    elif command.startswith("pip install torch=="):
        yield "grep -E '^torch==[0-9.]+$' requirements.txt"
    else:
        yield f"test -x {command} && bash -n {command}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, and what stands for the reader's own texts and arrays."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    text = short_text(folder / "text.jsonl")
    (folder / "corpus").mkdir()
    shutil.copy(text, folder / "corpus")
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    pq.write_table(pa.table({"content": rows}), folder / "part-0.parquet")
    (folder / "genome.fa").write_bytes(b">one\n" + b"ACGT" * 100_000)
    np.save(folder / "series.npy", np.arange(100_000) % 256)
    return folder


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    bin = os.fspath(Path(sys.executable).parent)
    path = os.pathsep.join([bin, os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": os.fspath(folder)}
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_every_command_runs_as_written(copy: Path):
    done = set()
    for command in commands(README):
        for line in as_run(command):
            if line not in done:
                result = shell(line, copy)
                told = f"README: {command}\nrun: {line}\n{result.stdout}\n{result.stderr}"
                assert result.returncode == 0, told
                assert "Traceback" not in result.stderr, told
                done.add(line)
    assert (copy / "runs" / "mine" / "loss.png").stat().st_size > 10_000
    assert (copy / "runs" / "ranks" / "logs" / "rank-00001.log").exists()


def test_options_named_alone_exist():
    asked = ("", "train", "compare", "plan", "verify", "submit", "runs")
    usage = "; ".join(f"titans-pretrain {command} --help" for command in asked)
    usage = shell(usage, ROOT).stdout
    assert options(README) - {"--index-url"} <= set(re.findall(r"--[a-z-]+", usage))  # pip's


def test_the_table_of_legal_layouts_is_that_of_the_rules():
    assert legal.table() in README
