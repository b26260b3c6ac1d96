"""The disk cache: signals that a teacher gave once, for every later schedule, number of ranks and micro-batches.

    FOLDER/<teacher's digest>/<16 hex of the blake2b of SignalSpec.parameters>/
        parameters.json            what the folder's name stands for
        part-<number>-<random>.arrow Arrow IPC file of one record batch (megapd.signals.arrow), a row a sample
        head.arrow                 hidden states alone: the head they go with (megapd.signals.encode_head)
        damaged-...                a file found damaged, set aside
        *.tmp-*                    being written, or left by a crash

A signal is found by what was asked (the teacher's digest, the sample's digest, the parameters), never by the step. Files appear
whole or not at all; any number of processes add theirs and see the others'. Of the rows of one sample the earliest part's
counts, so that a cache that grows goes on to answer as it did.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.batch import DIGEST_BYTES, Batch
from megapd.errors import SignalDamaged, SignalMismatch
from megapd.signals import Head, Signal, SignalSpec, as_sent, decode, encode, encode_head, pack, valid_rows
from megapd.teacher.cache.parts import Index, Rows, concatenate, samples_of
from megapd.teacher.cache.reader import HEAD, Reader
from megapd.teacher.cache.writer import Writer


class Run(NamedTuple):
    """Rows of one part that follow each other. part: its name; empty for rows that are to be recorded."""

    part: str
    rows: pa.RecordBatch


class SignalCache:
    """Signals on disk. Safe to use from several threads and, on one folder, by several processes.

    positions   labelled positions of the samples recorded

    A lookup maps files into memory: one that shrinks while it is read ends the process, as with every memory map.
    """

    def __init__(
        self, folder: Path, *, part_bytes: int = 64 << 20, flush_seconds: float = 60.0, refresh_seconds: float = 5.0
    ) -> None:
        """part_bytes, flush_seconds: a part is written when it holds this many bytes or its first row is this old, so that a
        crash loses at most that; it is held in memory until then. refresh_seconds: after a miss, the folder is listed again for
        other processes' parts if the last listing is older."""
        self.folder = Path(folder)
        self.positions = 0
        self._hits = self._misses = 0
        self._part_bytes, self._flush_seconds, self._refresh_seconds = part_bytes, flush_seconds, refresh_seconds
        self._lock = threading.RLock()  # of all but the writer's thread
        self._writer = Writer(self.folder)
        self._reader = Reader(self.folder, self._writer.unwritten)
        self._pending: Rows | None = None  # of the part to come

    @property
    def counts(self) -> dict[str, int]:
        """Samples looked up and there (hits) or not (misses), samples written (recorded), files set aside (damaged)."""
        return {"hits": self._hits, "misses": self._misses, "recorded": self._writer.recorded, "damaged": self._reader.damaged}

    @property
    def written_bytes(self) -> int:
        """Of the files that hold what was recorded."""
        return self._writer.written_bytes

    @property
    def failure(self) -> str | None:
        """Why recording stopped, None while it has not."""
        return self._writer.failure

    # ----------------------------------------------------------------------------------------------------------- reading

    def lookup(self, teacher: str, spec: SignalSpec, batch: Batch, head: Head | None = None) -> Signal | None:
        """The signal of `batch` by checkpoint `teacher`, on the host, every row's checksum verified; None unless all samples are
        there. head: of hidden states, where it is known; else the recorded one, without which there is no signal either."""
        if spec.definition.with_head and head is None:
            head = self.head(teacher, spec)
        headless = spec.definition.with_head and head is None
        while True:
            with self._lock:
                index = self._reader.index(teacher, spec)
                parts, rows = self._find(index, batch)
                missing = batch.samples if headless else int((parts < 0).sum())
                if missing or not batch.samples:
                    self._misses += missing
                    self._hits += batch.samples - missing
                    return None
                runs = self._runs(index, parts, rows)
            signal = None if runs is None else self._decode(index, runs, batch, head)
            if signal is not None:
                with self._lock:
                    self._hits += batch.samples
                return signal

    def present(self, teacher: str, spec: SignalSpec, batch: Batch) -> NDArray[np.bool_]:
        """Which samples of the batch are there, bool [B]; what they hold is not read."""
        with self._lock:
            return self._find(self._reader.index(teacher, spec), batch)[0] >= 0

    def head(self, teacher: str, spec: SignalSpec) -> Head | None:
        """The recorded head of a teacher's hidden states, on the host, verified; None if there is none."""
        with self._lock:
            return self._reader.head(self._reader.index(teacher, spec))

    def holdings(self, teacher: str) -> list[str]:
        """The parameters of which there is a folder for a teacher: what to tell when others are asked for."""
        found = []
        for path in sorted((self.folder / teacher).glob("*/parameters.json")):
            try:
                found.append(str(json.loads(path.read_bytes())["parameters"]))
            except (OSError, ValueError, KeyError, TypeError):
                found.append(f"{path}, which is damaged")
        return found

    def _find(self, index: Index, batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(part, row) int32 [B] of each sample, part -1 where there is none: of what is pending too, which becomes a part."""
        samples = batch.sample_digests.view(f"S{DIGEST_BYTES}")
        now, pending = time.monotonic(), self._pending
        asked = pending is not None and pending.index is index and not pending.samples.isdisjoint(samples.tolist())
        if asked or (pending is not None and now - pending.since >= self._flush_seconds):
            self._seal()
        parts, rows = index.find(samples)
        if (parts < 0).any() and now - index.listed >= self._refresh_seconds:
            index.listed = now
            self._reader.refresh(index)
            parts, rows = index.find(samples)
        return parts, rows

    def _runs(
        self, index: Index, parts: NDArray[np.int32], rows: NDArray[np.int32], own: pa.RecordBatch | None = None
    ) -> list[Run] | None:
        """The rows asked for, in order, as few slices of parts as there can be; part -1 is `own`.

        None if a part could not be opened: look again, its rows have become missing."""
        breaks = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) != 1)) + 1
        runs = []
        for start, stop in itertools.pairwise([0, *breaks.tolist(), len(parts)]):
            name = index.names[parts[start]] if parts[start] >= 0 else ""
            record = self._reader.part(index, name) if name else own
            if record is None:
                return None
            runs.append(Run(name, record.slice(int(rows[start]), stop - start)))
        return runs

    def _decode(self, index: Index, runs: list[Run], batch: Batch, head: Head | None) -> Signal | None:
        """The signal in some slices of parts; None if one is damaged: look again, the rows of its part have become missing."""
        try:
            if any(not run.rows.schema.equals(runs[0].rows.schema) for run in runs[1:]):
                raise SignalDamaged("signal: parts of different types")
            return decode(concatenate([run.rows for run in runs]), index.spec, index.teacher.hex(), batch, head)
        except (SignalDamaged, SignalMismatch) as error:
            # The index names them, so all that can be wrong is the files themselves: those whose rows fail, or, should each be
            # right for itself, all of them.
            files = [run for run in runs if run.part]
            wrong = {run.part for run in files if not _valid(run.rows)} or {run.part for run in files}
            if not wrong:
                raise
            with self._lock:
                for name in wrong:
                    self._reader.set_aside(index.folder / name, error)
            return None

    # ----------------------------------------------------------------------------------------------------------- writing

    def record(self, signal: Signal, batch: Batch, classes: int) -> Signal:
        """Add what the cache lacks of a signal of `batch`; returns what it answers for the batch from now on, on its device.

        classes: of the teacher's head. Values as the teacher gave them, or as they were decoded. After a failure to write, which
        is warned about once, nothing is added any more and the signal alone is returned, rounded as ever.
        """
        if self.failure is not None or not batch.samples:
            return as_sent(signal)
        signal = pack(signal)
        record = encode(signal, batch, classes)
        while True:
            with self._lock:
                index = self._reader.index(signal.teacher, signal.spec)
                parts, rows = self._find(index, batch)
                absent = parts < 0
                if absent.all():
                    self._put(index, signal, record, [(0, batch.samples)], batch)
                    return as_sent(signal)
                runs = self._runs(index, parts, np.where(absent, np.arange(batch.samples, dtype=np.int32), rows), record)
            answer = None if runs is None else self._decode(index, runs, batch, signal.head)
            if answer is not None:
                with self._lock:
                    self._put(index, signal, record, [(row, row + 1) for row in np.flatnonzero(absent).tolist()], batch)
                return answer.to(signal.values.device)

    def flush(self) -> None:
        """Return when all that was recorded is on the disk, or recording has failed."""
        with self._lock:
            self._seal()
        self._writer.flush()

    def close(self) -> None:
        self.flush()
        self._writer.close()

    def _put(self, index: Index, signal: Signal, record: pa.RecordBatch, spans: list[tuple[int, int]], batch: Batch) -> None:
        """Add some rows [start, stop) of the record to the part to come, and the head to what is written."""
        if self._pending is not None and (self._pending.index is not index or self._pending.schema != record.schema):
            self._seal()
        if signal.head is not None and not self._reader.has_head(index):
            head = signal.head.map(lambda tensor: tensor.detach().to("cpu", copy=True))
            self._reader.hold_head(index, head)
            self._writer.submit(index, index.folder / HEAD, lambda: encode_head(head, index.teacher.hex()))
        if not spans:
            return
        if self._pending is None:
            self._pending = Rows(index, record.schema, self._part_bytes)
        for start, stop in spans:
            # A copy: the record is a view of the signal, whose memory a carrier may use again before the part is written.
            self._pending.add(record.slice(start, stop - start))
            self.positions += int(batch.counts[start:stop].sum())
        if self._pending.bytes >= self._part_bytes or time.monotonic() - self._pending.since >= self._flush_seconds:
            self._seal()

    def _seal(self) -> None:
        """Make a part of the pending rows and let it be written; from now on it is found in the index."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        record = pending.record()
        # Counted, so that names sort in the order of writing whatever a clock says: the earliest of a sample's rows is the same
        # for every reader. Of two processes that take one number the names' ends decide.
        name = f"part-{self._reader.next_number(pending.index):016x}-{secrets.token_hex(4)}.arrow"
        pending.index.add([(name, samples_of(record))])
        self._writer.add_part(pending.index, name, record)


def _valid(rows: pa.RecordBatch) -> bool:
    try:
        return bool(valid_rows(rows).all())
    except SignalDamaged:  # offsets that do not fit each other
        return False
