"""Documents to fixed blocks, and the Arrow IPC file of blocks that megapd.tasks.blocks reads.

Concatenated, the tokens of a split are one stream: each document's ids, then the separator. Blocks are cut from it without regard
to documents, so no position is padding. Single, a block holds one document, or a part of one that is longer, and is filled up
with padding. In BERT's style each block opens with [CLS], and the rest holds length - 1 tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.tasks.blocks import COLUMNS, PAGE_BLOCKS, check_weights, checks, page_digests

BATCH_BYTES = 4 << 20  # of a record batch: what the writer holds; a file of 100 GB has 25,000, opened in about half a second


@dataclass
class PackCounts:
    """What went through a packer.

    documents, tokens   taken in; tokens with separators
    blocks              given out
    dropped_tokens      the tail that filled no block
    special_tokens      openers and separators in the blocks
    boundaries          neighbours within a block that belong to different documents
    padding             tokens in the blocks that belong to none
    """

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    dropped_tokens: int = 0
    special_tokens: int = 0
    boundaries: int = 0
    padding: int = 0


def total(counts: Iterable[PackCounts]) -> PackCounts:
    """The sum of several."""
    rows = [astuple(one) for one in counts]
    return PackCounts(*map(sum, zip(*rows, strict=True)))


class Packer:
    """Collects documents; `take` gives the blocks that are full.

    A block is ids [length] with segments [length], the number of each token's document within the block. A separator belongs
    to the document it ends, an opener to the block's first document.
    """

    def __init__(self, length: int, separator: int, opener: int | None) -> None:
        self._separator, self._opener = np.array([separator], dtype=np.int32), opener
        self._content = length - (opener is not None)
        self._ids, self._documents = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
        self.pending = 0  # tokens held
        self.counts = PackCounts()

    def add(self, documents: list[NDArray[np.int32]]) -> None:
        """Append documents' ids, without separators. Empty ones are left out."""
        documents = [document for document in documents if len(document)]
        if not documents:
            return
        stream = np.concatenate([part for document in documents for part in (document, self._separator)])
        sizes = [len(document) + 1 for document in documents]
        self._ids.append(stream)
        self._documents.append(np.repeat(np.arange(len(documents)) + self.counts.documents, sizes))
        self.pending += len(stream)
        self.counts.documents += len(documents)
        self.counts.tokens += len(stream)

    @property
    def ready(self) -> int:
        """Full blocks held."""
        return self.pending // self._content

    def take(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All full blocks: ids and segments, [blocks, length] each."""
        blocks = self.ready
        cut = blocks * self._content
        ids, documents = np.concatenate(self._ids), np.concatenate(self._documents)
        self._ids, self._documents = [ids[cut:]], [documents[cut:]]
        self.pending -= cut
        ids, documents = ids[:cut].reshape(blocks, -1), documents[:cut].reshape(blocks, -1)
        if self._opener is not None:
            opener = np.full((blocks, 1), self._opener, dtype=np.int32)
            ids, documents = np.concatenate([opener, ids], axis=1), np.concatenate([documents[:, :1], documents], axis=1)
        self.counts.blocks += blocks
        self.counts.boundaries += int(np.count_nonzero(documents[:, 1:] != documents[:, :-1]))
        self.counts.special_tokens += int(np.count_nonzero(ids == self._separator)) + (blocks if self._opener is not None else 0)
        return ids, documents - documents[:, :1]

    def close(self) -> PackCounts:
        """Drop the tail; the final counts."""
        assert self.ready == 0, "take the full blocks first"
        self.counts.dropped_tokens = self.pending
        return self.counts


class RowPacker:
    """As Packer, but each document has rows of its own: segments are 0, and 1 where a row is padding.

    A separator ends the document's last row, unless that would hold nothing else: then it is dropped.
    """

    def __init__(self, length: int, separator: int, opener: int | None, padding: int) -> None:
        self._length, self._separator, self._padding = length, separator, padding
        self._opened = [] if opener is None else [opener]
        self._rows: list[NDArray[np.int32]] = []
        self.counts = PackCounts()

    def add(self, documents: list[NDArray[np.int32]]) -> None:
        """Append documents' ids, without separators. Empty ones are left out."""
        content = self._length - len(self._opened)
        for document in documents:
            if len(document) == 0:
                continue
            dropped = int(len(document) % content == 0)
            rows = np.append(document, np.int32(self._separator))[: len(document) + 1 - dropped]
            self._rows += [np.append(self._opened, rows[i : i + content]).astype(np.int32) for i in range(0, len(rows), content)]
            self.counts.documents += 1
            self.counts.tokens += len(document) + 1
            self.counts.dropped_tokens += dropped

    @property
    def ready(self) -> int:
        """Rows held."""
        return len(self._rows)

    def take(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All rows: ids and segments, [rows, length] each."""
        ids = np.full((self.ready, self._length), self._padding, dtype=np.int32)
        segments = np.ones(ids.shape, dtype=np.int64)
        for number, row in enumerate(self._rows):
            ids[number, : len(row)], segments[number, : len(row)] = row, 0
        self._rows = []
        self.counts.blocks += len(ids)
        self.counts.padding += int(segments.sum())
        separators = np.count_nonzero((ids == self._separator) & (segments == 0))
        self.counts.special_tokens += int(separators) + len(ids) * len(self._opened)
        return ids, segments

    def close(self) -> PackCounts:
        """The final counts."""
        assert self.ready == 0, "take the rows first"
        return self.counts


class BlockWriter:
    """Appends blocks to a shard, in record batches of one size, of which the last may be smaller, and their checks beside it.

    shard   what meta.json says of it, once closed; see megapd.tasks.blocks
    """

    def __init__(self, path: Path, length: int, vocab_size: int) -> None:
        # A block has at most `length` documents, numbered from 0.
        ids, segments = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32), np.min_scalar_type(length - 1)
        self._types = {"ids": ids, "segments": segments}
        items = {name: pa.field("item", pa.from_numpy_dtype(dtype), nullable=False) for name, dtype in self._types.items()}
        self._schema = pa.schema([pa.field(name, pa.list_(item, length), nullable=False) for name, item in items.items()])
        self._length = length
        self._rows = max(1, BATCH_BYTES // (length * sum(t.itemsize for t in self._types.values())))
        self._held: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._held_rows = 0
        self._vocab_size, self._path = vocab_size, path
        self._weights, self._blocks = check_weights(length), 0
        self._page, self._pages = np.empty((0, len(COLUMNS)), dtype=np.uint64), bytearray()
        with contextlib.ExitStack() as opened:  # closed where what follows fails, as on a full disk
            self._file = opened.enter_context(_HashingFile(path))
            self._checks = opened.enter_context(path.with_suffix(".checks").open("wb"))
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
            self._opened = opened.pop_all()
        self.shard: dict[str, Any] = {}

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._opened:  # after an error half a file, of no use to anyone: no footer
            if kind is None:
                if self._held_rows:
                    self._write(self._held_rows)
                self._writer.close()
                self._check(np.empty((0, self._length), dtype=np.int64), np.empty((0, self._length), dtype=np.int64), last=True)
                self._checks.write(self._pages)
                root = hashlib.sha256(self._pages).hexdigest()
                self.shard = {
                    "file": self._path.name,
                    "blocks": self._blocks,
                    "sha256": self._file.hash.hexdigest(),
                    "root": root,
                }

    def append(self, ids: NDArray[Any], segments: NDArray[Any]) -> None:
        """ids, all below the vocabulary's size, and segments [blocks, length]."""
        assert ids.shape == segments.shape
        assert ids.shape[1] == self._length
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self._vocab_size), "ids below the vocabulary's size"
        self._check(ids.astype(np.int64), segments.astype(np.int64))
        self._held.append((ids.astype(self._types["ids"]), segments.astype(self._types["segments"])))
        self._held_rows += len(ids)
        while self._held_rows >= self._rows:
            self._write(self._rows)

    def _check(self, ids: NDArray[np.int64], segments: NDArray[np.int64], *, last: bool = False) -> None:
        """Write the blocks' checks, and take the digests of whole pages of them, or of the last one too."""
        numbers = np.arange(self._blocks, self._blocks + len(ids))
        self._blocks += len(ids)
        new = np.stack([checks(values, numbers, self._weights) for values in (ids, segments)], axis=1)
        self._checks.write(new.tobytes())
        self._page = np.concatenate([self._page, new])
        whole = len(self._page) if last else len(self._page) // PAGE_BLOCKS * PAGE_BLOCKS
        self._pages += page_digests(self._page[:whole])
        self._page = self._page[whole:]

    def _write(self, rows: int) -> None:
        ids, segments = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(values[:rows].reshape(-1)), type=field.type)
            for values, field in zip((ids, segments), self._schema, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._held = [(ids[rows:], segments[rows:])]
        self._held_rows -= rows


class _HashingFile(io.BufferedWriter):
    """A file written in sequence, with the sha256 of what went in: the corpus is never read back for its digest."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        self.hash.update(data)
        return super().write(data)
