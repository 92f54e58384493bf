"""Documents of plain files: .txt (one a file), .jsonl (one a line), raw bytes.

Nothing here holds more than one JSON line, or a few pieces of a plain file.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from titans_pretrain.data.content import (
    BadDocument,
    Document,
    InputFile,
    Reading,
    json_document,
    value_document,
)
from titans_pretrain.data.unpack import READ, opened


def read_plain(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """A text file is one document; its bytes, where bytes are asked for, may be cut."""
    if reading.content == "bytes":
        yield from read_raw(file, reading, start)
    else:
        yield Document(file.name, 0, lambda: _text_parts(file))


def read_raw(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The file's bytes: one document, or one after another of `reading.document_length`."""
    length = reading.document_length
    if length is None:
        yield Document(file.name, 0, lambda: _raw_parts(file))
        return
    with opened(file, start) as stream:
        while data := stream.read(length):
            yield value_document(data, f"{file.name} byte {start}", start, reading)
            start += len(data)


def read_json_lines(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The documents that begin at byte `start` of the unpacked file, or later."""
    with opened(file, start) as stream:
        offset, number = start, 0
        while line := stream.readline():
            number += 1
            if line.strip():
                place = f"line {number}" if start == 0 else f"byte {offset}"
                yield json_document(line, f"{file.name} {place}", offset, reading)
            offset += len(line)


def _text_parts(file: InputFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    blank, offset = True, 0
    with opened(file) as stream:
        while True:
            data = stream.read(READ)
            try:
                part = decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:
                raise BadDocument(f"not UTF-8 (near byte {offset + e.start})") from e
            blank = blank and not part.strip()
            if part:
                yield part
            if not data:
                break
            offset += len(data)
    if blank:
        raise BadDocument("empty")


def _raw_parts(file: InputFile) -> Iterator[bytes]:
    empty = True
    with opened(file) as stream:
        while data := stream.read(READ):
            empty = False
            yield data
    if empty:
        raise BadDocument("empty")
