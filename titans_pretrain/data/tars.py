"""Documents of WebDataset tars: samples with .txt, .json, .jsonl (or .npy) members.

Samples are grouped by webdataset itself. The archive is read more strictly than tarfile reads
streams: a damaged header in its middle would end it there without a word.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from titans_pretrain.data.content import (
    Document,
    InputFile,
    Reading,
    bad_document,
    json_document,
    value_document,
)
from titans_pretrain.data.unpack import opened
from titans_pretrain.errors import DataError

# Where a sample has members of several kinds (a text and a .json of facts about it), the first
# kind that it has holds its documents.
MEMBERS = {
    "text": ("txt", "json", "jsonl"),
    "bytes": ("txt", "bin", "json", "jsonl"),
    "integers": ("npy", "json", "jsonl"),
}


def read_tar(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The documents of all samples but the first `start`. Raises DataError for a broken tar."""
    import webdataset  # pulls in torch

    number = 0
    with opened(file) as stream:
        try:
            for sample in webdataset.tariterators.group_by_keys(_members(file, stream)):
                for document in sample_documents(sample, file, reading, number):
                    number += 1
                    if document.offset >= start:
                        yield document
        except (tarfile.TarError, ValueError) as e:  # ValueError: two members of one name
            raise DataError(
                f"input {file.path}: broken tar ({e.args[0] if e.args else e})",
                "every input can be read to its end, and names no member twice",
                "fetch the file again or take it out; nothing prepared so far is lost",
            ) from e


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"at byte {tar.offset}: {e}, before its end mark") from e


def _members(file: InputFile, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Files as webdataset's `group_by_keys` takes them."""
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
        for header in tar:
            member = tar.extractfile(header) if header.isreg() else None
            if member is not None and not header.name.startswith("__"):
                yield {"fname": header.name, "data": member.read(), "__url__": file.path}
            tar.members = []  # type: ignore[attr-defined]  # or it keeps them all


def sample_documents(
    sample: dict[str, Any], file: InputFile, reading: Reading, number: int
) -> Iterator[Document]:
    """The documents of a sample, numbered from `number`; or a bad one that says why it has none."""
    where = f"{file.name} sample {sample['__key__']}"
    found: list[tuple[str, bytes]] = []
    for kind in MEMBERS[reading.content]:
        found = found or [(k, v) for k, v in sample.items() if k.split(".")[-1] == kind]
    if not found:
        kinds = ", ".join(f".{kind}" for kind in MEMBERS[reading.content])
        yield bad_document(where, number, f"no member {kinds}")
    for suffix, data in found:
        for document in _of_member(f"{where}.{suffix}", suffix.split(".")[-1], data, reading):
            yield Document(document.where, number, document.parts, document.bad)
            number += 1


def _of_member(where: str, kind: str, data: bytes, reading: Reading) -> Iterator[Document]:
    if kind == "jsonl":
        for i, line in enumerate(io.BytesIO(data)):
            if line.strip():
                yield json_document(line, f"{where} line {i + 1}", 0, reading)
    elif kind == "json":
        yield json_document(data, where, 0, reading)
    elif kind == "npy":
        try:
            value = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as e:
            yield bad_document(where, 0, f"not a .npy file ({e})")
            return
        yield value_document(value, where, 0, reading)
    elif reading.content == "bytes":
        yield value_document(data, where, 0, reading)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            yield bad_document(where, 0, f"not UTF-8 (near byte {e.start})")
            return
        yield value_document(text, where, 0, reading)
