"""What the shards of a prepared folder hold: the header `manifest.json` and a table of members.

    manifest.json            version, tokenizer, splits with their shards, skipped documents, hash
    tokenizer.model          the tokenizer the tokens come from
    SPLIT.members.npy        one row a member: where it lies, what it holds (dtype MEMBER)
    SPLIT-00000.tar ...      the shards (WebDataset): pairs <key>.len, <key>.tok
    skipped.json             every document left out, and why

The manifest's hash covers everything that decides the token stream: the header, and with it the
sha256 of every table and shard. 10^12 tokens are about 10^6 members, a table of 72 MB.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.config import ALIGNMENTS
from titans_pretrain.data.files import file_sha256, write_atomically
from titans_pretrain.data.store import Folder, Store
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import DataError

VERSION = 1
SPLITS = ("train", "validation")

# `tok` and `len` are byte offsets of the two files' contents in the shard; `padded` counts tokens
# with every document padded to a multiple of each of ALIGNMENTS.
MEMBER = np.dtype(
    [
        ("shard", "<u4"),
        ("documents", "<u4"),
        ("tokens", "<u4"),
        ("tok_crc", "<u4"),
        ("len_crc", "<u4"),
        ("tok", "<u8"),
        ("len", "<u8"),
        ("padded", "<u4", (len(ALIGNMENTS),)),
    ]
)


@dataclass(frozen=True)
class Shard:
    file: str  # relative to the folder
    bytes: int
    sha256: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class Split:
    shards: list[Shard]
    members: NDArray[np.void]  # [members] of MEMBER, in order of shards

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.shards)

    @cached_property
    def first_member(self) -> NDArray[np.int64]:
        """[shards + 1]: the members of shard s are first_member[s] .. first_member[s + 1] - 1."""
        return np.searchsorted(self.members["shard"], np.arange(len(self.shards) + 1))

    def padded_ends(self, align: int) -> NDArray[np.int64]:
        """[members]: padded tokens of the split up to and with each member."""
        return np.cumsum(self.members["padded"][:, ALIGNMENTS.index(align)], dtype=np.int64)

    def blocks(self, sequence_length: int, align: int) -> NDArray[np.int64]:
        """[shards]: blocks of each shard; a shard's last block may be partly filled."""
        ends = np.concatenate([[0], self.padded_ends(align)])[self.first_member]
        return -(-np.diff(ends) // sequence_length)


@dataclass(frozen=True)
class Manifest:
    folder: Path  # of the manifest and its tables
    hash: str
    header: dict[str, Any]
    splits: dict[str, Split]
    remote: Store | None = None  # of the shards; default: the same folder

    @cached_property
    def store(self) -> Store:
        """Where the shards are."""
        return self.remote or Folder(self.folder)

    @property
    def tokenizer_hash(self) -> str:
        return str(self.header["tokenizer"]["sha256"])

    @property
    def vocab_size(self) -> int:
        return int(self.header["tokenizer"]["vocab_size"])

    @property
    def bos(self) -> int:
        return int(self.header["tokenizer"]["bos"])

    @property
    def eos(self) -> int:
        return int(self.header["tokenizer"]["eos"])

    @property
    def pad(self) -> int:
        return int(self.header["tokenizer"]["pad"])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(str(self.header["dtype"]))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer kept in the folder. Raises DataError where it is not the manifest's."""
        self.require_tokenizer()
        path = self.folder / "tokenizer.model"
        return Tokenizer.load(path, bos=self.bos, eos=self.eos, pad=self.pad)

    def require_tokenizer(self) -> None:
        """Raises DataError where the folder's tokenizer is not the manifest's."""
        path = self.folder / "tokenizer.model"
        try:
            digest = file_sha256(path)
            found = f"sha256 {digest[:16]}..."
        except OSError as e:
            digest, found = "", str(e.strerror)
        if digest != self.tokenizer_hash:
            raise DataError(
                f"{path}: {found}, manifest sha256 {self.tokenizer_hash[:16]}...",
                "the folder's tokenizer is the one its tokens come from",
                "put the original file back, or prepare the folder anew",
            )


def write_manifest(folder: Path, header: dict[str, Any], splits: dict[str, Split]) -> Manifest:
    """Writes the tables and, last, `manifest.json`; the header gains version, splits and hash."""
    described = {}
    for name, split in splits.items():
        table = folder / f"{name}.members.npy"
        content = _npy(split.members)
        write_atomically(table, content)
        described[name] = {
            "tokens": split.tokens,
            "documents": split.documents,
            "members": len(split.members),
            "members_sha256": hashlib.sha256(content).hexdigest(),
            "shards": [asdict(s) for s in split.shards],
        }
    header = {"version": VERSION, **header, "alignments": list(ALIGNMENTS), "splits": described}
    header["hash"] = _hash(header)
    write_atomically(folder / "manifest.json", (json.dumps(header, indent=1) + "\n").encode())
    return Manifest(folder, header["hash"], header, splits)


def _npy(table: NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table)
    return buffer.getvalue()


def _hash(header: dict[str, Any]) -> str:
    content = {k: v for k, v in header.items() if k != "hash"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def load_manifest(folder: str | Path) -> Manifest:
    """Reads and checks header and tables (not the shards). Raises DataError."""
    folder = Path(folder)
    path = folder / "manifest.json"
    remedy = f"prepare the data: titans-pretrain prepare INPUT --tokenizer MODEL --out {folder}"
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(
            f"{path}: {e.strerror}", "a source is a folder written by `prepare`", remedy
        ) from e
    header = parse_header(content, str(path), remedy)
    splits = {name: _load_split(folder, name, told) for name, told in header["splits"].items()}
    return Manifest(folder, header["hash"], header, splits)


def parse_header(content: bytes, path: str, remedy: str) -> dict[str, Any]:
    """The header that a `manifest.json` holds. Raises DataError, naming `path`."""
    try:
        header = json.loads(content.decode("utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: {e}", "the manifest is JSON as `prepare` wrote it", remedy) from e
    if not isinstance(header, dict) or header.get("version") != VERSION:
        found = header.get("version") if isinstance(header, dict) else type(header).__name__
        raise DataError(f"{path}: version {found}", f"this program reads version {VERSION}", remedy)
    if header.get("hash") != _hash(header):
        raise DataError(
            f"{path}: its hash does not fit its content",
            "a manifest is never edited by hand",
            remedy,
        )
    return header


def _load_split(folder: Path, name: str, told: dict[str, Any]) -> Split:
    table = folder / f"{name}.members.npy"
    try:
        found = file_sha256(table)
    except OSError as e:
        raise DataError(
            f"{table}: {e.strerror}", "the manifest's tables lie beside it", "put the file back"
        ) from e
    if found != told["members_sha256"]:
        raise DataError(
            f"{table}: sha256 {found[:16]}..., manifest {told['members_sha256'][:16]}...",
            "the manifest's tables are as `prepare` wrote them",
            "fetch the file again or prepare the folder anew",
        )
    return Split([Shard(**s) for s in told["shards"]], np.load(table))
