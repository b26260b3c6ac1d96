"""Carried out of megapd/schedule/adaptive.py."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.files import fsync_folder
from megapd.schedule.plan import Decision, Report

log = logging.getLogger(__name__)


FORMAT = "megapd-decisions/1"


FILE = "decisions.jsonl"  # in the run's folder


# ------------------------------------------------------------------------------------------------------------ the store


class DecisionStore(Protocol):
    """Where a run's reports and decisions are kept: DecisionLog, or the service's store.

    reports, decisions   all on record, in order
    add_report           False, and nothing changes, if the record holds one of that step or a later one
    add_decision         returns once it is durable, with every report before it. What is on record under its sequence number is
                         returned instead, if there is one; ValueError if an earlier number is missing
    sync                 returns once every report is durable
    """

    @property
    def reports(self) -> Sequence[Report]: ...

    @property
    def decisions(self) -> Sequence[Decision]: ...

    def add_report(self, report: Report) -> bool: ...

    def add_decision(self, decision: Decision) -> Decision: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class DecisionLog:
    """The embedded store: an append-only JSONL file in the run's folder.

    The first line says what the decisions are about; the others are {"kind": "report", ...} and {"kind": "decision", ...}. A
    report reaches the disk with the next decision or `sync`; a decision before add_decision returns. Lines at the end that are
    damaged, as a crash leaves them, were never acknowledged: they are dropped.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any], *, writes: bool) -> None:
        """subject: what the decisions depend on (candidates, settings), JSON; writes: False reads what is there, and no more.

        Raises UserError if the file is damaged, another process writes it, or it is about another subject.
        """
        self._path = Path(path)
        self._reports: list[Report] = []
        self._decisions: list[Decision] = []
        self._file: int | None = None
        self._size = 0
        if writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            if self._file is not None:
                self._lock(self._file)
            whole = self._read(json.loads(json.dumps(subject)))
            if self._file is not None:
                os.ftruncate(self._file, whole)
                self._size = whole
                if whole == 0:
                    self._append({"kind": "subject", "format": FORMAT, **subject})
                self.sync()
                fsync_folder(self._path.parent)
        except BaseException:
            self.close()
            raise

    @property
    def reports(self) -> Sequence[Report]:
        return tuple(self._reports)

    @property
    def decisions(self) -> Sequence[Decision]:
        return tuple(self._decisions)

    def add_report(self, report: Report) -> bool:
        if self._reports and report.step <= self._reports[-1].step:
            return False
        self._append({"kind": "report", **asdict(report)})
        self._reports.append(report)
        return True

    def add_decision(self, decision: Decision) -> Decision:
        if decision.sequence < len(self._decisions):
            return self._decisions[decision.sequence]
        _check_order(decision, self._decisions)
        self._append({"kind": "decision", **asdict(decision)})
        self.sync()
        self._decisions.append(decision)
        return decision

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)  # and with it the lock
            self._file = None

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, f"{self._path} was opened for reading, or is closed"
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            os.ftruncate(self._file, self._size)  # what came of the line would spoil the next
            raise
        self._size += len(line)

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self._path}: another process is training this run; stop it, or choose another name") from error

    def _read(self, subject: Mapping[str, Any]) -> int:
        """Take the records in; the bytes of the whole lines."""
        content = self._path.read_bytes() if self._path.exists() else b""
        *lines, _ = content.split(b"\n")
        whole = 0
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line), first=number == 1, subject=subject)
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                if any(map(_is_json, lines[number:])):
                    raise UserError(
                        f"{self._path}: line {number} is damaged ({error}) and others follow; restore it from a copy, or start "
                        f"a run of another name"
                    ) from error
                break
            whole += len(line) + 1
        if whole < len(content):
            log.warning("%s: dropping %d bytes at its end that were not written whole", self._path, len(content) - whole)
        return whole

    def _take(self, record: dict[str, Any], *, first: bool, subject: Mapping[str, Any]) -> None:
        kind = record.pop("kind")
        if first != (kind == "subject"):
            raise ValueError(f"a {kind} in its place")
        if kind == "subject":
            before = {key: value for key, value in record.items() if key != "format"}
            if record["format"] != FORMAT:
                raise UserError(f"{self._path}: its format is {record['format']!r}, this megapd reads {FORMAT!r}; rename the run")
            for key in sorted(before.keys() | subject.keys()):
                if before.get(key) != subject.get(key):
                    raise UserError(
                        f"schedule: {key} was {before.get(key)} when this run's decisions began ({self._path}) and is "
                        f"{subject.get(key)} now; restore the trajectory or the setting, or start a run of another name"
                    )
        elif kind == "report":
            self._reports.append(Report(**record))
        elif kind == "decision":
            decision = Decision(**record)
            _check_order(decision, self._decisions)
            self._decisions.append(decision)
        else:
            raise ValueError(f"kind {kind!r}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check_order(decision: Decision, before: Sequence[Decision]) -> None:
    if decision.sequence != len(before):
        raise ValueError(f"decision {decision.sequence} does not follow the {len(before)} on record")
    if before and decision.effective <= before[-1].effective:
        raise ValueError(
            f"decision {decision.sequence} takes effect at student step {decision.effective}, not after the one before it, at "
            f"{before[-1].effective}"
        )


def subject(settings: AdaptiveConfig, candidates: Sequence[int]) -> dict[str, Any]:
    """What DecisionLog holds a resumed run to."""
    return {"candidates": list(candidates), "settings": settings.model_dump(mode="json")}


def recorded_decisions(store: DecisionStore, named: int) -> tuple[Decision, ...]:
    """The decisions on record; UserError if they are fewer than the `named` that the run's checkpoint knew."""
    if len(store.decisions) < named:
        raise UserError(
            f"schedule: this run's checkpoint was taught by {named} decisions, but {len(store.decisions)} are on record; restore "
            f"{FILE} in the run's folder, or start a run of another name"
        )
    return tuple(store.decisions)
