"""The cache's writer: a thread of its own that puts parts and heads on the disk."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from megapd.errors import DiskFailed
from megapd.files import atomic_file, fsync_path, write_atomic, writing
from megapd.teacher.cache.parts import Index

log = logging.getLogger(__name__)

FORMAT = "megapd-cache/1"
WRITES_IN_FLIGHT = 2  # each holds its part, or a head, in memory

Content = Callable[[], tuple[pa.Schema, Iterator[pa.RecordBatch]]]


class Writer:
    """Writes what it is given in order, until a write fails.

    unwritten   parts that are not on the disk yet, by the path that they will have. Rows that could not be written stay here,
                where they are found until the process ends; there are no more of them than are in flight
    recorded, written_bytes    samples of the parts on the disk, and the bytes of all files
    failure     why nothing is written any more, None while it is
    """

    def __init__(self, folder: Path) -> None:
        self.unwritten: dict[Path, pa.RecordBatch] = {}
        self.recorded = self.written_bytes = 0  # by the thread alone
        self.failure: str | None = None
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="signal-cache")
        self._writes: deque[Future[None]] = deque()

    def add_part(self, index: Index, name: str, record: pa.RecordBatch) -> None:
        path = index.folder / name
        self.unwritten[path] = record
        self.submit(index, path, lambda: (record.schema, iter([record])))

    def submit(self, index: Index, path: Path, content: Content) -> None:
        """Let the file be written into the index's folder; waits while too many are."""
        while len(self._writes) >= WRITES_IN_FLIGHT:
            self._writes.popleft().result()
        self._writes.append(self._thread.submit(self._write, index, path, content))

    def flush(self) -> None:
        """Return when all that was submitted is on the disk, or writing has failed."""
        for write in list(self._writes):
            write.result()

    def close(self) -> None:
        self._thread.shutdown()

    def _write(self, index: Index, path: Path, content: Content) -> None:
        """On the thread, without the cache's lock, which a thread that waits for this one may hold."""
        if self.failure is not None:
            return
        try:
            with writing(index.folder):
                self._make_folder(index)
            schema, records = content()
            with atomic_file(path) as file:
                with pa.ipc.new_file(file, schema) as writer:
                    for record in records:
                        writer.write_batch(record)
                size = file.tell()
        except (DiskFailed, OSError) as error:
            self.failure = f"teacher.cache: {self._folder} cannot be written: {error}"
            log.warning("%s; signals are no longer recorded", self.failure)
            return
        self.written_bytes += size
        rows = self.unwritten.pop(path, None)
        if rows is not None:
            self.recorded += rows.num_rows

    def _make_folder(self, index: Index) -> None:
        about = index.folder / "parameters.json"
        if about.exists():
            return
        names = {"format": FORMAT, "teacher": index.teacher.hex(), "parameters": index.spec.parameters}
        write_atomic(about, json.dumps(names))
        for parent in (index.folder.parent, self._folder):
            fsync_path(parent)
