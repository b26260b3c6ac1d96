"""The disk cache: signals that a teacher gave once, for every later schedule, number of ranks and micro-batches.

    FOLDER/<teacher's digest>/<16 hex of the blake2b of SignalSpec.parameters>/
        parameters.json            what the folder's name stands for
        part-<time>-<random>.arrow Arrow IPC file of one record batch (megapd.signals.arrow), a row a sample
        head.arrow                 hidden states alone: the head they go with (megapd.signals.heads.encode_head)
        damaged-...                a file found damaged, set aside
        *.tmp-*                    being written, or left by a crash

A signal is found by what was asked (the teacher's digest, the sample's digest, the parameters), never by the step. Files appear
whole or not at all; any number of processes add theirs and see the others'. Of the rows of one sample the earliest part's
counts, so that a cache that grows goes on to answer as it did.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megapd.batch import DIGEST_BYTES, Batch
from megapd.files import TEMPORARY_INFIX, fsync_folder, write_atomic
from megapd.signals import (
    Head,
    Signal,
    SignalDamaged,
    SignalMismatch,
    SignalSpec,
    as_sent,
    decode,
    decode_head,
    encode,
    encode_head,
    pack,
    valid_rows,
)
from megapd.teacher.cache.parts import Index, Rows, check_part, concatenate, read_records, samples_of, write_whole

log = logging.getLogger(__name__)


FORMAT = "megapd-cache/1"


HEAD = "head.arrow"


OPEN_PARTS = 256  # memory maps held; views of a dropped one keep it alive


WRITES_IN_FLIGHT = 2  # each holds its part, or a head, in memory


HEADS_HELD = 2


LEFTOVER_SECONDS = 3600.0  # a part is written in seconds: an older temporary file is a crash's


Content = Callable[[], tuple[pa.Schema, Iterator[pa.RecordBatch]]]


class SignalCache:
    """Signals on disk. Safe to use from several threads and, on one folder, by several processes.

    counts          samples looked up and there (hits) or not (misses), samples written (recorded), files set aside (damaged)
    positions, written_bytes    labelled positions of the samples recorded, and the bytes of the files that hold them
    failure         why recording stopped, None while it has not

    A lookup maps files into memory: one that shrinks while it is read ends the process, as with every memory map.
    """

    def __init__(
        self, folder: Path, *, part_bytes: int = 64 << 20, flush_seconds: float = 60.0, refresh_seconds: float = 5.0
    ) -> None:
        """part_bytes, flush_seconds: a part is written when it holds this many bytes or its first row is this old, so that a
        crash loses at most that; it is held in memory until then. refresh_seconds: after a miss, the folder is listed again for
        other processes' parts if the last listing is older."""
        self.folder = Path(folder)
        self.counts = {"hits": 0, "misses": 0, "recorded": 0, "damaged": 0}
        self.positions = self.written_bytes = 0
        self.failure: str | None = None
        self._part_bytes, self._flush_seconds, self._refresh_seconds = part_bytes, flush_seconds, refresh_seconds
        self._lock = threading.RLock()
        self._indices: dict[tuple[str, str], Index] = {}
        self._open: OrderedDict[Path, pa.RecordBatch] = OrderedDict()
        self._heads: OrderedDict[Path, Head] = OrderedDict()
        self._warned: set[str] = set()
        self._pending: Rows | None = None  # of the part to come, all of `_pending_index`
        self._pending_samples: set[bytes] = set()
        self._pending_index: Index | None = None
        self._pending_since = 0.0
        self._unwritten: dict[Path, pa.RecordBatch] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="signal-cache")
        self._writes: deque[Future[None]] = deque()

    # ----------------------------------------------------------------------------------------------------------- reading

    def lookup(self, teacher: str, spec: SignalSpec, batch: Batch, head: Head | None = None) -> Signal | None:
        """The signal of `batch` by checkpoint `teacher`, on the host, every row's checksum verified; None unless all samples are
        there. head: of hidden states, where it is known; else the recorded one, without which there is no signal either."""
        if spec.definition.with_head and head is None:
            head = self.head(teacher, spec)
        headless = spec.definition.with_head and head is None
        while True:
            with self._lock:
                index = self._index(teacher, spec)
                parts, rows = self._find(index, batch)
                missing = batch.samples if headless else int((parts < 0).sum())
                runs = None if missing else self._runs(index, parts, rows)
            if missing or not batch.samples:
                self._count("misses", missing)
                self._count("hits", batch.samples - missing)
                return None
            signal = None if runs is None else self._decode(index, runs, teacher, spec, batch, head)
            if signal is not None:
                self._count("hits", batch.samples)
                return signal

    def present(self, teacher: str, spec: SignalSpec, batch: Batch) -> NDArray[np.bool_]:
        """Which samples of the batch are there, bool [B]; what they hold is not read."""
        with self._lock:
            return self._find(self._index(teacher, spec), batch)[0] >= 0

    def head(self, teacher: str, spec: SignalSpec) -> Head | None:
        """The recorded head of a teacher's hidden states, on the host, verified; None if there is none."""
        with self._lock:
            path = self._index(teacher, spec).folder / HEAD
            if path in self._heads:
                self._heads.move_to_end(path)
                return self._heads[path]
            try:
                return self._hold_head(path, decode_head(*read_records(path), teacher))
            except FileNotFoundError:
                return None
            except (SignalDamaged, SignalMismatch) as error:
                self._set_aside(path, error)
                return None
            except OSError as error:
                self._warn(f"{path}: cannot be read ({error}); it is not used")
                return None

    def holdings(self, teacher: str) -> list[str]:
        """The parameters of which there is a folder for a teacher: what to tell when others are asked for."""
        found = []
        for path in sorted((self.folder / teacher).glob("*/parameters.json")):
            try:
                found.append(str(json.loads(path.read_bytes())["parameters"]))
            except (OSError, ValueError, KeyError, TypeError):
                found.append(f"{path}, which is damaged")
        return found

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
                index = self._index(signal.teacher, signal.spec)
                parts, rows = self._find(index, batch)
                absent = parts < 0
                if absent.all():
                    self._put(index, signal, record, [(0, batch.samples)], batch)
                    return as_sent(signal)
                runs = self._runs(index, parts, np.where(absent, np.arange(batch.samples, dtype=np.int32), rows), record)
            answer = None if runs is None else self._decode(index, runs, signal.teacher, signal.spec, batch, signal.head)
            if answer is None:
                continue
            with self._lock:
                self._put(index, signal, record, [(row, row + 1) for row in np.flatnonzero(absent).tolist()], batch)
            return answer.to(signal.values.device)

    def flush(self) -> None:
        """Return when all that was recorded is on the disk, or recording has failed."""
        with self._lock:
            self._seal()
        for write in list(self._writes):
            write.result()

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()

    def _put(self, index: Index, signal: Signal, record: pa.RecordBatch, spans: list[tuple[int, int]], batch: Batch) -> None:
        if index is not self._pending_index or (self._pending is not None and self._pending.schema != record.schema):
            self._seal()
        if signal.head is not None:
            self._put_head(index, signal.head, signal.teacher)
        if not spans:
            return
        if self._pending is None:
            self._pending = Rows(record.schema, self._part_bytes)
            self._pending_index, self._pending_since = index, time.monotonic()
        samples = samples_of(record)
        for start, stop in spans:
            # A copy: the record is a view of the signal, whose memory a carrier may use again before the part is written.
            self._pending.add(record.slice(start, stop - start))
            self._pending_samples.update(samples[start:stop].tolist())
            self.positions += int(batch.counts[start:stop].sum())
        if self._pending.bytes >= self._part_bytes or time.monotonic() - self._pending_since >= self._flush_seconds:
            self._seal()

    def _put_head(self, index: Index, head: Head, teacher: str) -> None:
        path = index.folder / HEAD
        if path in self._heads or path.exists():  # another rank may have written it
            return
        bias = None if head.bias is None else head.bias.detach().to("cpu", copy=True)
        copy = self._hold_head(path, Head(head.weight.detach().to("cpu", copy=True), bias))
        self._submit(index, path, lambda: encode_head(copy, teacher))

    def _hold_head(self, path: Path, head: Head) -> Head:
        self._heads[path] = head
        if len(self._heads) > HEADS_HELD:
            self._heads.popitem(last=False)
        return head

    def _seal(self) -> None:
        """Make a part of the pending rows and let it be written; from now on it is found in the index."""
        index, rows = self._pending_index, self._pending
        self._pending, self._pending_samples, self._pending_index = None, set(), None
        if index is None or rows is None:
            return
        record = rows.record()
        # The time comes first, so that names sort by it, and the earliest of a sample's rows is the same for every reader.
        name = f"part-{time.time_ns():016x}-{secrets.token_hex(4)}.arrow"
        path = index.folder / name
        self._unwritten[path] = record
        index.add([(name, samples_of(record))])
        self._submit(index, path, lambda: (record.schema, iter([record])))

    def _submit(self, index: Index, path: Path, content: Content) -> None:
        while len(self._writes) >= WRITES_IN_FLIGHT:
            self._writes.popleft().result()
        self._writes.append(self._writer.submit(self._write, index, path, content))

    def _write(self, index: Index, path: Path, content: Content) -> None:
        """On the writer's thread, without the lock, which a thread that waits for this one may hold. Rows that could not be
        written stay in memory, where they are found until the process ends; there are no more of them than are in flight."""
        if self.failure is not None:
            return
        try:
            self._make_folder(index)
            size = write_whole(path, *content())
        except OSError as error:
            self.failure = f"teacher.cache: {self.folder} cannot be written ({error})"
            log.warning("%s; signals are no longer recorded; free space there, or choose another folder", self.failure)
            return
        self.written_bytes += size
        rows = self._unwritten.pop(path, None)
        if rows is not None:
            self.counts["recorded"] += rows.num_rows  # by this thread alone

    def _make_folder(self, index: Index) -> None:
        about = index.folder / "parameters.json"
        if about.exists():
            return
        names = {"format": FORMAT, "teacher": index.teacher.hex(), "parameters": index.spec.parameters}
        write_atomic(about, json.dumps(names))
        for parent in (index.folder.parent, self.folder):
            fsync_folder(parent)

    # ---------------------------------------------------------------------------------------------------------- the index

    def _index(self, teacher: str, spec: SignalSpec) -> Index:
        key = (teacher, spec.parameters)
        if key not in self._indices:
            name = hashlib.blake2b(spec.parameters.encode(), digest_size=8).hexdigest()
            self._indices[key] = Index(self.folder / teacher / name, teacher, spec)
        return self._indices[key]

    def _find(self, index: Index, batch: Batch) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        samples = batch.sample_digests.view(f"S{DIGEST_BYTES}")
        if index is self._pending_index and not self._pending_samples.isdisjoint(samples.tolist()):
            self._seal()
        now = time.monotonic()
        if self._pending is not None and now - self._pending_since >= self._flush_seconds:
            self._seal()
        parts, rows = index.find(samples)
        if (parts < 0).any() and now - index.listed >= self._refresh_seconds:
            index.listed = now
            self._refresh(index)
            parts, rows = index.find(samples)
        return parts, rows

    def _refresh(self, index: Index) -> None:
        """Index the parts that other processes have written since the last time; remove what crashes left."""
        found = []
        try:
            with os.scandir(index.folder) as entries:
                names = sorted(entry.name for entry in entries)
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(f"{index.folder}: cannot be listed ({error}); what it holds is not used")
            return
        for name in names:
            if TEMPORARY_INFIX in name:
                self._remove_leftover(index.folder / name)
            elif name.startswith("part-") and name.endswith(".arrow") and name not in index.seen:
                record = self._part(index, name)
                if record is not None:
                    found.append((name, samples_of(record)))
        index.add(found)

    def _part(self, index: Index, name: str) -> pa.RecordBatch | None:
        """The rows of a part, mapped; None if it has gone or is damaged, and then it is not asked for again."""
        path = index.folder / name
        unwritten = self._unwritten.get(path)
        if unwritten is not None:
            return unwritten
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        try:
            _, records = read_records(path)
            check_part(records, index)
        except FileNotFoundError:  # another process found it damaged
            self._forget(path)
            return None
        except SignalDamaged as error:
            self._set_aside(path, error)
            return None
        except OSError as error:
            self._warn(f"{path}: cannot be read ({error}); what it holds is not used")
            self._forget(path)
            return None
        self._open[path] = records[0]
        if len(self._open) > OPEN_PARTS:
            self._open.popitem(last=False)
        return records[0]

    def _runs(
        self, index: Index, parts: NDArray[np.int32], rows: NDArray[np.int32], own: pa.RecordBatch | None = None
    ) -> list[tuple[str, pa.RecordBatch]] | None:
        """The rows asked for, in order, as few slices of parts as there can be, each with its part's name; part -1 is `own`.

        None if a part could not be opened: look again, its rows have become missing."""
        breaks = np.flatnonzero((np.diff(parts) != 0) | (np.diff(rows) != 1)) + 1
        edges = [0, *breaks.tolist(), len(parts)]
        runs = []
        for start, stop in itertools.pairwise(edges):
            number = int(parts[start]) if len(parts) else -1
            name = index.names[number] if number >= 0 else ""
            record = self._part(index, name) if name else own
            if record is None:
                return None
            first = int(rows[start]) if len(parts) else 0
            runs.append((name, record.slice(first, stop - start)))
        return runs

    def _decode(
        self,
        index: Index,
        runs: list[tuple[str, pa.RecordBatch]],
        teacher: str,
        spec: SignalSpec,
        batch: Batch,
        head: Head | None,
    ) -> Signal | None:
        """The signal in some slices of parts; None if one is damaged: look again, the rows of its part have become missing."""
        try:
            if any(not rows.schema.equals(runs[0][1].schema) for _, rows in runs[1:]):
                raise SignalDamaged("signal: parts of different types")
            return decode(concatenate([rows for _, rows in runs]), spec, teacher, batch, head)
        except (SignalDamaged, SignalMismatch) as error:
            # The index names them, so all that can be wrong is the files themselves: those whose rows fail, or, should each be
            # right for itself, all of them.
            wrong = {name for name, rows in runs if name and not _valid(rows)} or {name for name, _ in runs if name}
            if not wrong:
                raise
            with self._lock:
                for name in wrong:
                    self._set_aside(index.folder / name, error)
            return None

    # ------------------------------------------------------------------------------------------------------------- damage

    def _set_aside(self, path: Path, error: Exception) -> None:
        self._forget(path)
        self._count("damaged", 1)
        aside = path.with_name(f"damaged-{path.name}")
        try:
            os.replace(path, aside)
            what = f"set aside as {aside.name}"
        except FileNotFoundError:  # another process did
            what = "set aside already"
        except OSError as failure:
            what = f"it could not be set aside ({failure}); remove it"
        self._warn(f"{path}: damaged ({error}), {what}; its samples count as missing")

    def _forget(self, path: Path) -> None:
        """No row of this part is found any more."""
        self._open.pop(path, None)
        for index in self._indices.values():
            if index.folder == path.parent:
                index.seen.add(path.name)
                if path.name in index.names:
                    index.drop(index.names.index(path.name))

    def _remove_leftover(self, path: Path) -> None:
        try:
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
        except FileNotFoundError:  # renamed meanwhile
            return
        except OSError as error:
            self._warn(f"{path}: left by a crash, and it cannot be removed ({error})")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("teacher.cache: %s", text)

    def _count(self, name: str, samples: int) -> None:
        with self._lock:
            self.counts[name] += samples


def _valid(rows: pa.RecordBatch) -> bool:
    try:
        return bool(valid_rows(rows).all())
    except SignalDamaged:  # offsets that do not fit each other
        return False
