"""Schedules that grow by decisions: when the student saturates, the next checkpoint follows.

    rank 0     EmbeddedDecider.report(step, metrics) -> the decision is on the disk, with its evidence, before it is returned
    all ranks  World.gather of it -> AdaptivePlan.take
    each       AdaptivePlan.checkpoint_at(s): a function of the recorded decisions alone

A decision takes effect at a named student step that lies so far ahead that no rank has asked for that step's signals yet.
A resumed run reads the record: decisions made before it was stopped, also those made after the checkpoint it resumes from, hold
as they were made, and a report for a step that is on record changes nothing.

`decide` is the rule of the paper's authors for parity (arXiv 2410.05464), stated for any metric: advance when the metric gained
less than 0.01 over the mean of the last 5 reports, and more than 0.01 since the last advance (else the student is still on its
first plateau, from which the present checkpoint may yet take it), or after max_dwell steps.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megapd.config import Adaptive
from megapd.errors import UserError
from megapd.files import fsync_folder
from megapd.schedule.policies import Plan

log = logging.getLogger(__name__)

FORMAT = "megapd-decisions/1"
FILE = "decisions.jsonl"  # in the run's folder


@dataclass(frozen=True)
class Report:
    """The student's metric after `step` student steps: held-out accuracy, or the divergence of the last training step."""

    step: int
    value: float


@dataclass(frozen=True)
class Decision:
    """Another checkpoint teaches from a named student step on.

    sequence    0 for a run's first decision, then one more each
    step        student steps done at the report that it rests on
    effective   the first student step that the checkpoint teaches
    checkpoint  teacher step
    reason      saturated, max_dwell, or what a person gave
    evidence    the numbers it rests on
    """

    sequence: int
    step: int
    effective: int
    checkpoint: int
    reason: str
    evidence: Mapping[str, Any]


def decide(
    settings: Adaptive, candidates: Sequence[int], reports: Sequence[Report], decisions: Sequence[Decision], now: int
) -> Decision | None:
    """The decision that the newest report calls for, None if none. Pure.

    candidates   increasing teacher steps; the run begins with the first
    reports      in order of their steps, all of the run
    decisions    all of the run so far
    now          student steps that the run has done: those of the newest report, or more where it came late

    The present checkpoint's dwell begins at its effective step; while that lies ahead nothing is decided. Of the reports after
    it, the k-th is saturated if it gained less than settings.gain over the mean of the settings.window ones before it. A gain is
    a rise of the accuracy, a fall of the divergence. The progress asked for is measured from the last report before the dwell,
    of a divergence from the first one in it: the one before was measured against another teacher.
    """
    start = decisions[-1].effective if decisions else 0
    current = decisions[-1].checkpoint if decisions else candidates[0]
    place = bisect_right(candidates, current)
    dwell = [report for report in reports if report.step > start]
    if place == len(candidates) or not dwell:
        return None
    latest = dwell[-1]
    taught = latest.step - start
    if taught < settings.min_dwell:
        return None
    sign = 1.0 if settings.metric == "accuracy" else -1.0
    evidence: dict[str, Any] = {"metric": settings.metric, "value": latest.value, "from": current, "dwell": taught}

    def decision(reason: str) -> Decision:
        return Decision(len(decisions), latest.step, now + settings.lead, candidates[place], reason, evidence)

    if len(dwell) >= settings.window + settings.patience:
        gains = []
        for k in range(len(dwell) - settings.patience, len(dwell)):
            before = dwell[k - settings.window : k]
            gains.append(sign * (dwell[k].value - math.fsum(report.value for report in before) / settings.window))
        reference = dwell[0]
        if settings.metric == "accuracy":
            reference = next((report for report in reversed(reports) if report.step <= start), reference)
        progress = sign * (latest.value - reference.value)
        evidence |= {"gains": gains, "progress": progress}
        if max(gains) < settings.gain and (settings.progress == 0 or progress > settings.progress):
            return decision("saturated")
    if settings.max_dwell is not None and taught >= settings.max_dwell:
        return decision("max_dwell")
    return None


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


# ----------------------------------------------------------------------------------------------------------- the decider


class EmbeddedDecider:
    """Decides in the run's own process, on a store of its own; on rank 0."""

    def __init__(self, settings: Adaptive, candidates: Sequence[int], store: DecisionStore) -> None:
        self._settings, self._candidates, self._store = settings, tuple(candidates), store

    def report(self, step: int, metrics: Mapping[str, Any]) -> Decision | None:
        """After `step` student steps; the decision that the report led to, None if none. Reporting a step again changes nothing.

        metrics: those of a line of metrics.jsonl; a line without settings.metric, or with one not finite, reports nothing.
        """
        value = metrics.get(self._settings.metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        if not self._store.add_report(Report(step, float(value))):
            # On record. A crash may have come between the last report and its decision, which is made now as it was to be then.
            reports, decisions = self._store.reports, self._store.decisions
            if step != reports[-1].step or (decisions and decisions[-1].step >= step):
                return None
        made = decide(self._settings, self._candidates, self._store.reports, self._store.decisions, step)
        return None if made is None else self._store.add_decision(made)

    def sync(self) -> None:
        """What was reported lasts."""
        self._store.sync()

    def close(self) -> None:
        self._store.close()


def reported_kind(settings: Adaptive) -> str:
    """The kind of metrics line that carries settings.metric as `decide` means it."""
    return "eval" if settings.metric == "accuracy" else "train"


def subject(settings: Adaptive, candidates: Sequence[int]) -> dict[str, Any]:
    """What DecisionLog holds a resumed run to."""
    return {"candidates": list(candidates), "settings": settings.model_dump(mode="json")}


def check_lead(settings: Adaptive, ahead: int) -> None:
    """UserError unless a decision takes effect later than the steps that ranks ask for `ahead` of the present one."""
    if settings.lead <= ahead:
        raise UserError(
            f"schedule.lead: {settings.lead} student steps, but signals are asked for {ahead} steps ahead (training.prefetch, "
            f"teacher.depth); raise it above that"
        )


# ------------------------------------------------------------------------------------------------------------- the plan


class GrowingPlan(Plan):
    """A plan that changes while the run goes on: what AdaptivePlan and live.LivePlan have in common.

    `starts`, `teachers`, `rotations` and `next_after` say what is known so far. checkpoint_at of a step that was asked for never
    changes: subclasses refuse what would change it. May be asked from several threads.
    """

    def __init__(self, steps: int) -> None:
        # No field of Plan is set: this class computes each.
        assert steps >= 1
        self._steps = steps
        self._points: tuple[tuple[int, int], ...] = ()  # the rotations that the run reaches; neighbours differ
        self._asked = -1  # the latest step that checkpoint_at was asked for
        self._guard = threading.Lock()

    warnings = ()
    __eq__ = object.__eq__  # two plans may yet grow apart
    __hash__ = object.__hash__

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self._points)

    @property
    def teachers(self) -> tuple[int, ...]:
        return tuple(teacher for _, teacher in self._points)

    def checkpoint_at(self, student_step: int) -> int:
        assert 0 <= student_step < self._steps, f"student step {student_step} of a plan for {self._steps} steps"
        with self._guard:
            self._asked = max(self._asked, student_step)
            points = self._points
        return points[bisect_right(points, student_step, key=lambda point: point[0]) - 1][1]

    def rotations(self) -> list[tuple[int, int]]:
        return list(self._points)

    def next_after(self, student_step: int) -> tuple[int, int] | None:
        points = self._points
        place = bisect_right(points, student_step, key=lambda point: point[0])
        return points[place] if place < len(points) else None


class AdaptivePlan(GrowingPlan):
    """A plan that decisions extend: with k of them, k + 1 rotations."""

    def __init__(self, candidates: Sequence[int], steps: int, decisions: Sequence[Decision] = ()) -> None:
        assert candidates
        super().__init__(steps)
        self._candidates = tuple(candidates)
        self._points = ((0, self._candidates[0]),)
        self._known = 0  # decisions taken in
        self._latest = 0  # student step at which the last of them takes effect
        for decision in decisions:
            self.take(decision)

    policy = "adaptive"

    def __repr__(self) -> str:
        return f"AdaptivePlan(candidates={self._candidates}, steps={self._steps}, rotations={self.rotations()})"

    @property
    def candidates(self) -> tuple[int, ...]:
        return self._candidates

    @property
    def known(self) -> int:
        """Decisions taken in: what a checkpoint of the run names."""
        return self._known

    def fixed(self) -> list[tuple[int, int]]:
        return [self._points[0]]

    def take(self, decision: Decision) -> None:
        """On every rank, at the same step. RuntimeError if its effect would lie behind what was asked for."""
        with self._guard:
            if decision.sequence != self._known:
                raise RuntimeError(f"decision {decision.sequence} came after {self._known} others; the run's ranks do not agree")
            settled = max(self._asked, self._latest)
            if decision.effective <= settled:
                raise RuntimeError(
                    f"decision {decision.sequence} takes effect at student step {decision.effective}, but step {settled} has "
                    f"been asked for; raise schedule.lead"
                )
            self._known, self._latest = self._known + 1, decision.effective
            if decision.effective < self._steps and decision.checkpoint != self._points[-1][1]:
                self._points += ((decision.effective, decision.checkpoint),)


def recorded_decisions(store: DecisionStore, named: int) -> tuple[Decision, ...]:
    """The decisions on record; UserError if they are fewer than the `named` that the run's checkpoint knew."""
    if len(store.decisions) < named:
        raise UserError(
            f"schedule: this run's checkpoint was taught by {named} decisions, but {len(store.decisions)} are on record; restore "
            f"{FILE} in the run's folder, or start a run of another name"
        )
    return tuple(store.decisions)
