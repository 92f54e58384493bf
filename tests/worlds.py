"""Worlds of gloo processes for tests: `run_world(function, size, *args)`.

Ranks are forked from a server process that has imported the engines and run nothing (importing
Megatron takes seconds; autograd's threads do not survive a fork). Each world has its own time
limit, after which all of its ranks are killed and the test fails.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from titans_pretrain.launch.local import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    # torch, deepspeed and megatron-core; and what torch imports as the first model is built.
    ["titans_pretrain.step", "torch._dynamo", "tests.frozen"]
)


def _pack(value: Any) -> bytes:
    """By value: multiprocessing would hand tensors over as file descriptors, one each."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=False)


def _rank_main(
    pipe: Connection, function: Callable[..., Any], env: dict[str, str], args: bytes
) -> None:
    os.environ.update(env)
    # The server that forks the ranks may have been started while signals were blocked.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send((True, _pack(function(*_unpack(args)))))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the test must see it
        pipe.send((False, traceback.format_exc()))
        code = 1
    pipe.close()
    os._exit(code)  # no interpreter shutdown: a peer may already be gone


def run_world(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 120, env: Any = None
) -> list[Any]:
    """Runs `function(*args)` in `size` processes with RANK etc. set; returns all results.

    Raises AssertionError with every rank's traceback, or when `timeout` seconds are over.
    """
    port, packed = str(free_port()), _pack(args)
    pipes, processes = [], []
    for rank in range(size):
        rank_env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(theirs, function, rank_env, packed))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    end = time.monotonic() + timeout
    while len(results) + len(failures) < size and not failures:
        waiting = [p for r, p in enumerate(pipes) if r not in results]
        ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            failures[-1] = (
                f"no answer from ranks {sorted(set(range(size)) - set(results))} in {timeout:.0f} s"
            )
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipes[rank].recv()
            except EOFError:
                ok, value = False, "the process died without a word"
            (results if ok else failures)[rank] = value
    if failures:  # give the others a moment to say why, too
        for rank, pipe in enumerate(pipes):
            if rank not in results and rank not in failures and pipe.poll(1.0):
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    continue
                if not ok:
                    failures[rank] = value
    for process in processes:
        if failures:
            process.kill()
        process.join(10)
        if process.is_alive():
            process.kill()
    assert not failures, "\n".join(f"--- rank {r}: {why}" for r, why in sorted(failures.items()))
    return [_unpack(results[r]) for r in range(size)]
