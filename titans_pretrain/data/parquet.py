"""Documents of parquet files: one a row, of one column, a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from titans_pretrain.data.content import (
    BadDocument,
    Document,
    InputFile,
    Reading,
    bad_document,
    value_document,
)
from titans_pretrain.errors import DataError

BATCH = 1 << 22  # bytes of the column unpacked at a time, about
BUFFER = 1 << 20  # bytes of the file read at a time


def read_parquet(file: InputFile, reading: Reading, start: int) -> Iterator[Document]:
    """The documents of the rows from number `start` on (counted from 0 over all row groups).

    Whole row groups before `start` are passed over. Raises DataError for a file that cannot be
    read, or without a fitting column.
    """
    with _opened(file) as source:
        _check_column(source.schema_arrow, file, reading)
        first = 0
        for group in range(source.num_row_groups):
            count = source.metadata.row_group(group).num_rows
            if first + count > start:
                yield from _group(source, group, first, start, file, reading)
            first += count


def _group(
    source: Any, group: int, first: int, start: int, file: InputFile, reading: Reading
) -> Iterator[Document]:
    rows = _rows_at_once(source.metadata.row_group(group), reading.key)
    for batch in source.iter_batches(rows, [group], [reading.key], use_threads=False):
        column = batch.column(0)
        for i in range(max(0, start - first), len(column)):
            where = f"{file.name} row {first + i}"
            try:
                value = _value(column[i], reading)
            except BadDocument as e:
                yield bad_document(where, first + i, str(e))
            else:
                yield value_document(value, where, first + i, reading)
        first += len(column)


def _rows_at_once(group: Any, key: str) -> int:
    """Rows that unpack to about BATCH bytes: documents differ by orders of magnitude."""
    chunks = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == key)
    return max(1, min(4096, BATCH * group.num_rows // max(size, 1)))


def _value(scalar: Any, reading: Reading) -> Any:
    if not scalar.is_valid:
        raise BadDocument("null")
    if reading.content == "integers":
        return scalar.values.to_numpy(zero_copy_only=False)
    try:
        return scalar.as_py()
    except UnicodeDecodeError as e:
        raise BadDocument(f"not UTF-8 (byte {e.start} of the value)") from e


def _check_column(schema: Any, file: InputFile, reading: Reading) -> None:
    import pyarrow.types as types

    if reading.key not in schema.names:
        raise DataError(
            f"input {file.path}: no column {reading.key!r}; it has "
            f"{', '.join(schema.names[:20]) or 'none'}",
            "every parquet file holds the documents in the same column",
            "name the column with --text-key",
        )
    found = kind = schema.field(reading.key).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if reading.content == "integers":
        lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        fits, wanted = lists and types.is_integer(kind.value_type), "a list of integers"
    elif reading.content == "bytes":
        binary = types.is_binary(kind) or types.is_large_binary(kind)
        fits, wanted = text or binary or types.is_binary_view(kind), "strings or binary"
    else:
        fits, wanted = text, "strings"
    if not fits:
        raise DataError(
            f"input {file.path}: column {reading.key!r} holds {found}",
            f"for this tokenizer a column holds {wanted}",
            "name another column with --text-key, or use the tokenizer for what it holds",
        )


@contextmanager
def _opened(file: InputFile) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        # A buffer: column chunks are read as they are needed, not whole.
        with pyarrow.parquet.ParquetFile(
            file.path, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True
        ) as source:
            yield source
    except (pyarrow.ArrowException, OSError) as e:  # a broken page is an OSError, too
        raise DataError(
            f"input {file.path}: broken or unreadable parquet file ({e})",
            "every input can be read to its end",
            "fetch the file again or take it out; nothing prepared so far is lost",
        ) from e
