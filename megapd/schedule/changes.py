"""The journal of a run's changes, changes.json in its folder, and where changes come from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.files import check_run, sealed, unsealed, write_atomic
from megapd.schedule.adaptive import decide, reported_kind
from megapd.schedule.plan import Change, Decision, Report, Version
from megapd.schedule.reports import REPORTS_FILE, ReportLog, subject

FORMAT = "megapd-changes/2"
FORMER_FORMAT = "megapd-changes/1"  # whose versions do not say whether they grow
FILE = "changes.json"  # in the run's folder


class ChangeLog:
    """The changes of a run in its folder: rewritten whole with each, which comes before any rank uses it."""

    def __init__(self, path: Path, run: str) -> None:
        """Reads what is there. run: the id of the run. UserError if the file is damaged, or another run's."""
        self._path, self._run = path, run
        self.changes: tuple[Change, ...] = ()
        if path.exists():
            try:
                tree = unsealed(path.read_text())
                if tree["format"] not in (FORMAT, FORMER_FORMAT):
                    raise ValueError(f"its format is {tree['format']!r}, this megapd reads {FORMAT!r}")
                self.changes = _in_order(map(_parse, tree["changes"]))
                named = tree.get("run")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: damaged ({error}); restore it from a copy, or start a run of another name") from error
            check_run(path, named, run)

    def digest(self, count: int) -> str:
        """Of the first `count` changes, which are on record: sha256, hexadecimal."""
        assert count <= len(self.changes)
        return hashlib.sha256(json.dumps([_entry(change) for change in self.changes[:count]]).encode()).hexdigest()

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(change for change in self.changes if isinstance(change, Decision))

    def append(self, *changes: Change) -> None:
        """Returns when they are on the disk, all or none. ValueError if a decision is not the next."""
        after = _in_order([*self.changes, *changes])
        tree = {"format": FORMAT, "run": self._run, "changes": [_entry(change) for change in after]}
        write_atomic(self._path, sealed(tree))
        self.changes = after


def _entry(change: Change) -> dict[str, Any]:
    return {"kind": type(change).__name__.lower(), **asdict(change)}


def _in_order(changes: Iterable[Change]) -> tuple[Change, ...]:
    """ValueError if a decision is not the next."""
    before: list[Decision] = []
    found = tuple(changes)
    for change in found:
        if not isinstance(change, Decision):
            continue
        if change.sequence != len(before):
            raise ValueError(f"{change} does not follow the {len(before)} on record")
        if before and change.effective <= before[-1].effective:
            start = before[-1].effective
            raise ValueError(f"{change} takes effect at student step {change.effective}, not after the one before it, at {start}")
        before.append(change)
    return found


def _parse(entry: Mapping[str, Any]) -> Change:
    given = {key: value for key, value in entry.items() if key != "kind"}
    if entry["kind"] == "version":
        given.setdefault("grows", given["policy"] == "adaptive")  # of FORMER_FORMAT
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
    sync    before a checkpoint of the run is written: what was reported lasts as the checkpoint does; how many reports of its own
            the source rests on, and their digest
    """

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...
    def next(self, step: int) -> Change | None: ...
    def sync(self) -> tuple[int, str]: ...
    def close(self) -> None: ...


class EmbeddedSource:
    """Decisions of an adaptive schedule, made in the run's own process.

    Decisions on record hold as they were made, also those made after the checkpoint that a resumed run goes on from, and a report
    for a step that is on record changes nothing: a killed run decides as an undisturbed one.
    """

    def __init__(self, settings: AdaptiveConfig, candidates: Sequence[int], reports: ReportLog, changes: ChangeLog) -> None:
        """candidates: increasing teacher steps. reports: closed with this."""
        self._settings, self._candidates, self._reports, self._changes = settings, tuple(candidates), reports, changes
        self._made: deque[Decision] = deque()

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line without settings.metric, or with one not finite, reports nothing."""
        value = values.get(self._settings.metric)
        if kind != reported_kind(self._settings) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return
        decisions = self._changes.decisions
        new = self._reports.append(Report(step, float(value)))
        if not new and (step != self._reports.reports[-1].step or (decisions and decisions[-1].step >= step)):
            return
        # Not new: a crash may have come between the last report and its decision, which is made now as it was to be then.
        made = decide(self._settings, self._candidates, self._reports.reports, decisions, step)
        if made is not None:
            self._reports.sync()  # a decision is on the disk after the reports that it rests on
            self._changes.append(made)
            self._made.append(made)

    def next(self, step: int) -> Decision | None:
        return self._made.popleft() if self._made else None

    def sync(self) -> tuple[int, str]:
        self._reports.sync()
        return len(self._reports.reports), self._reports.digest(len(self._reports.reports))

    def close(self) -> None:
        self._reports.close()


def open_embedded(
    folder: Path, run: str, settings: AdaptiveConfig, candidates: Sequence[int], changes: ChangeLog, rests: tuple[int, str]
) -> EmbeddedSource:
    """run: the id of the run. rests: how many reports the run's checkpoint rests on, and their digest.

    The decisions of the run in `folder`, which is locked until the source is closed. What a run begun before kept in
    decisions.jsonl is put on record. Raises UserError; see ReportLog."""
    reports = ReportLog(folder / REPORTS_FILE, run, subject(settings, candidates), rests)

    def keep(decisions: Sequence[Decision]) -> None:
        if not changes.changes:  # else a crash came after this and before the former file went
            changes.append(*decisions)

    try:
        reports.take_former(keep)
    except BaseException:
        reports.close()
        raise
    return EmbeddedSource(settings, candidates, reports, changes)
