"""Memory that runs out: one message with figures, one exit code on every rank, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.through_zero import start
from tests.parallel.tiny import micro_batches, tiny_config
from tests.prepared import small_dataset, small_run, write_config
from tests.worlds import run_world
from titans_pretrain.errors import EXIT_CONFIG, EXIT_SAVED, OutOfMemoryError
from titans_pretrain.measure import out_of_memory
from titans_pretrain.measure.footprint import held_bytes, working_bytes
from titans_pretrain.measure.out_of_memory import Found, cheapest, is_out_of_memory, place
from titans_pretrain.memory.live_bytes import LiveBytes
from titans_pretrain.run import checkpoint
from titans_pretrain.run.lock import newest_claim

GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("prepared"))


# From the second step on this process may hold 40 MiB more of its own data than before it.
LIMITED = """
import resource, sys
from titans_pretrain.cli import main
from titans_pretrain.measure import out_of_memory
from titans_pretrain.step import TrainStep

call = TrainStep.__call__

def limited(self, batches, step, *more):
    if step == 2:
        lines = open("/proc/self/status").read().splitlines()
        [held] = [int(line.split()[1]) for line in lines if line.startswith("VmData")]
        most = (held + 40 * 1024) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return call(self, batches, step, *more)

TrainStep.__call__ = limited
out_of_memory.SECONDS = 200.0  # a busy machine takes longer to predict
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_allocation_that_fails(data: Path, tmp_path: Path) -> None:
    tree = small_run(
        tmp_path / "run",
        data,
        model__blocks=6,
        model__width=64,
        data__sequence_length=256,
        train__micro_batch=8,
        validation__every=0,
        checkpoint__every_steps=1,
    )
    config = write_config(tmp_path / "config.yaml", tree)
    code = "import sys; from titans_pretrain.cli import main; sys.exit(main())"
    first = [sys.executable, "-c", code, "train", str(config), "--stop-after", "1"]
    assert subprocess.run(first, capture_output=True, timeout=120).returncode == EXIT_SAVED
    # The first step of this life is its second: nothing has been allocated and given back yet.
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "train", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    told = done.stderr[done.stderr.index("titans-pretrain: ") :]
    assert told.startswith("titans-pretrain: rank 0: out of memory on cpu, step 2, forward of bloc")
    for word in ("asked for", " free", "parameters", "gradients", "optimizer state", "activations"):
        assert word in told
    assert "1. train.micro_batch=" in told and "(now 8)" in told
    assert "2. train.recompute=blocks" in told and "3. train.precision=bf16" in told
    assert "Traceback" not in told
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [1]
    claim = newest_claim(tmp_path / "run")
    assert claim is not None and claim.life == 2 and claim.released


def one_fails(tree: dict[str, Any], where: str) -> tuple[str, str, float]:
    """Trains; the last rank's memory runs out. What this rank raised, how, and how long it took."""
    from titans_pretrain import step, train
    from titans_pretrain.config import parse_config
    from titans_pretrain.model.titans import SwiGLU

    def fail(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, original)  # once: the prediction is to work
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 "
            "GiB of which 1.50 GiB is free."
        )

    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        owner, name = {
            "building": (step, "build_pieces"),
            "mlp": (SwiGLU, "forward"),
            "checkpoint": (train.checkpoint, "save"),
        }[where]
        original = getattr(owner, name)
        setattr(owner, name, fail)
    began = time.monotonic()
    try:
        train.run_training(parse_config(tree, "test"))
    except OutOfMemoryError as e:
        return str(e), type(e).__name__, time.monotonic() - began
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("where", ["building", "mlp", "checkpoint"])
def test_every_rank_leaves_with_the_message_of_the_one_that_failed(
    where: str, data: Path, tmp_path: Path
) -> None:
    """Three ranks, each its own process: none is left waiting for the one that is gone."""
    tree = small_run(
        tmp_path / "run",
        data,
        model__variant="transformer",
        train__global_batch=12,
        train__steps=2,
        validation__every=0,
    )
    told = run_world(one_fails, 3, tree, where, timeout=90)
    assert len({message for message, *_ in told}) == 1
    message = told[0][0]
    place = {
        "building": "building",
        "mlp": "step 1, forward of block 0",
        "checkpoint": "step 2, ch",
    }
    assert message.startswith(f"rank 2: out of memory on cpu, {place[where]}")
    assert ("asked for 2.00 GiB" in message) and ("train.recompute=blocks" in message) == (
        where == "mlp"
    )
    assert max(seconds for *_, seconds in told) < 60
    claim = newest_claim(tmp_path / "run")
    assert claim is not None and claim.released


def working(config: Any) -> tuple[int, int, dict[str, int], int]:
    """(predicted, measured) bytes of a micro-batch; bytes held after a step; parameters."""
    world, step = start(config)
    (batch, *_) = micro_batches(config, 1, world.rank, world.size)
    whole = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
    with LiveBytes() as live:
        logits, _ = step.model(batch.tokens, whole, carry=False)
        loss = step.stages[0].token_loss(logits, batch.labels).sum()
        del logits
        loss.backward()
    step.model.zero_grad(set_to_none=True)
    step(micro_batches(config, 1, world.rank, world.size), 1)
    held = held_bytes(step)
    world.shut_down()
    return working_bytes(config), live.peak, held, sum(p.numel() for p in step.model.parameters())


@pytest.mark.parametrize("variant", ["transformer", "lmm", "mac", "mag", "mal"])
def test_the_prediction_is_what_is_measured(variant: str) -> None:
    for recompute in ("none", "blocks"):
        config = tiny_config(
            model__variant=variant,
            model__blocks=3,
            train__recompute=recompute,
            train__micro_batch=16,  # activations, not the weights' gradients, are what counts
            train__global_batch=16,
        )
        ((predicted, measured, held, parameters),) = run_world(working, 1, config)
        assert predicted == pytest.approx(measured, rel=0.1)
        assert 4 * parameters <= held["parameters"] <= 4 * parameters + 4096
        assert 12 * parameters <= held["optimizer state"] <= 12 * parameters + 65536


def test_two_ranks_share_the_optimizer_state() -> None:
    one = run_world(working, 1, tiny_config())[0][2]["optimizer state"]
    for *_, held, _ in run_world(working, 2, tiny_config()):
        assert held["optimizer state"] == pytest.approx(one / 2, rel=0.1)


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to alloc"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (torch.distributed.DistBackendError("Last error:\nCuda failure 2 'out of memory'"), True),
        (torch.distributed.DistBackendError("Cuda failure 217 'peer access is not s"), False),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, yes: bool) -> None:
    assert is_out_of_memory(error) == yes


def test_what_onednn_says_counts_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, yes in ((1 << 20, True), (1 << 30, False)):
        monkeypatch.setattr(out_of_memory, "host_memory", lambda free=free: (free, 1 << 34))
        assert is_out_of_memory(RuntimeError("could not create a primitive")) == yes


@pytest.mark.parametrize(
    ("number", "stack", "words"),
    [
        (0, ("building",), "building"),
        (3, ("backward", "forward"), "step 3, forward"),
        (3, ("backward",), "step 3, backward"),
        (9, ("validation", "forward", "forward"), "step 9, forward in validation"),
        (9, (), "step 9, starting"),
    ],
)
def test_the_place_in_words(number: int, stack: tuple[str, ...], words: str) -> None:
    assert place(number, stack, RuntimeError()) == words


STEP = ("backward", "forward")


def remedies(config: Any, found: Found, ranks: int = 1, stack: Any = STEP, device: str = "cuda"):
    return cheapest(config, found, ranks, stack, device, most=9)


def names(told: list[tuple[str, int]]) -> list[str]:
    return [text.split(" ")[0].split("=")[0] for text, _ in told]


def test_remedies_are_those_that_apply_with_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, with a prediction that is easy to follow: a GiB a row, half in bf16, a tenth with
    recompute."""

    def predict(config: Any, *, training: bool) -> int:
        tokens = config.data.sequence_length / 32
        less = 10 if config.train.recompute == "blocks" else 1
        return int(
            config.train.micro_batch
            * tokens
            * GIB
            / less
            / (1 + (config.train.precision == "bf16"))
        )

    monkeypatch.setattr(out_of_memory, "working_bytes", predict)
    monkeypatch.setattr(out_of_memory, "parameter_count", lambda model: {"all": GIB // 4})
    held = {"parameters": 2 * GIB, "gradients": 2 * GIB, "optimizer state": 6 * GIB}
    held |= {"activations and states": 3 * GIB}
    found = Found(asked=GIB, free=0, total=16 * GIB, held=held)
    config = tiny_config(train__micro_batch=4)  # 8 rows a step
    told = remedies(config, found)
    assert names(told) == [
        "train.precision",
        "2",  # ranks
        "train.micro_batch",
        "train.recompute",
        "data.sequence_length",
        "model.blocks",
    ]
    saved = [n / GIB for _, n in told]
    assert saved == pytest.approx([3, 3, 2, 3.6, 2, 7])
    assert "train.micro_batch=2 (now 4): activations about 4.00 GiB -> 2.00 GiB" in told[2][0]
    assert "optimizer state 6.00 GiB -> 3.00 GiB" in told[1][0]
    assert len(cheapest(config, found, 1, STEP, "cuda")) == 3

    # Where nothing of it applies: no rows to halve, bf16 and recompute already; 8 ranks use 8 rows.
    config = tiny_config(train__micro_batch=1, train__precision="bf16", train__recompute="blocks")
    assert names(remedies(config, found, ranks=8)) == ["data.sequence_length", "model.blocks"]
    # Outside forward and backward no activations are alive: fewer rows do not help.
    config = tiny_config(train__micro_batch=4)
    told = remedies(config, found, stack=("optimizer",))
    assert names(told) == ["train.precision", "2", "model.blocks"]
    # In validation nothing is recomputed.
    assert "train.recompute" not in names(remedies(config, found, stack=("validation", "forward")))
    # On a CPU more ranks hold more, and bf16 comes late.
    assert names(remedies(config, found, device="cpu")) == [
        "train.micro_batch",
        "train.recompute",
        "train.precision",
        "data.sequence_length",
        "model.blocks",
    ]
    # Fewer rows than half, where half is too much still.
    found.held["activations and states"] = GIB
    assert "train.micro_batch=1" in remedies(config, found, device="cpu")[0][0]
    # No memory left even for the prediction: in proportion to what there was, 2 GiB.
    with monkeypatch.context() as none_left:
        none_left.setattr(out_of_memory, "predicted", lambda config, training: None)
        told = remedies(config, found, device="cpu")
        assert [n / GIB for _, n in told] == pytest.approx([1, 1, 2, 1, 6])
        assert "train.micro_batch=2 (now 4): activations about 2.00 GiB -> 1.00 GiB" in told[0][0]
    # Reserved in pieces: costs nothing, comes first.
    found.held["reserved, not in use"] = 2 * GIB
    for said, first in (
        ("max_split_size_mb:512", "PYTORCH_ALLOC_CONF"),
        ("expandable_segments:True", "train.precision"),  # that is so already
    ):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
        assert names(remedies(config, found))[0] == first


def test_figures_of_a_cuda_device_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's text counts: by the time it is read, memory has been given back."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * GIB)

    class World:
        rank, size, device = 1, 2, torch.device("cuda", 1)

    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 80.00 GiB "
        "of which 512.00 MiB is free. Including non-PyTorch memory, this process has 70.00 GiB "
        "memory in use. Of the allocated memory 60.00 GiB is allocated by PyTorch, and 4.00 GiB is "
        "reserved by PyTorch but unallocated."
    )
    found = out_of_memory.look(torch.OutOfMemoryError(text), World(), None)  # type: ignore[arg-type]
    assert (found.asked, found.free, found.total) == (2 * GIB, GIB // 2, 80 * GIB)
    assert found.held == {
        "activations and states": 60 * GIB,
        "reserved, not in use": 4 * GIB,
        "other processes, CUDA itself": 15.5 * GIB,
    }
    found = out_of_memory.look(torch.OutOfMemoryError("CUDA error"), World(), None)  # type: ignore[arg-type]
    assert found.asked is None and found.free == 50 * GIB
    assert found.held["reserved, not in use"] == 10 * GIB
