"""The cache's reader: parts and heads as they lie on the disk, indexed, mapped, and set aside where they are damaged."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from megapd.errors import SignalDamaged, SignalMismatch
from megapd.files import TEMPORARY_INFIX
from megapd.signals import Head, SignalSpec, decode_head
from megapd.teacher.cache.parts import Index, read_records, rows_of, samples_of

log = logging.getLogger(__name__)

T = TypeVar("T")
_NUMBER = re.compile(r"(?:damaged-)?part-([0-9a-f]{16})-[0-9a-f]+\.arrow")
HEAD = "head.arrow"
OPEN_PARTS = 256  # memory maps held; views of a dropped one keep it alive
HEADS_HELD = 2
LEFTOVER_SECONDS = 3600.0  # a part is written in seconds: an older temporary file is a crash's


class Reader:
    """What a cache's folder holds. For one thread at a time.

    damaged     files set aside
    unwritten   parts that are found though they are not on the disk yet, by the path that they will have
    """

    def __init__(self, folder: Path, unwritten: Mapping[Path, pa.RecordBatch]) -> None:
        self.damaged = 0
        self._folder, self._unwritten = folder, unwritten
        self._indices: dict[tuple[str, str], Index] = {}
        self._open: OrderedDict[Path, pa.RecordBatch] = OrderedDict()
        self._heads: OrderedDict[Path, Head] = OrderedDict()
        self._warned: set[str] = set()

    def index(self, teacher: str, spec: SignalSpec) -> Index:
        key = (teacher, spec.parameters)
        if key not in self._indices:
            name = hashlib.blake2b(spec.parameters.encode(), digest_size=8).hexdigest()
            self._indices[key] = Index(self._folder / teacher / name, teacher, spec)
        return self._indices[key]

    def refresh(self, index: Index) -> None:
        """Index the parts that other processes have written since the last time; remove what crashes left."""
        found = []
        try:
            names = sorted(os.listdir(index.folder))
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(f"{index.folder}: cannot be listed ({error}); what it holds is not used")
            return
        for name in names:
            if TEMPORARY_INFIX in name:
                self._remove_leftover(index.folder / name)
            elif name.startswith("part-") and name.endswith(".arrow") and name not in index.seen:
                record = self.part(index, name)
                if record is not None:
                    found.append((name, samples_of(record)))
        index.add(found)

    def next_number(self, index: Index) -> int:
        """One more than of any part there was. Earlier versions have nanoseconds for a number: their parts stay the first."""
        names = list(index.seen)
        with contextlib.suppress(OSError):  # no folder yet, or none that can be written either: the writer tells
            names += os.listdir(index.folder)
        numbers = (_NUMBER.fullmatch(name) for name in names)
        return 1 + max((int(found[1], 16) for found in numbers if found), default=0)

    def part(self, index: Index, name: str) -> pa.RecordBatch | None:
        """The rows of a part, mapped; None if it has gone or is damaged, and then it is not asked for again."""
        path = index.folder / name
        unwritten = self._unwritten.get(path)
        if unwritten is not None:
            return unwritten
        if path not in self._open:
            rows = self._read(path, lambda _, records: rows_of(records, index), "what it holds")
            if rows is None:
                return None
            self._open[path] = rows
            if len(self._open) > OPEN_PARTS:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def head(self, index: Index) -> Head | None:
        """The recorded head of a teacher's hidden states, on the host, verified; None if there is none."""
        path = index.folder / HEAD
        if path not in self._heads:
            head = self._read(path, lambda schema, records: decode_head(schema, records, index.teacher.hex()), "it")
            if head is None:
                return None
            self.hold_head(index, head)
        self._heads.move_to_end(path)
        return self._heads[path]

    def has_head(self, index: Index) -> bool:
        """Whether there is a file of it, or one is being written; another process may have done so."""
        path = index.folder / HEAD
        return path in self._heads or path.exists()

    def hold_head(self, index: Index, head: Head) -> None:
        """`head` is found from now on without being read."""
        self._heads[index.folder / HEAD] = head
        if len(self._heads) > HEADS_HELD:
            self._heads.popitem(last=False)

    def set_aside(self, path: Path, error: Exception) -> None:
        """A damaged file gets another name; what it held is missing."""
        self._forget(path)
        self.damaged += 1
        aside = path.with_name(f"damaged-{path.name}")
        try:
            os.replace(path, aside)
            what = f"set aside as {aside.name}"
        except FileNotFoundError:  # another process did
            what = "set aside already"
        except OSError as failure:
            what = f"it could not be set aside ({failure}); remove it"
        self._warn(f"{path}: damaged ({error}), {what}; its samples count as missing")

    def _read(self, path: Path, content: Callable[[pa.Schema, list[pa.RecordBatch]], T], lost: str) -> T | None:
        """What a file holds; None if it has gone, is damaged and set aside, or cannot be read. lost: what is not used then."""
        try:
            return content(*read_records(path))
        except FileNotFoundError:  # another process found it damaged, or none has written it
            pass
        except (SignalDamaged, SignalMismatch) as error:
            self.set_aside(path, error)
        except OSError as error:
            self._warn(f"{path}: cannot be read ({error}); {lost} is not used")
        self._forget(path)
        return None

    def _forget(self, path: Path) -> None:
        """No row of this part is found any more."""
        self._open.pop(path, None)
        for index in self._indices.values():
            if index.folder == path.parent:
                index.drop(path.name)

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
