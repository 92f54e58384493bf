"""Whole files or nothing."""

import errno
import os

import pytest

from titans_pretrain.data.files import write_atomically
from titans_pretrain.errors import NodeError


def test_a_full_disk_leaves_the_former_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "mine.model"
    write_atomically(path, b"former")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert "free some space" in caught.value.remedy
    assert [p.name for p in tmp_path.iterdir()] == ["mine.model"]
    assert path.read_bytes() == b"former"
