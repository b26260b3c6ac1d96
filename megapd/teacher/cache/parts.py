"""Parts of the disk cache: Arrow IPC files of signals, and the index of the samples that they hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.batch import DIGEST_BYTES
from megapd.errors import SignalDamaged
from megapd.signals import NO_ARROW, SignalSpec, check_form, digests_of


class Index:
    """Where the samples of one folder of parts lie.

    Sorted digests with part and row of each: 24 bytes a sample (24 MB a million), about 70 for the moment in which parts are
    added. A search is O(log samples).
    """

    def __init__(self, folder: Path, teacher: str, spec: SignalSpec) -> None:
        self.folder, self.teacher, self.spec = folder, bytes.fromhex(teacher), spec
        self.names: list[str] = []  # by number
        self.seen: set[str] = set()  # parts indexed, and those that are not to be opened again
        self.listed = float("-inf")  # time.monotonic() of the last listing
        # Fixed-width strings compare as their bytes, all 16 of them, and unlike void can be sorted.
        self._digests: NDArray[np.bytes_] = np.empty(0, dtype=f"S{DIGEST_BYTES}")
        self._parts: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._rows: NDArray[np.int32] = np.empty(0, dtype=np.int32)

    def add(self, found: Sequence[tuple[str, NDArray[np.bytes_]]]) -> None:
        """Parts with the digests of their rows; of one digest's rows those that were added before come first."""
        if not found:
            return
        digests, parts, rows = [self._digests], [self._parts], [self._rows]
        for name, samples in found:
            parts.append(np.full(len(samples), len(self.names), dtype=np.int32))
            rows.append(np.arange(len(samples), dtype=np.int32))
            digests.append(samples)
            self.names.append(name)
            self.seen.add(name)
        merged = np.concatenate(digests)
        order = np.argsort(merged, kind="stable")
        self._digests, self._parts, self._rows = merged[order], np.concatenate(parts)[order], np.concatenate(rows)[order]

    def find(self, samples: NDArray[np.bytes_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(part, row) int32 [B] of each sample, part -1 where there is none."""
        parts, rows = np.full(len(samples), -1, dtype=np.int32), np.zeros(len(samples), dtype=np.int32)
        if len(self._digests):
            places = np.minimum(np.searchsorted(self._digests, samples), len(self._digests) - 1)
            there = self._digests[places] == samples
            parts[there], rows[there] = self._parts[places[there]], self._rows[places[there]]
        return parts, rows

    def drop(self, name: str) -> None:
        """No row of this part is found from now on, nor is it to be opened again."""
        self.seen.add(name)
        if name in self.names:
            keep = self._parts != self.names.index(name)
            self._digests, self._parts, self._rows = self._digests[keep], self._parts[keep], self._rows[keep]


def read_records(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The schema and record batches of an Arrow IPC file, views of a memory map. OSError, or SignalDamaged if it is none."""
    with pa.memory_map(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
            return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except NO_ARROW as error:
            raise SignalDamaged(f"no Arrow file: {' '.join(str(error).split())}") from error


def rows_of(records: list[pa.RecordBatch], index: Index) -> pa.RecordBatch:
    """The rows of a part's record batches. SignalDamaged unless they are one, of the folder's teacher and parameters."""
    if len(records) != 1 or not check_form(records[0]):
        raise SignalDamaged("not one record batch of signals")
    if records[0].schema.metadata[b"parameters"] != index.spec.parameters.encode():
        raise SignalDamaged("its parameters are not those of its folder")
    if not (digests_of(records[0], "teacher") == np.bytes_(index.teacher)).all():
        raise SignalDamaged("rows of another teacher than its folder's")
    return records[0]


def samples_of(record: pa.RecordBatch) -> NDArray[np.bytes_]:
    """Digests of the rows' samples [B]; a copy, which does not hold the record."""
    return digests_of(record, "sample").copy()


def concatenate(records: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of record batches of one schema; of one alone, itself."""
    if len(records) == 1:
        return records[0]
    columns = [pa.concat_arrays([record.column(name) for record in records]) for name in records[0].schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=records[0].schema)


class Rows:
    """The rows of a part to come, all of one schema, copied one after the other into memory that is laid out as the part's.

    bytes: what `record` will hold. since: time.monotonic() of the first.
    """

    def __init__(self, index: Index, schema: pa.Schema, part_bytes: int) -> None:
        """part_bytes: what is expected; more makes the memory grow, which copies it."""
        self.index, self.schema, self.bytes, self.since = index, schema, 0, time.monotonic()
        self.samples: set[bytes] = set()
        self._expected = part_bytes
        self._columns: dict[str, tuple[NDArray[np.uint8], int]] = {}  # memory, and how much of it is used
        self._counts: list[NDArray[np.int64]] = []  # labelled positions of the samples

    def add(self, record: pa.RecordBatch) -> None:
        self.samples.update(digests_of(record, "sample").tolist())
        counts = np.diff(record.column("values").offsets.to_numpy())
        self._counts.append(counts)
        data = {name: _bytes_of(record.column(name)) for name in self.schema.names}
        size = sum(piece.nbytes for piece in data.values())
        for name, piece in data.items():
            memory, used = self._columns.get(name, (np.empty(0, dtype=np.uint8), 0))
            if used + len(piece) > len(memory):
                # Of the expected bytes, this column's share; pages that are never written to take no memory. Of Arrow's pool,
                # which goes on to use what the last part had: new memory costs as much as the copy.
                room = max(2 * len(memory), (self._expected + size) * len(piece) // max(size, 1), used + len(piece))
                memory, old = np.frombuffer(pa.allocate_buffer(room), dtype=np.uint8), memory
                memory[:used] = old[:used]
            memory[used : used + len(piece)] = piece
            self._columns[name] = memory, used + len(piece)
        self.bytes += size

    def record(self) -> pa.RecordBatch:
        """All of them, views of the memory: nothing is to be added afterwards."""
        counts = np.concatenate(self._counts)
        ends = np.concatenate([[0], np.cumsum(counts)])
        offsets = pa.Array.from_buffers(pa.int64(), len(ends), [None, pa.py_buffer(ends)])
        arrays = []
        for field in self.schema:
            memory, used = self._columns[field.name]
            buffers = [None, pa.py_buffer(memory[:used])]
            if not pa.types.is_large_list(field.type):
                arrays.append(pa.Array.from_buffers(field.type, len(counts), buffers))
                continue
            inner = field.type.value_type
            if pa.types.is_fixed_size_list(inner):
                flat = pa.Array.from_buffers(inner.value_type, int(ends[-1]) * inner.list_size, buffers)
                rows = pa.FixedSizeListArray.from_arrays(flat, inner.list_size)
            else:
                rows = pa.Array.from_buffers(inner, int(ends[-1]), buffers)
            arrays.append(pa.LargeListArray.from_arrays(offsets, rows))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _bytes_of(column: pa.Array) -> NDArray[np.uint8]:
    """What the column's rows hold, without the offsets of lists; a view."""
    first, count = column.offset, len(column)
    if pa.types.is_large_list(column.type):
        offsets = column.offsets.to_numpy()
        column = column.values
        first, count = column.offset + int(offsets[0]), int(offsets[-1] - offsets[0])
        if pa.types.is_fixed_size_list(column.type):
            width, column = column.type.list_size, column.values
            first, count = column.offset + first * width, count * width
    buffer, size = column.buffers()[-1], column.type.bit_width // 8
    if buffer is None:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(buffer, dtype=np.uint8)[first * size : (first + count) * size]
