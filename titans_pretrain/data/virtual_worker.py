"""One virtual worker of a streamed source: its tars in a seeded order, as packed rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titans_pretrain.config import SourceConfig
from titans_pretrain.data.content import KEYS, Part, Reading
from titans_pretrain.data.order import permute
from titans_pretrain.data.remote import Patience, is_url, shown
from titans_pretrain.data.tar_stream import tar_documents
from titans_pretrain.data.tokens import Tokenizer
from titans_pretrain.errors import DataError

# Of a virtual worker: epoch, tar in its order, document in the tar, padded tokens of it read.
Position = list[int]
Row = tuple[NDArray, NDArray, NDArray, NDArray]  # tokens, labels, positions, mask: each [T]


def list_tars(source: SourceConfig) -> list[str]:
    """The tars of a folder, or the URLs (or paths) that braces expand to. Raises DataError."""
    from webdataset.shardlists import expand_urls

    folder = Path(source.path)
    if not is_url(source.path) and folder.is_dir():
        tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    else:
        try:
            tars = expand_urls(source.path)
        except (ValueError, AssertionError) as e:
            raise DataError(
                f"source {shown(source.path)}: {e}",
                "braces are those of webdataset: part-{000..127}.tar",
                "correct the path",
            ) from e
    if not tars or len(set(tars)) < len(tars):
        raise DataError(
            f"source {shown(source.path)}: {'a tar named twice' if tars else 'no .tar in it'}",
            "a streamed source is a folder of .tar files, or URLs with braces",
            "correct the path",
        )
    return tars


class VirtualWorker:
    """Rows of the tars that one virtual worker owns, for ever."""

    def __init__(
        self,
        tars: list[str],
        key: str,
        tokenizer: Tokenizer,
        patience: Patience,
        shape: tuple[int, int],
        position: Position,
    ) -> None:
        self.tars, self.key, self.tokenizer, self.patience = tars, key, tokenizer, patience
        self.length, self.align = shape
        self.reading = Reading(
            key=KEYS[tokenizer.content], content=tokenizer.content, ids=tokenizer.vocab_size
        )
        self.position = position

    def rows(self) -> Generator[tuple[Row, Position], None, None]:
        """(row, position after it)."""
        epoch, first, document, offset = self.position
        while True:
            order = permute(np.arange(len(self.tars)), len(self.tars), f"{self.key}:{epoch}")
            found = False
            for k in range(first, len(self.tars)):
                with contextlib.closing(
                    self._rows_of(self.tars[order[k]], document, offset)
                ) as rows:
                    for row, at in rows:
                        found = True
                        yield row, [epoch, k, *at] if at else [epoch, k + 1, 0, 0]
                document = offset = 0
            if not found and first == 0:
                raise DataError(
                    f"{', '.join(shown(tar) for tar in self.tars[:3])}: blank documents only",
                    "every virtual worker's tars hold text",
                    "take them out of the source",
                )
            epoch, first = epoch + 1, 0

    def _rows_of(
        self, tar: str, document: int, offset: int
    ) -> Generator[tuple[Row, list[int] | None], None, None]:
        """The rows of one tar from `offset` padded tokens into a document on; None: its last."""
        row, filled = self._empty(), 0
        for number, parts in tar_documents(tar, self.patience, self.reading, document):
            ids = self._encode(parts)
            padded = -(-len(ids) // self.align) * self.align
            at = offset if number == document else 0
            while at < padded:
                count = min(self.length - filled, padded - at)
                _fill(row, filled, ids, at, count)
                filled, at = filled + count, at + count
                if filled == self.length:
                    yield row, [number, at]
                    row, filled = self._empty(), 0
        if filled:
            yield row, None

    def _encode(self, parts: list[Part]) -> NDArray[np.int64]:
        ids = self.tokenizer.encode_parts(parts)
        ends = [self.tokenizer.bos], [self.tokenizer.eos]
        return np.concatenate([ends[0], ids, ends[1]]).astype(np.int64)

    def _empty(self) -> Row:
        pads = np.full((2, self.length), self.tokenizer.pad, np.int64)
        return pads[0], pads[1], np.full(self.length, -1, np.int64), np.zeros(self.length, bool)


def _fill(row: Row, begin: int, ids: NDArray[np.int64], at: int, count: int) -> None:
    """Puts the padded tokens at..at+count of a document into the row from `begin` on."""
    tokens, labels, positions, mask = row
    real = max(0, min(count, len(ids) - at))
    known = max(0, min(count, len(ids) - 1 - at))
    tokens[begin : begin + real] = ids[at : at + real]
    positions[begin : begin + real] = np.arange(real)
    labels[begin : begin + known] = ids[at + 1 : at + 1 + known]
    mask[begin : begin + known] = True
