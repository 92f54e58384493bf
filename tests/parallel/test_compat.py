"""Canaries: each shim is still needed. When one of these fails, delete the shim it speaks of."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.through_zero import start
from tests.parallel.tiny import micro_batches, tiny_config
from tests.worlds import run_world

pytestmark = [
    pytest.mark.cuda,  # says to the continuous check that this skip is one of device
    pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the shims do nothing"),
]


def without(shim: str) -> str:
    import contextlib

    from titans_pretrain.parallel import compat

    if shim == "cuda_literals":
        compat.cuda_literals = contextlib.nullcontext  # type: ignore[assignment]
    config = tiny_config()
    world, step = start(config)
    try:
        step(micro_batches(config, 1, world.rank, world.size), 1)
    except (AssertionError, RuntimeError) as e:
        return str(e)
    return ""


def test_megatron_s_schedules_still_name_cuda() -> None:
    (told,) = run_world(without, 1, "cuda_literals")
    assert "CUDA" in told
    assert run_world(without, 1, "nothing") == [""]


def shared_memory_build_offered() -> bool:
    import deepspeed.ops

    return bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])


def test_deepspeed_would_still_compile_its_collectives() -> None:
    assert run_world(shared_memory_build_offered, 1) == [True]


def told_on_the_console(shim: str) -> str:
    import contextlib
    import io

    from titans_pretrain.parallel import compat

    if shim == "without_memory_tables":
        compat.without_memory_tables = contextlib.nullcontext  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as told:
        start(tiny_config(train__precision="bf16"))
    return told.getvalue()


def test_deepspeed_still_prints_memory_tables() -> None:
    (told,) = run_world(told_on_the_console, 1, "without_memory_tables")
    assert told.count("CPU Virtual Memory") > 5
    assert run_world(told_on_the_console, 1, "nothing") == [""]


def compilers_asked(touch: bool) -> list[str]:
    """The commands that an engine's start runs."""
    import subprocess

    import deepspeed.ops

    from titans_pretrain.parallel import compat

    asked: list[str] = []
    begin = subprocess.Popen.__init__

    def noted(self: subprocess.Popen, command: list[str], *args: object, **options: object) -> None:
        asked.append(command[0])
        begin(self, command, *args, **options)  # type: ignore[call-overload]

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign,assignment]
    if touch:
        offered = {"deepspeed_shm_comm": False}
        compat.skip_shared_memory_build = lambda: deepspeed.ops.__compatible_ops__.update(offered)
    start(tiny_config())
    return asked


def test_deepspeed_still_asks_compilers_what_it_could_build() -> None:
    assert run_world(compilers_asked, 1, True) != [[]]
    assert run_world(compilers_asked, 1, False) == [[]]


def gloo_loops(shim: str) -> int:
    """Threads of this rank that gloo has to look for news, one a device."""
    from pathlib import Path

    from titans_pretrain.parallel import world

    if shim == "share_gloo_devices":
        world.share_gloo_devices = lambda: None
    started, _ = start(tiny_config(model__vocab_size=64, parallel={"tensor": 2}))
    names = (task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir())
    loops = sum("gloo_tcp_loop" in name for name in names)
    started.sum([0.0])  # all have begun before one leaves: rank 0 takes the store with it
    return loops


def test_torch_still_gives_each_group_a_device() -> None:
    assert min(run_world(gloo_loops, 2, "share_gloo_devices")) > 10
    assert run_world(gloo_loops, 2, "nothing") == [1, 1]
