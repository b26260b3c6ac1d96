"""Writes blocks as an Arrow IPC file; megapd.tasks.blocks reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.tasks.blocks import Blocks

__all__ = ["BlockWriter", "Blocks"]

BATCH_BYTES = 4 << 20  # of a record batch: what the writer holds; a file of 100 GB has 25,000, opened in about half a second


class BlockWriter:
    """Appends blocks and writes them in record batches of one size; the last may be smaller.

    digest   hexadecimal sha256 of the file, once closed
    """

    def __init__(self, path: Path, length: int, vocab_size: int) -> None:
        # A block has at most `length` documents, numbered from 0.
        ids, segments = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32), np.min_scalar_type(length - 1)
        self._types = {"ids": ids, "segments": segments}
        fields = []
        for name, dtype in self._types.items():
            item = pa.field("item", pa.from_numpy_dtype(dtype), nullable=False)
            fields.append(pa.field(name, pa.list_(item, length), nullable=False))
        self._schema = pa.schema(fields)
        self._length = length
        self._rows = max(1, BATCH_BYTES // (length * sum(t.itemsize for t in self._types.values())))
        self._held: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._held_rows = 0
        self._file = _HashingFile(path)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
        self.digest = ""

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._file.close()  # half a file, of no use to anyone: no footer
        else:
            self._finish()

    def append(self, ids: NDArray[Any], segments: NDArray[Any]) -> None:
        """ids and segments [blocks, length]."""
        assert ids.shape == segments.shape
        assert ids.shape[1] == self._length
        self._held.append((ids.astype(self._types["ids"]), segments.astype(self._types["segments"])))
        self._held_rows += len(ids)
        while self._held_rows >= self._rows:
            self._write(self._rows)

    def _write(self, rows: int) -> None:
        ids, segments = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        columns = [self._column("ids", ids[:rows]), self._column("segments", segments[:rows])]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._held = [(ids[rows:], segments[rows:])]
        self._held_rows -= rows

    def _column(self, name: str, values: NDArray[Any]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=self._schema.field(name).type)

    def _finish(self) -> None:
        if self._held_rows:
            self._write(self._held_rows)
        self._writer.close()
        self._file.close()
        self.digest = self._file.hash.hexdigest()


class _HashingFile:
    """A file written in sequence, with the sha256 of what went in: the corpus is never read back for its digest."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed
