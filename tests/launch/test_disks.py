"""Which disks a submission warns of, by a table of mounts."""

import pytest

from titans_pretrain.launch import disks

TABLE = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:27 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw
40 22 0:50 / {root}/home rw,relatime shared:9 master:2 - nfs4 server:/home rw,vers=4.2
41 40 0:51 / {root}/home/me/fast rw,relatime - lustre 10.0.0.1@tcp:/fast rw
42 22 0:52 / {root}/with\\040blank rw - xfs /dev/sdb rw
43 22 0:53 / {root}/twice rw - tmpfs first rw
44 22 0:54 / {root}/twice rw - beegfs second rw
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "mountinfo"
    path.write_text(TABLE.format(root=tmp_path))
    monkeypatch.setattr(disks, "MOUNTS", path)
    for name in ("home/me/fast", "with blank", "twice", "local"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("home/me", "nfs4"),
        ("home/me/fast", "lustre"),
        ("with blank", "xfs"),
        ("twice", "beegfs"),
        ("local", "ext4"),
    ],
)
def test_where_a_path_is_mounted(table, path, kind):
    found = disks.mount_of(table / path, disks.read_mounts())
    assert found is not None
    assert found.kind == kind


def test_what_is_warned_of(table):
    paths = {
        disks.RUN: table / "local" / "runs" / "new",
        "python": table / "home" / "me",
        "data books": table / "with blank",
        "data wiki": table / "home" / "wiki",
    }
    assert list(disks.warnings(paths, 4)) == [
        f"data wiki {table}/home/wiki is not there, seen from this machine",
        "all 4 nodes have to see what lies on / of this machine (ext4, shared only if exported): "
        f"run folder {table}/local/runs/new",
        f"all 4 nodes have to see what lies on {table}/with blank of this machine "
        f"(xfs, shared only if exported): data books {table}/with blank",
    ]
    (table / "mountinfo").unlink()  # another system: nothing is known
    del paths["data wiki"]
    assert list(disks.warnings(paths, 4)) == []
