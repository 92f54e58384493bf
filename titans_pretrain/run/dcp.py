"""torch's distributed checkpoint, spoken in fragments.

Every tensor is stored under its unsharded name and shape; each rank writes just the boxes it owns
and reads just the boxes it needs, straight out of and into its own partition. So any layout reads
what any other wrote, and no rank ever holds more than its partition plus one stored piece.

Nothing but tensors goes through here. DCP's metadata file is a pickle: it is read with an
unpickler that knows only the metadata's own classes.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from titans_pretrain.errors import DataError
from titans_pretrain.parallel.layout import Fragment

METADATA_FILE = ".metadata"


class OwnedBoxes:
    """One tensor as DCP sees it on this rank: global size, and the boxes that live here."""

    def __init__(self, fragment: Fragment, flat: torch.Tensor) -> None:
        self.shape = torch.Size(fragment.shape)
        self.flat = flat
        self.views: dict[tuple[int, ...], torch.Tensor] = {}
        self.chunks: list[ChunkStorageMetadata] = []
        at = 0
        for offsets, sizes in fragment.boxes():
            size = torch.Size(sizes)
            self.views[offsets] = _alone(flat.narrow(0, at, size.numel())).view(size)
            self.chunks.append(ChunkStorageMetadata(torch.Size(offsets), size))
            at += size.numel()

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.flat)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks


def _alone(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage begins and ends with it.

    torch's file writer copies a view of a larger storage and keeps all copies until the file is
    closed, which would double the partition. (On CUDA it copies to the host in any case.)
    """
    return torch.from_numpy(view.numpy()) if view.device.type == "cpu" else view


def _find(state: dict[str, Any], index: MetadataIndex) -> torch.Tensor:
    item = state[index.fqn]
    return item.views[tuple(index.offset or ())] if isinstance(item, OwnedBoxes) else item


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, go_on: Callable[[], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._go_on = go_on

    def lookup_object(self, index: MetadataIndex) -> Any:
        self._go_on()
        return _find(self.state_dict, index)


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, *args: Any, **kw: Any
    ) -> None:
        # The default walks the tree to replace meta tensors, and copies what it does not know.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> dcp.LoadPlan:
        assert self.metadata is not None
        return dcp.default_planner.create_default_local_load_plan(self.state_dict, self.metadata)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _find(self.state_dict, index)


# What a DCP metadata pickle may name: its own records, and nothing that runs.
_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
_ALLOWED_DTYPES = {"float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"}


def _member(kind: Any, name: str) -> Enum:
    """The member of an enumeration, which some versions of Python (3.11.2 is one) pickle as
    getattr(class, name)."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"names {name!r} of {kind!r}")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and name in _ALLOWED_DTYPES):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        self._refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        self._refuse(f"persistent id {pid!r}")

    def _refuse(self, what: str) -> NoReturn:
        raise pickle.UnpicklingError(f"names {what}")


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's table of tensors. Raises DataError for anything but such a table."""
    path = folder / METADATA_FILE
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as e:
        raise DataError(
            f"checkpoint metadata {path}: {e}",
            "it holds torch.distributed.checkpoint records and nothing else",
            "do not load files from sources you do not trust; use another checkpoint",
        ) from e
    known = isinstance(metadata, Metadata) and all(
        isinstance(m, TensorStorageMetadata) for m in metadata.state_dict_metadata.values()
    )
    # A stored path must stay inside the folder.
    inside = known and all(
        Path(info.relative_path).name == info.relative_path
        for info in (metadata.storage_data or {}).values()
    )
    if not inside:
        raise DataError(
            f"checkpoint metadata {path}: not a table of tensors in this folder",
            "it lists tensors, each in a file beside it",
            "use another checkpoint",
        )
    return metadata


class _Writer(dcp.FileSystemWriter):
    """Keeps the folder's path, which is a temporary one, out of the metadata."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint folder; its metadata only through the restricted unpickler, or given."""

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        super().__init__(str(folder))
        self._given = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = self._given or read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def names_of(fragment: Fragment, kinds: Sequence[str]) -> dict[str, str]:
    """{kind: name in the checkpoint}, e.g. {"weight": "model/blocks.0.norm.weight"}."""
    return {k: ("model/" if k == "weight" else f"optimizer/{k}/") + fragment.name for k in kinds}


def _state(
    fragments: Sequence[Fragment], tensors: dict[str, torch.Tensor], kinds: Sequence[str] | None
) -> dict[str, Any]:
    state: dict[str, Any] = dict(tensors)
    for fragment in fragments:
        for kind, name in names_of(fragment, kinds or tuple(fragment.tensors)).items():
            state[name] = OwnedBoxes(fragment, fragment.tensors[kind])
    return state


def save_tensors(
    folder: Path,
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    group: Any = None,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Collective. Writes this rank's fragments, and once the replicated `tensors`, fsynced.

    Args:
        group: the process group to agree through; None: that of training.
        go_on: called before each piece is written; raises to end it.
    """
    dcp.save(
        _state([fragment for fragment in fragments if fragment.first], tensors, None),
        # No copying ahead: it would wait for the device, also where all is in host memory.
        storage_writer=_Writer(
            str(folder), thread_count=1, sync_files=True, per_thread_copy_ahead=0
        ),
        planner=_SavePlanner(go_on),
        process_group=group,
    )


def load_tensors(
    folder: Path,
    fragments: Sequence[Fragment],
    tensors: dict[str, torch.Tensor],
    kinds: Sequence[str] | None = None,
) -> None:
    """Collective. Reads into the fragments' own memory (all kinds, or those named)."""
    dcp.load(
        _state(fragments, tensors, kinds),
        storage_reader=_Reader(folder),
        planner=_LoadPlanner(flatten_state_dict=False),
    )


def load_one(folder: Path, name: str, metadata: Metadata) -> torch.Tensor:
    """One whole tensor by name, in this process alone."""
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        # "assuming the intent is to load in a single process", of no_dist=True: it is.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(
            {name: tensor},
            storage_reader=_Reader(folder, metadata),
            planner=_LoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    return tensor


def count_parameters(folder: Path) -> int:
    """Numbers in the weights of a checkpoint; reads the metadata alone."""
    tensors = read_metadata(folder).state_dict_metadata
    return sum(
        m.size.numel()
        for name, m in tensors.items()
        if name.startswith("model/") and isinstance(m, TensorStorageMetadata)
    )


def hash_tensors(folder: Path) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes, one tensor in memory at a time.

    Independent of how many ranks wrote it and of how the pieces were cut.
    """
    metadata = read_metadata(folder)
    digest = hashlib.sha256()
    for name in sorted(metadata.state_dict_metadata):
        tensor = load_one(folder, name, metadata)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
