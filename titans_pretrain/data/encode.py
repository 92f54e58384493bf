"""Units of work, tokenized: each becomes an atomically renamed folder of shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from titans_pretrain.data.content import BadDocument, Document, InputFile, Reading
from titans_pretrain.data.files import writing
from titans_pretrain.data.inputs import documents
from titans_pretrain.data.pack import ShardWriter
from titans_pretrain.data.scan import Hashed, HeldOut, Piece, Unit
from titans_pretrain.data.tokens import Tokenizer


@dataclass(frozen=True)
class Job:
    """What the units of a preparation have in common."""

    work: str  # folder: `tokenizer.model`, and units/ for what is done
    special: dict[str, int]  # bos, eos, pad
    reading: Reading
    held_out: HeldOut
    member_tokens: int
    shard_tokens: int

    def folder(self, number: int) -> Path:
        """Where unit `number` lies once it is done."""
        return unit_folder(Path(self.work), number)


Numbered = tuple[int, list[tuple[InputFile, Piece]]]  # a unit's number, and where its text lies


def unit_folder(work: Path, number: int) -> Path:
    return work / "units" / f"{number:05d}"


def cut_runs(
    units: list[Unit], missing: list[int], files: list[InputFile], workers: int
) -> list[list[Numbered]]:
    """The missing units as runs, each done by one process one unit after another.

    A unit is a run of its own, but where it begins inside a file that can only be read from its
    start: there neighbours are joined, into about as many runs as there are workers, so that a
    huge packed file is unpacked once a worker rather than once a unit.
    """
    longest = -(-len(missing) // workers)
    runs: list[list[Numbered]] = []
    for number in missing:
        first = units[number][0]
        inside = first.start > 0 and files[first.file].sequential
        here = (number, [(files[piece.file], piece) for piece in units[number]])
        if inside and runs and runs[-1][-1][0] == number - 1 and len(runs[-1]) < longest:
            runs[-1].append(here)
        else:
            runs.append([here])
    return runs


class _Cursor:
    """Reads piece after piece; within a file it goes on where the last piece ended."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._file: InputFile | None = None
        self._at: int | None = 0
        self._source: Iterator[Document] = iter(())
        self._next: Document | None = None

    def documents(self, file: InputFile, piece: Piece) -> Iterator[Document]:
        if self._file != file or self._at != piece.start:
            self._file = file
            self._source = documents(file, self._reading, piece.start)
            self._next = next(self._source, None)
        while self._next is not None and (piece.stop is None or self._next.offset < piece.stop):
            yield self._next
            self._next = next(self._source, None)
        self._at = piece.stop


def encode_run(job: Job, run: list[Numbered], report: Callable[[int], None]) -> None:
    """Tokenizes the units of a run."""
    tokenizer = Tokenizer.load(Path(job.work) / "tokenizer.model", **job.special)
    cursor = _Cursor(job.reading)
    for number, pieces in run:
        source = (doc for file, piece in pieces for doc in cursor.documents(file, piece))
        encode_unit(job, number, source, tokenizer, report)


def encode_unit(
    job: Job,
    number: int,
    source: Iterator[Document],
    tokenizer: Tokenizer,
    report: Callable[[int], None],
) -> None:
    """One unit: its training shards, and its held-out documents (packed when all are known)."""
    done = job.folder(number)
    folder = done.with_name(f"{done.name}.{os.getpid()}.tmp")
    with writing(folder):
        folder.mkdir()
    ends = [np.asarray([i], tokenizer.dtype) for i in (tokenizer.bos, tokenizer.eos)]
    name = f"train-{number:05d}"
    writer = ShardWriter(folder, name, tokenizer.dtype, job.member_tokens, job.shard_tokens)
    held: list[np.ndarray] = []
    unknown = 0
    for document in source:
        if document.bad is not None:
            continue
        parts = Hashed(document.parts())
        try:
            ids = tokenizer.encode_parts(parts)
        except BadDocument:
            continue
        unknown += int(np.count_nonzero(ids == tokenizer.unk))
        tokens = np.concatenate([ends[0], ids, ends[1]])
        if parts.hash in job.held_out:
            held.append(tokens)
        else:
            writer.add(tokens)
        report(parts.size)
    shards, members = writer.close()
    with writing(folder):
        np.save(folder / "members.npy", members)
        np.save(folder / "held.npy", np.concatenate([np.zeros(0, tokenizer.dtype), *held]))
        np.save(folder / "held_lengths.npy", np.asarray([len(d) for d in held], np.int64))
        told = {"shards": [asdict(s) for s in shards], "unknown": unknown}
        (folder / "unit.json").write_text(json.dumps(told))
        for path in folder.iterdir():
            _sync(path)
        if done.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(done)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
