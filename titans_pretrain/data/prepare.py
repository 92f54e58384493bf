"""Documents in, WebDataset shards and a manifest out: parallel, restartable, always the same bytes.

The work lies in OUT/.work until all of it is done: a scan of each input file, then units of work,
each an atomically renamed folder. A killed run leaves whole units or nothing, and the same command
goes on with the units that are missing. Units, order and bytes depend on the inputs and settings
alone, not on processes or kills.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titans_pretrain.data.content import InputFile, Reading
from titans_pretrain.data.encode import Job, cut_runs, encode_run, unit_folder
from titans_pretrain.data.files import write_atomically, writing
from titans_pretrain.data.inputs import check_options, find_inputs
from titans_pretrain.data.manifest import (
    MEMBER,
    Manifest,
    Shard,
    Split,
    load_manifest,
    write_manifest,
)
from titans_pretrain.data.pack import ShardWriter
from titans_pretrain.data.pool import Pool, Task
from titans_pretrain.data.raw_tokens import Raw
from titans_pretrain.data.scan import (
    choose_validation,
    cut_units,
    load_scan,
    refuse_bad,
    save_scan,
    scan_file,
    unit_size,
)
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import ConfigError, DataError

LISTED = 100  # skipped documents and inputs named in the manifest itself


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the prepared folder, together with inputs and tokenizer."""

    validation: float = 0.03  # share of the text held out
    on_bad: str = "skip"  # or "stop"
    text_key: str = "text"
    member_tokens: int = 1 << 20
    shard_tokens: int = 1 << 27
    unit_bytes: int | None = None  # text in a unit of work; default: by the corpus's size
    document_length: int | None = None  # long sequences are cut; default: not
    separator: int | None = None  # the id between the documents of a .bin file

    def __post_init__(self) -> None:
        if not 0 < self.validation <= 0.5:
            raise ConfigError(
                f"--validation {self.validation}",
                "the held-out share lies above 0 and is at most 0.5",
                "e.g. --validation 0.03",
            )
        for name in ("member_tokens", "shard_tokens", "unit_bytes", "document_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}", "sizes are positive", "leave it out")

    def reading(self, tokenizer: Tokenizer) -> Reading:
        """How inputs become documents for this tokenizer."""
        ids = tokenizer.ids if isinstance(tokenizer, Raw) else 0
        return Reading(self.text_key, tokenizer.content, ids, self.document_length, self.separator)

    def told(self) -> dict[str, Any]:
        """For the manifest: settings of later versions only where they are set."""
        later = ("document_length", "separator")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in later}


def prepare(
    inputs: list[str],
    out: str | Path,
    tokenizer: Tokenizer,
    settings: Settings = Settings(),
    workers: int = 1,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Prepares `inputs` into the folder `out`, or finishes what an earlier call began there.

    Raises ConfigError and DataError for what the user gave, NodeError for the disk.
    """
    out = Path(out)
    reading = settings.reading(tokenizer)
    files = find_inputs(inputs, tokenizer.content)
    check_options(files, reading)
    identity = _identity(files, tokenizer, settings)
    finished = _finished(out, identity)
    if finished is not None:
        say(f"{out} is prepared already (manifest {finished.hash[:12]}...)")
        return finished
    with _work_folder(out, {**identity, "files": _stamps(files)}) as work:
        write_atomically(work / "tokenizer.model", tokenizer.model)
        pool = Pool(workers, say)
        special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}

        def scanned(i: int) -> Path:
            return work / "scan" / f"{i:06d}.npz"

        missing = [i for i in range(len(files)) if not scanned(i).exists()]
        tasks = [
            Task(_scan, (str(scanned(i)), files[i], reading, settings.on_bad)) for i in missing
        ]
        pool.run(tasks, "reading", sum(Path(files[i].path).stat().st_size for i in missing))

        hashes, sizes, bad = [], [], []
        for i in range(len(files)):
            scan = load_scan(scanned(i))
            hashes.append(scan.hashes)
            sizes.append(scan.sizes)
            bad += scan.bad
        refuse_bad(sum(map(len, hashes)), bad)
        size = np.concatenate(sizes)
        total = int(size.sum())
        held_out = choose_validation(np.concatenate(hashes), size, settings.validation)
        unit_bytes = settings.unit_bytes or unit_size(total)
        units = cut_units((load_scan(scanned(i)) for i in range(len(files))), unit_bytes)

        missing = [n for n in range(len(units)) if not unit_folder(work, n).exists()]
        if len(missing) < len(units):
            say(f"going on: {len(units) - len(missing)} of {len(units)} units are done")
        limits = (settings.member_tokens, settings.shard_tokens)
        job = Job(str(work), special, reading, held_out, *limits)
        runs = cut_runs(units, missing, files, workers)
        tasks = [Task(encode_run, (job, run)) for run in runs]
        pool.run(tasks, "tokenizing", total * len(missing) // len(units))
        header = _header(identity, tokenizer, settings, bad, total, len(size))
        return _finish(out, work, len(units), header, tokenizer, settings, bad)


def _identity(files: list[InputFile], tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """What a folder is prepared from: two equal identities give equal bytes."""
    listed = [[f.name, Path(f.path).stat().st_size] for f in files]
    return {
        "inputs": {
            "files": len(files),
            "bytes": sum(size for _, size in listed),
            "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            "first": listed[:LISTED],
        },
        "tokenizer": [tokenizer.hash, tokenizer.bos, tokenizer.eos, tokenizer.pad],
        "settings": settings.told(),
    }


def _stamps(files: list[InputFile]) -> list[list[Any]]:
    return [[f.path, Path(f.path).stat().st_mtime_ns] for f in files]


def _finished(out: Path, identity: dict[str, Any]) -> Manifest | None:
    if not (out / "manifest.json").exists():  # it is written last
        return None
    manifest = load_manifest(out)
    if manifest.header["identity"] != identity:
        raise DataError(
            f"{out} holds data prepared from other inputs, tokenizer or settings",
            "a folder holds one preparation",
            "give another --out, or remove the folder",
        )
    if (out / ".work").exists():
        with writing(out):
            shutil.rmtree(out / ".work")
    return manifest


@contextmanager
def _work_folder(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """OUT/.work, locked, holding the plan; removed when the preparation is complete."""
    work = out / ".work"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in out.iterdir() if p.name != ".work"]
        if foreign and not work.exists():
            raise DataError(
                f"{out} is not empty ({', '.join(sorted(foreign)[:3])})",
                "prepare writes into a new or empty folder, or one it left unfinished",
                "give another --out",
            )
        for name in ("scan", "units"):
            (work / name).mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(
                f"{out}: another prepare is at work there",
                "one command at a time prepares a folder",
                "wait for it, or give another --out",
            ) from e
        told = work / "plan.json"
        if told.exists() and json.loads(told.read_text()) != plan:
            raise DataError(
                f"{out} holds unfinished work on other inputs, tokenizer or settings (or the "
                "inputs changed since)",
                "an interrupted preparation is finished by the same command",
                "give another --out, or remove the folder to begin anew",
            )
        write_atomically(told, json.dumps(plan).encode())
        for stale in (work / "units").glob("*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        yield work
        with writing(work):
            shutil.rmtree(work)


def _scan(
    path: str, file: InputFile, reading: Reading, on_bad: str, report: Callable[[int], None]
) -> None:
    save_scan(Path(path), scan_file(file, reading, on_bad, report))


def _header(
    identity: dict[str, Any],
    tokenizer: Tokenizer,
    settings: Settings,
    bad: list[tuple[str, str]],
    text_bytes: int,
    documents: int,
) -> dict[str, Any]:
    return {
        "identity": identity,
        **tokenizer.header(),
        "documents": documents,
        "text_bytes": text_bytes,
        "skipped": {"documents": len(bad), "first": [list(item) for item in bad[:LISTED]]},
    }


def _finish(
    out: Path,
    work: Path,
    units: int,
    header: dict[str, Any],
    tokenizer: Tokenizer,
    settings: Settings,
    bad: list[tuple[str, str]],
) -> Manifest:
    """Moves the units' shards into place, packs the held-out documents, writes the manifest.

    Can be repeated from the start after a kill at any point.
    """
    shards: list[Shard] = []
    tables = [np.zeros(0, MEMBER)]
    unknown = 0
    packed = work / "validation"
    if packed.exists():
        with writing(packed):
            shutil.rmtree(packed)
    with writing(packed):
        packed.mkdir()
    validation = ShardWriter(
        packed, "validation", tokenizer.dtype, settings.member_tokens, settings.shard_tokens
    )
    for number in range(units):
        folder = unit_folder(work, number)
        told = json.loads((folder / "unit.json").read_text())
        unknown += told["unknown"]
        members = np.load(folder / "members.npy")
        members["shard"] += len(shards)
        tables.append(members)
        shards += [Shard(**s) for s in told["shards"]]
        for shard in told["shards"]:
            _move(folder / shard["file"], out / shard["file"])
        held = np.load(folder / "held.npy")
        ends = np.cumsum(np.load(folder / "held_lengths.npy"))
        for document in np.split(held, ends)[:-1]:
            validation.add(document)
    held_shards, held_members = validation.close()
    for held_shard in held_shards:
        _move(packed / held_shard.file, out / held_shard.file)
    write_atomically(out / "tokenizer.model", tokenizer.model)
    write_atomically(out / "skipped.json", (json.dumps(bad, indent=1) + "\n").encode())
    header["tokenizer"]["unknown_tokens"] = unknown
    splits = {
        "train": Split(shards, np.concatenate(tables)),
        "validation": Split(held_shards, held_members),
    }
    return write_manifest(out, header, splits)


def _move(source: Path, target: Path) -> None:
    with writing(target):
        if source.exists() or not target.exists():
            source.replace(target)
