"""Which files are inputs, and the documents in each: the table of kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from titans_pretrain.data.arrays import read_bin, read_npy
from titans_pretrain.data.content import Document, InputFile, Reading
from titans_pretrain.data.parquet import read_parquet
from titans_pretrain.data.tars import read_tar
from titans_pretrain.data.text import read_json_lines, read_plain, read_raw
from titans_pretrain.data.unpack import COMPRESSIONS
from titans_pretrain.errors import ConfigError, DataError

# (file, how to read it, place to start from) -> its documents, in ascending `offset`. A place to
# start from is the `offset` of a document.
Reader = Callable[[InputFile, Reading, int], Iterator[Document]]

_VALUES: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
    ".tar": read_tar,
}
READERS: dict[str, dict[str, Reader]] = {  # by what the tokenizer takes
    "text": {".txt": read_plain, **_VALUES},
    "bytes": {".txt": read_plain, **_VALUES, ".bin": read_raw, "": read_raw},
    "integers": {".npy": read_npy, ".bin": read_bin, **_VALUES},
}
CUT = ("", ".txt", ".npy", ".bin")  # long files of these can be cut into documents
UNPACKED = (".parquet", ".npy")  # never inside .gz, .xz, .zst


def documents(file: InputFile, reading: Reading, start: int = 0) -> Iterator[Document]:
    """The documents of a file from the one at `start` on."""
    return READERS[reading.content][file.kind](file, reading, start)


def find_inputs(inputs: list[str], content: str = "text") -> list[InputFile]:
    """The files named, or found in the folders named, in a fixed order. Raises DataError."""
    found: list[InputFile] = []
    for given in inputs:
        root = Path(given)
        if root.is_dir():
            files = [p for p in sorted(root.rglob("*")) if p.is_file() and _kind(p, content)]
            names = [path.relative_to(root) for path in files]
            found += [
                _input_file(path, f"{root.name}/{name.as_posix()}", content)
                for path, name in zip(files, names)
                if not any(part.startswith(".") for part in name.parts)
            ]
        elif root.is_file():
            if not _kind(root, content, named=True):
                raise DataError(
                    f"input {given}: unknown kind of file",
                    _rule(content),
                    "convert or rename the file, or choose the tokenizer for what it holds",
                )
            found.append(_input_file(root, root.name, content))
        else:
            raise DataError(f"input {given}: not found", "inputs exist", "check the path")
    if not found:
        raise DataError(
            f"input {', '.join(inputs)}: no {'text files' if content == 'text' else 'input files'}",
            _rule(content),
            "check the folder",
        )
    seen: set[str] = set()
    for file in found:
        if file.path in seen:
            raise DataError(
                f"input {file.path}: given twice",
                "each file is read once",
                "name it once, or only the folder that holds it",
            )
        seen.add(file.path)
    return found


def check_options(files: list[InputFile], reading: Reading) -> None:
    """Raises ConfigError for an option of `reading` that these files cannot follow."""
    length, separator = reading.document_length, reading.separator
    for file in files if length is not None else ():
        if reading.content == "text" or file.kind not in CUT:
            raise ConfigError(
                f"--document-length {length} with {file.name} and a tokenizer of {reading.content}",
                "raw bytes, .npy and .bin files are cut by length, for --tokenizer bytes or "
                "integers:VOCAB; elsewhere a file, line, row or sample is a document",
                "leave it out",
            )
    if separator is not None and not any(file.kind == ".bin" for file in files):
        raise ConfigError(
            f"--separator {separator} without a .bin file",
            "a separator stands between the documents of .bin files",
            "leave it out",
        )
    if separator is not None and not 0 <= separator < reading.ids:
        raise ConfigError(
            f"--separator {separator}",
            f"it is an id of the file, in 0..{reading.ids - 1} (--tokenizer integers:VOCAB)",
            "give the id that ends each document",
        )


def _rule(content: str) -> str:
    kinds = [kind for kind in READERS[content] if kind]
    packed = [kind for kind in kinds if _packable(kind, content)]
    other = ", any other file that is named," if "" in READERS[content] else ""
    return (
        f"with this tokenizer inputs are {', '.join(kinds)}{other} ({', '.join(packed)} also with "
        ".gz, .xz or .zst) or folders of them"
    )


def _packable(kind: str, content: str) -> bool:
    return kind not in UNPACKED and READERS[content].get(kind) is not read_bin


def _kind(path: Path, content: str, named: bool = False) -> tuple[str, str] | None:
    """(kind, compression). A file that is `named` may be raw bytes by any other name."""
    if path.suffix == ".tgz":
        return (".tar", ".gz")
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = Path(path.stem).suffix if compression else path.suffix
    if kind and kind in READERS[content] and (not compression or _packable(kind, content)):
        return kind, compression
    return ("", compression) if named and "" in READERS[content] else None


def _input_file(path: Path, name: str, content: str) -> InputFile:
    kind, compression = _kind(path, content, named=True) or ("", "")
    return InputFile(str(path.resolve()), name, kind, compression)
