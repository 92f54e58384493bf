"""Opens, checks and reads shards: block of a shard -> one row of tokens, labels, positions, mask.

Checks, and what they cost: a shard's size when it is opened; each member's checksum (crc32, about
5 GB/s: 0.4 ms for a member of 1 Mi tokens) the first time a process reads from it, so that a
flipped bit is named with its file and member before any of its tokens is used; every id against
the vocabulary. `verify_shard` compares whole files with their sha256. Reads are positioned reads
rather than a memory map: a failing disk then raises an error that names the file, where a map
would kill the process. Shards behind URLs come through the node's cache (store.py).
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.data.files import file_sha256
from titans_pretrain.data.manifest import Manifest, Shard
from titans_pretrain.data.pack import HEADER
from titans_pretrain.data.store import REPAIR, UNREADABLE, Folder, Unusable
from titans_pretrain.errors import ConfigError, DataError

OPEN_FILES = 64
CACHED_MEMBERS = 1024
CHECK = 1 << 22  # bytes read at a time for a checksum

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Fault:
    """A member that cannot be used, or a whole shard (`member` None)."""

    shard: int
    member: int | None  # in the split's table
    why: str


class BlockReader:
    """Reads blocks of `sequence_length` padded tokens of one split.

    `vocab_size` bounds the ids (default: the tokenizer's). `tolerant` readers are asked by
    `faults` before they read, and go on with what a damaged shard still holds. Raises ConfigError
    for an alignment without a column in the manifest, DataError for a split without a document.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        sequence_length: int,
        align: int,
        vocab_size: int | None = None,
        tolerant: bool = False,
    ) -> None:
        if align not in manifest.header["alignments"] or sequence_length % align:
            raise ConfigError(
                f"alignment {align}, sequence_length {sequence_length}",
                f"documents are padded to one of {manifest.header['alignments']}, which divides "
                "the row",
                "change model.memory.chunk or data.sequence_length",
            )
        self.manifest, self.split_name, self.tolerant = manifest, split, tolerant
        self.split = manifest.splits[split]
        self.sequence_length, self.align = sequence_length, align
        self.vocab_size = vocab_size or manifest.vocab_size
        self.blocks = self.split.blocks(sequence_length, align)
        if not self.blocks.sum():
            raise DataError(
                f"{manifest.folder}: the {split} split is empty",
                f"a run reads at least one document of {split}",
                "prepare the folder with more documents, or with --validation above 0",
            )
        self._pad = manifest.pad
        self._dtype = manifest.dtype
        self._ends = self.split.padded_ends(align)
        starts = np.concatenate([[0], self._ends])
        self._shard_start = starts[self.split.first_member]  # [shards + 1] padded tokens
        self._files: OrderedDict[int, int] = OrderedDict()
        self._layouts: OrderedDict[int, tuple[Ints, Ints, Ints]] = OrderedDict()
        self._checked = bytearray(len(self.split.members))
        self._bad: dict[tuple[int, int | None], str] = {}  # (shard, member) -> why
        self._renewed: set[int] = set()

    def expect(self, shards: Iterable[int]) -> None:
        """From now on rows come from these shards, most urgent first; others are closed."""
        shards = list(shards)
        for shard in self._files.keys() - set(shards):
            os.close(self._files.pop(shard))
        good = (shard for shard in shards if (shard, None) not in self._bad)
        self.manifest.store.expect(self, [self.split.shards[shard] for shard in good])

    def condemn(self, fault: Fault) -> None:
        """Takes a member, or a shard, for bad without looking at it."""
        self._bad[fault.shard, fault.member] = fault.why

    def faults(self, shard: int, block: int) -> list[Fault]:
        """What is bad under a block; empty: the block can be read. Checks its members whole, so
        that the answer depends on the data alone, never on what was read before."""
        begin, end = self._range(shard, block)
        first = int(np.searchsorted(self._ends, begin, side="right"))
        last = int(np.searchsorted(self._ends, end, side="left"))
        found = []
        for member in range(first, last + 1):
            try:
                if not self._checked[member]:
                    self._require_good(shard, member)
                    self._layout(shard, member)
                    self._ids(shard, member, 0, int(self.split.members[member]["tokens"]))
            except Unusable as e:
                whole = (shard, None) in self._bad
                self._checked[member] = 0
                self._bad.setdefault((shard, None if whole else member), e.why)
            for bad in (None, member):
                why = self._bad.get((shard, bad))
                if why is not None and Fault(shard, bad, why) not in found:
                    found.append(Fault(shard, bad, why))
        return found

    def _require_good(self, shard: int, member: int) -> None:
        for key in ((shard, None), (shard, member)):
            if key in self._bad:
                raise Unusable(self._path(shard), "known to be bad", "", self._bad[key])

    def _range(self, shard: int, block: int) -> tuple[int, int]:
        """The block's padded tokens begin..end of the split."""
        begin = int(self._shard_start[shard]) + block * self.sequence_length
        return begin, min(begin + self.sequence_length, int(self._shard_start[shard + 1]))

    def read(
        self, shard: int, block: int, tokens: Ints, labels: Ints, positions: Ints, mask: NDArray
    ) -> None:
        """Fills one row [T] of each array, which arrive holding pads (pad id, pad id, -1, False).

        Raises DataError naming shard, member and byte offset where the data is not as prepared.
        """
        begin, end = self._range(shard, block)
        member = int(np.searchsorted(self._ends, begin, side="right"))
        at = begin
        while at < end:
            member_end = int(self._ends[member])
            stop = min(end, member_end)
            row = slice(at - begin, stop - begin)
            member_start = int(self._ends[member - 1]) if member else 0
            self._fill(
                shard,
                member,
                at - member_start,
                stop - member_start,
                (tokens[row], labels[row], positions[row], mask[row]),
            )
            at, member = stop, member + 1

    def _fill(
        self, shard: int, member: int, begin: int, end: int, row: tuple[Ints, Ints, Ints, NDArray]
    ) -> None:
        """Fills the row's piece [end - begin] from the member's padded tokens begin..end."""
        padded_starts, starts, lengths = self._layout(shard, member)
        first = int(np.searchsorted(padded_starts, begin, side="right")) - 1
        last = int(np.searchsorted(padded_starts, end, side="left"))
        place = padded_starts[first:last] - begin  # of each document in this piece
        token_start, length = starts[first:last], lengths[first:last]
        skipped = int(max(0, -place[0]))  # tokens of the first document before this piece
        # Real tokens of neighbouring documents lie next to each other in the file.
        left = np.maximum(np.minimum(end - begin - place, length), 0)  # token where each one stops
        source = int(token_start[0]) + min(skipped, int(length[0]))
        source_end = int(token_start[-1] + left[-1])
        beyond = 1 if int(left[-1]) < int(length[-1]) else 0  # the label past the row's end
        ids = self._ids(shard, member, source, source_end + beyond)
        tokens, labels, positions, mask = row
        for p, n, whole, begun in zip(
            place.tolist(), left.tolist(), length.tolist(), token_start.tolist()
        ):
            offset = begun - source  # of the document's first token in ids; negative when cut
            skip = max(0, -p)
            if n <= skip:
                continue
            here = slice(p + skip, p + n)
            tokens[here] = ids[offset + skip : offset + n]
            positions[here] = _COUNT[: n - skip] if n - skip <= len(_COUNT) else np.arange(n - skip)
            known = n if n < whole else n - 1  # labels of this part: none after the last token
            labels[p + skip : p + known] = ids[offset + skip + 1 : offset + known + 1]
            mask[p + skip : p + known] = True

    def member(self, member: int) -> tuple[Ints, Ints]:
        """A whole member, checked: (tokens, document lengths)."""
        shard = int(self.split.members[member]["shard"])
        _, _, lengths = self._layout(shard, member)
        ids = self._ids(shard, member, 0, int(self.split.members[member]["tokens"]))
        return ids.astype(np.int64), lengths

    def lengths(self, member: int) -> Ints:
        """Document lengths of a member. Compares their checksum, and not the tokens'."""
        row = self.split.members[member]
        shard, offset = int(row["shard"]), int(row["len"])
        raw = self._bytes(shard, member, offset, 4 * int(row["documents"]))
        if zlib.crc32(raw) != int(row["len_crc"]):
            raise self._corrupt(shard, member, offset, len(raw), ".len")
        return np.frombuffer(raw, "<u4").astype(np.int64)

    def ids(self, member: int, begin: int, end: int) -> Ints:
        """Tokens begin..end of a member, within the vocabulary. Compares no checksum."""
        shard = int(self.split.members[member]["shard"])
        return self._ids(shard, member, begin, end).astype(np.int64)

    def _layout(self, shard: int, member: int) -> tuple[Ints, Ints, Ints]:
        """Padded starts, token starts and lengths of a member's documents; checks it once."""
        known = self._layouts.get(member)
        if known is not None:
            self._layouts.move_to_end(member)
            return known
        row = self.split.members[member]
        raw = self._bytes(shard, member, int(row["len"]), 4 * int(row["documents"]))
        if not self._checked[member]:
            try:
                self._check(shard, member, raw)
            except Unusable:
                if not self._renew(shard):
                    raise
                return self._layout(shard, member)
            self._checked[member] = 1
        lengths = np.frombuffer(raw, "<u4").astype(np.int64)
        padded = -(-lengths // self.align) * self.align
        layout = (np.cumsum(padded) - padded, np.cumsum(lengths) - lengths, lengths)
        self._layouts[member] = layout
        if len(self._layouts) > CACHED_MEMBERS:
            self._layouts.popitem(last=False)
        return layout

    def _renew(self, shard: int) -> bool:
        """Whether a shard whose copy here is damaged may be read again, from a new one."""
        if shard in self._renewed or not self.manifest.store.renew(self.split.shards[shard]):
            return False
        self._renewed.add(shard)
        if shard in self._files:
            os.close(self._files.pop(shard))
        return True

    def _check(self, shard: int, member: int, lengths: bytes) -> None:
        row = self.split.members[member]
        if zlib.crc32(lengths) != int(row["len_crc"]):
            raise self._corrupt(shard, member, int(row["len"]), len(lengths), ".len")
        crc, at = 0, int(row["tok"])
        size = int(row["tokens"]) * self._dtype.itemsize
        for begin in range(0, size, CHECK):
            count = min(CHECK, size - begin)
            crc = zlib.crc32(self._bytes(shard, member, at + begin, count), crc)
        if crc != int(row["tok_crc"]):
            raise self._corrupt(shard, member, at, size, ".tok")

    def _corrupt(self, shard: int, member: int, offset: int, size: int, suffix: str) -> Unusable:
        why = (
            f"{self._name(shard, member)}{suffix} at bytes {offset}..{offset + size - 1} is not "
            "what was prepared (checksum)"
        )
        return Unusable(
            f"{self._path(shard)}: {why}",
            "tokens are read only from members whose checksum is the manifest's",
            REPAIR,
            why,
            offset,
        )

    def _ids(self, shard: int, member: int, begin: int, end: int) -> NDArray:
        row = self.split.members[member]
        size = self._dtype.itemsize
        offset = int(row["tok"]) + begin * size
        raw = self._bytes(shard, member, offset, (end - begin) * size)
        ids = np.frombuffer(raw, self._dtype)
        if len(ids) and int(ids.max()) >= self.vocab_size:
            worst = int(np.argmax(ids >= self.vocab_size))
            why = (
                f"{self._name(shard, member)}.tok at byte {offset + worst * size}: token id "
                f"{int(ids[worst])}"
            )
            raise Unusable(
                f"{self._path(shard)}: {why}",
                f"ids are below the vocabulary size {self.vocab_size}",
                "set model.vocab_size to the tokenizer's or leave it out; or prepare the folder "
                "with the model's tokenizer",
                why,
                offset + worst * size,
            )
        return ids

    def _bytes(self, shard: int, member: int, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._file(shard), count, offset)
        except OSError as e:
            why = f"reading {count} bytes at {offset}: {e.strerror}"
            told = f"{self._path(shard)}: {why}", "shards can be read"
            remedy = "check the disk or file system, then run again"
            if e.errno in UNREADABLE:
                raise Unusable(*told, remedy, why, offset) from e
            raise DataError(*told, remedy) from e
        if len(data) != count:
            end = min(offset + len(data), os.fstat(self._file(shard)).st_size)
            why = f"ends at byte {end}, inside {self._name_or_index(member)}"
            rule = "a shard does not change during a run"
            raise Unusable(f"{self._path(shard)}: {why}", rule, REPAIR, why, end)
        return data

    def _file(self, shard: int) -> int:
        known = self._files.get(shard)
        if known is not None:
            self._files.move_to_end(shard)
            return known
        file = self._open(shard)
        self._files[shard] = file
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _open(self, shard: int) -> int:
        store, told = self.manifest.store, self.split.shards[shard]
        try:
            return store.open(told)
        except Unusable as e:
            file = store.open_damaged(told)
            if file is not None and self.tolerant:
                return file  # whole members of it are good
            self._bad[shard, None] = e.why
            value = f"{e.value} ({self._first_bad(shard, file, e.offset)})"
            raise Unusable(value, e.rule, e.remedy, e.why, e.offset) from e

    def _first_bad(self, shard: int, file: int | None, offset: int) -> str:
        """The first bad member of a damaged shard: found in `file`, which is closed; or the one
        around byte `offset`."""
        rows = self.split.first_member[shard : shard + 2]
        if file is not None:
            self._files[shard] = file
            try:
                for member in range(*rows):
                    row = self.split.members[member]
                    raw = self._bytes(shard, member, int(row["len"]), 4 * int(row["documents"]))
                    self._check(shard, member, raw)
            except Unusable as e:
                return e.why
            finally:
                os.close(self._files.pop(shard))
            return "no member differs: the archive's own parts do"
        before = self.split.members["tok"][slice(*rows)] <= offset
        return f"at {self._name_or_index(int(rows[0]) + max(0, int(before.sum()) - 1))}"

    def _path(self, shard: int) -> str:
        return self.manifest.store.where(self.split.shards[shard])

    def _name_or_index(self, member: int) -> str:
        return f"member {member} of {self.split_name}"

    def _name(self, shard: int, member: int) -> str:
        return member_name(self._file(shard), int(self.split.members[member]["len"]))

    def close(self) -> None:
        """Closes the files; the reader may be used again."""
        while self._files:
            os.close(self._files.popitem()[1])
        self.manifest.store.close(self)


_COUNT: Ints = np.arange(1 << 16)


def open_shard(folder: Path, shard: Shard) -> int:
    """A file descriptor of the shard, once it exists and has its size. Raises DataError."""
    return Folder(folder).open(shard)


def member_name(file: int, content: int) -> str:
    """The key of the member whose file's content begins at byte `content`."""
    name = os.pread(file, 100, content - HEADER).split(b"\0")[0]
    return name.decode("ascii", "replace").rpartition(".")[0] or f"the member at {content}"


def verify_shard(folder: Path, shard: Shard) -> None:
    """Compares a whole shard with its sha256 (about 2 GB/s). Raises DataError."""
    os.close(open_shard(folder, shard))
    found = file_sha256(folder / shard.file)
    if found != shard.sha256:
        raise DataError(
            f"{folder / shard.file}: sha256 {found[:16]}..., manifest {shard.sha256[:16]}...",
            "a shard is as `prepare` wrote it",
            REPAIR,
        )
