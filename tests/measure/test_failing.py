"""A failure as it is told: a broken device is its node's fault, a lost peer nobody's."""

import pytest
import torch

from tests.prepared import small_run
from titans_pretrain.config import parse_config
from titans_pretrain.errors import LostPeerError, NodeError
from titans_pretrain.measure.failing import Failing

ASYNC = "\nCUDA kernel errors might be asynchronously reported at some other API call."


@pytest.fixture
def failing(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "tn7")
    return Failing(parse_config(small_run(tmp_path / "run", tmp_path), "test"))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: unknown error",
    ],
)
def test_a_broken_device_names_its_node(failing, said):
    with pytest.raises(NodeError) as caught, failing:
        raise torch.AcceleratorError(said + ASYNC)
    assert caught.value.node == "tn7"
    assert caught.value.value == f"rank 0, cuda of tn7: {said}"


@pytest.mark.parametrize(
    "said", ["CUDA error: an illegal memory access was encountered", "CUDA error: invalid argument"]
)
def test_a_program_at_fault_stays_what_it_is(failing, said, caplog):
    with pytest.raises(torch.AcceleratorError), failing:
        raise torch.AcceleratorError(said + ASYNC)
    # Whatever becomes of this rank as it leaves, its log has where it was.
    assert "test_failing.py" in caplog.text and f"AcceleratorError: {said}" in caplog.text


def test_a_lost_peer_is_told_to_who_reports(tmp_path):
    told = []
    config = parse_config(small_run(tmp_path / "run", tmp_path), "test")
    gone = RuntimeError("Connection reset by peer [10.0.0.2]:4242")
    with pytest.raises(LostPeerError), Failing(config, told.append):
        raise gone
    assert told == [gone]


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:4104, {}, NCCL version 2.28.9\n{}\nLast error:\n{}"
REMOTE = (
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely.",
)
SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error.",
)
USAGE = ("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.")


@pytest.mark.parametrize(
    ("kind", "last", "lost"),
    [
        (REMOTE, "", True),
        (REMOTE, "NET/IB : Got completion from peer 10.0.0.2<4791> with status=12", True),
        (SYSTEM, "socketProgress: Connection closed by remote peer tn2<4242>", True),
        (SYSTEM, "ncclSocketPollConnect: connect to tn2<4242> returned Connection refused", True),
        (SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-x (9637888)", False),
        (SYSTEM, "Bootstrap : no socket interface found", False),
        (USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", False),
    ],
)
def test_of_nccl_s_errors_those_of_a_peer_that_is_gone(failing, kind, last, lost):
    error = torch.distributed.DistBackendError(NCCL.format(*kind, last))
    kind = LostPeerError if lost else torch.distributed.DistBackendError
    with pytest.raises(kind) as caught, failing:
        raise error
    assert lost or caught.value is error  # its whole text is what tells


def test_a_lost_peer_names_nobody(failing):
    with pytest.raises(LostPeerError) as caught, failing:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:4242")
    assert caught.value.node == ""
