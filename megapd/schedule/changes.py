"""Carried out of megapd/schedule/live.py."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.schedule.adaptive import EmbeddedDecider, reported_kind
from megapd.schedule.live import Change, Version
from megapd.schedule.plan import Decision

FORMAT = "megapd-changes/1"


FILE = "changes.json"  # in the run's folder


# ------------------------------------------------------------------------------------------------------------ the record


class ChangeLog:
    """The changes of a run in its folder: rewritten whole with each, which comes before any rank uses it."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. UserError if the file is damaged."""
        self._path = path
        self._changes: list[Change] = []
        if path.exists():
            try:
                tree = json.loads(path.read_text())
                if tree["format"] != FORMAT:
                    raise ValueError(f"its format is {tree['format']!r}, this megapd reads {FORMAT!r}")
                self._changes = [_parse(entry) for entry in tree["changes"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: damaged ({error}); restore it from a copy, or start a run of another name") from error

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(self._changes)

    def append(self, change: Change) -> None:
        """Returns when it is on the disk."""
        entries = [{"kind": type(entry).__name__.lower(), **asdict(entry)} for entry in (*self._changes, change)]
        write_atomic(self._path, json.dumps({"format": FORMAT, "changes": entries}, indent=1))
        self._changes.append(change)


def _parse(entry: Mapping[str, Any]) -> Change:
    given = {key: value for key, value in entry.items() if key != "kind"}
    if entry["kind"] == "version":
        return Version(**{**given, "rotations": tuple((start, teacher) for start, teacher in given["rotations"])})
    if entry["kind"] == "decision":
        return Decision(**given)
    raise ValueError(f"kind {entry['kind']!r}")


# ----------------------------------------------------------------------------------------------------------- the sources


class ChangeSource(Protocol):
    """Where a run's changes come from, on rank 0.

    report  a line of metrics, kind train or eval, after `step` student steps
    next    before each student step, all before it reported: the change to take in now, None if there is none; on record before
            it is returned
    sync    before a checkpoint of the run is written: what was reported lasts as the checkpoint does
    """

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def next(self, step: int) -> Change | None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class EmbeddedSource:
    """Decisions of an adaptive schedule, made in the run's own process."""

    def __init__(self, settings: AdaptiveConfig, decider: EmbeddedDecider) -> None:
        self._kind, self._decider = reported_kind(settings), decider
        self._made: deque[Decision] = deque()

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        made = self._decider.report(step, values) if kind == self._kind else None
        if made is not None:
            self._made.append(made)

    def next(self, step: int) -> Decision | None:
        return self._made.popleft() if self._made else None

    def sync(self) -> None:
        self._decider.sync()

    def close(self) -> None:
        self._decider.close()
