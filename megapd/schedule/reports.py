"""What a run's own decisions rest on: reports.jsonl in its folder, a line a report, locked while the run lives."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.files import append_whole, check_run, fsync_path, writing
from megapd.schedule.plan import Decision, Report

log = logging.getLogger(__name__)

FORMAT = "megapd-reports/1"
REPORTS_FILE = "reports.jsonl"  # in the run's folder
FORMER_FORMAT = "megapd-decisions/1"
FORMER_FILE = "decisions.jsonl"  # where runs kept reports and decisions together


class ReportLog:
    """An append-only JSONL file: the first line says what the decisions are about, the others are {"kind": "report", ...}.

    A report carries a check of itself, which those of an older megapd lack.
    A report reaches the disk with `sync`. Lines at the end that are damaged, as a crash leaves them, were never acknowledged and
    are dropped.
    """

    def __init__(self, path: Path, run: str, subject: Mapping[str, Any], rests: tuple[int, str] = (0, "")) -> None:
        """run: the id of the run. subject: what the decisions depend on (candidates, settings), JSON. rests: how many reports a
        checkpoint of the run rests on, and their digest.

        Raises UserError, and changes nothing, if the file is damaged, lacks any of those, or is another run's or about another
        subject, or if another process writes it.
        """
        self._path, self._run, self._subject = path, run, subject
        self.reports: tuple[Report, ...] = ()
        self._rests, former = rests, path.with_name(FORMER_FILE).exists()  # `take_former` checks what it takes
        if not path.exists() and not former:
            self._check()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_locked(path)
        try:
            self.reports, _, whole = _read(path, FORMAT, run, subject)
            if not former:
                self._check()
            self._cut(whole)
            self.sync()
            fsync_path(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, report: Report) -> bool:
        """False, and nothing changes, if the record holds one of that step or a later one."""
        if self.reports and report.step <= self.reports[-1].step:
            return False
        self._write({"kind": "report", **asdict(report), "check": _check(report)})
        self.reports += (report,)
        return True

    def sync(self) -> None:
        """Returns once every report is durable."""
        os.fsync(self._file)

    def digest(self, count: int) -> str:
        """Of the first `count` reports, which are on record: sha256, hexadecimal."""
        return hashlib.sha256(json.dumps([asdict(report) for report in self.reports[:count]]).encode()).hexdigest()

    def _check(self) -> None:
        count, digest = self._rests
        if count and (len(self.reports) < count or self.digest(count) != digest):
            what = f"{self._path}: its first {count} reports, on which this run's checkpoint rests, are gone or others"
            raise UserError(f"{what}; restore it from a copy, or start a run of another name")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # and with it the lock
            self._file = -1

    def take_former(self, keep: Callable[[Sequence[Decision]], None]) -> None:
        """Replace what is here by the reports of the run's decisions.jsonl, if it has one; `keep` puts its decisions on the disk.

        Then the file goes. A crash before that leaves it, to be taken again.
        """
        former = self._path.with_name(FORMER_FILE)
        if not former.exists():
            return
        lock = _open_locked(former)
        try:
            reports, decisions, _ = _read(former, FORMER_FORMAT, self._run, self._subject)
            self.reports = ()
            self._cut(0)
            for report in reports:
                self.append(report)
            self._check()
            self.sync()
            keep(decisions)
            former.unlink()
            fsync_path(former.parent)
        finally:
            os.close(lock)

    def _cut(self, size: int) -> None:
        os.ftruncate(self._file, size)
        if size == 0:
            self._write({"kind": "subject", "format": FORMAT, "run": self._run, **self._subject})

    def _write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        append_whole(self._path, self._file, line)


def subject(settings: AdaptiveConfig, candidates: Sequence[int]) -> dict[str, Any]:
    """What ReportLog holds a resumed run to."""
    return {"candidates": list(candidates), "settings": settings.model_dump(mode="json")}


def has_reports(folder: Path) -> bool:
    """Whether a run's folder has reports on record: its own process decides then, and nobody else."""
    files = (folder / REPORTS_FILE, folder / FORMER_FILE)
    return any(path.read_bytes().count(b"\n") > 1 for path in files if path.exists())


def _open_locked(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise UserError(f"{path}: another process is training this run; stop it, or choose another name") from error
    return file


# ---------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path, form: str, run: str, subject: Mapping[str, Any]) -> tuple[tuple[Report, ...], tuple[Decision, ...], int]:
    """Reports, decisions, and the bytes of whole lines. UserError if a damaged line is followed by others, or the file is about
    another subject."""
    content = path.read_bytes()
    reports: list[Report] = []
    decisions: list[Decision] = []
    whole = 0
    *lines, _ = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            kind = record.pop("kind")
            if (number == 1) != (kind == "subject"):
                raise ValueError(f"a {kind} in its place")
            if kind == "subject":
                check_run(path, record.pop("run", None), run)
                _check_subject(path, form, record, json.loads(json.dumps(subject)))
            elif kind == "report":
                check = record.pop("check", None)
                reports.append(Report(**record))
                if check not in (None, _check(reports[-1])):
                    raise ValueError("its check is that of another content")
            elif kind == "decision" and form == FORMER_FORMAT:
                decisions.append(Decision(**record))
            else:
                raise ValueError(f"kind {kind!r}")
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if any(map(_is_json, lines[number:])):
                raise UserError(
                    f"{path}: line {number} is damaged ({error}) and others follow; restore it from a copy, or start "
                    f"a run of another name"
                ) from error
            break
        whole += len(line) + 1
    if whole < len(content):
        log.warning("%s: dropping %d bytes at its end that were not written whole", path, len(content) - whole)
    return tuple(reports), tuple(decisions), whole


def _check_subject(path: Path, form: str, record: dict[str, Any], now: Mapping[str, Any]) -> None:
    given = record.pop("format")
    if given != form:
        raise UserError(f"{path}: its format is {given!r}, this megapd reads {form!r}; rename the run")
    for key in sorted(record.keys() | now.keys()):
        if record.get(key) != now.get(key):
            raise UserError(
                f"schedule: {key} was {record.get(key)} when this run's decisions began ({path}) and is "
                f"{now.get(key)} now; restore the trajectory or the setting, or start a run of another name"
            )


def _check(report: Report) -> str:
    return hashlib.sha256(json.dumps(asdict(report)).encode()).hexdigest()[:16]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
