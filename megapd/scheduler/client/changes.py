"""A run's line to the scheduler, on rank 0: it registers, reports, and hears of schedule versions and decisions.

A thread of its own talks to the service. While that is away the run goes on with what it knows; what it measured meanwhile is
told when the service is back. Only a report that an adaptive schedule may decide on is waited for, and only while the service
answers.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from megapd.config import ScheduleConfig
from megapd.errors import UserError
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import Change, Decision, LivePlan, Plan, Version, resolved
from megapd.scheduler.client import answers
from megapd.scheduler.client.answers import DecisionAnswer, VersionAnswer
from megapd.scheduler.client.http import Api, Away, Refusal

log = logging.getLogger(__name__)


POLL_SECONDS = 1.0  # between looks for changes; what the run has to say goes at once


START_SECONDS = 5.0  # a run that starts waits so long for a service that does not answer


DECIDE_SECONDS = 5.0  # longest wait for what a report leads to


CLOSE_SECONDS = 5.0  # a run that ends tells the rest for so long


COMPLAINTS = 100  # that are remembered, so as not to be logged again


REPORTS = 10_000  # that are kept while the service is away; the oldest go first, metrics.jsonl has them


# What a report holds of a line of metrics; held-out accuracy and loss under names of their own.
TOLD = ("loss", "divergence", "cross_entropy", "grad_norm", "lr", "tok_per_sec", "teacher_step")


NAMES = {"train": {**{name: name for name in TOLD}, "accuracy": "train_accuracy"}}


NAMES["eval"] = {"accuracy": "accuracy", "loss": "heldout_loss"}


_SCHEDULE: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)


@dataclass(frozen=True)
class Registration:
    """What the service is told of a run. schedule: None where nothing teaches. group: whose replicas do."""

    name: str
    steps: int
    trajectory: str | None
    group: str | None
    facts: Mapping[str, Any]
    schedule: ScheduleConfig | None


@dataclass(frozen=True)
class _Report:
    """asked: set when the service has answered, or will not; None: the run does not wait for what it leads to."""

    step: int
    metrics: dict[str, float]
    asked: threading.Event | None = None


class ServiceSource:
    """The service's changes of a run's schedule; see live.ChangeSource, whose contract it keeps.

    Nothing here stops a run but what is wrong from its start: a token that is refused, another run of that name, a schedule that
    the registered trajectory cannot follow. Later troubles are logged, once each.
    """

    def __init__(
        self,
        api: Api,
        run: Registration,
        changes: ChangeLog,
        resolve: Callable[[ScheduleConfig], Plan],
        weights: Callable[[int], str | None],
        *,
        ahead: int,
    ) -> None:
        """resolve: a schedule over the run's own trajectory. weights: of a teacher step, the digest of its weights there, None:
        not known yet. ahead: steps before its own that a step's signals are asked for."""
        self._api, self._run, self._log, self._resolve, self._ahead = api, run, changes, resolve, ahead
        self._weights = weights
        self._path = f"/v1/runs/{quote(run.name, safe='')}"
        self._registered = False
        self._up = False  # whether it is worth while to wait for an answer
        self._plan: LivePlan | None = None
        self._lines: dict[str, float] = {}  # of the step that was reported last, until it is told
        self._step = self._reported = 0
        self._outbox: deque[_Report] = deque(maxlen=REPORTS)
        self._owed: dict[str, int] = {}  # changes that the service is to hear the beginning of: the end of a path, student step
        self._versions: deque[VersionAnswer] = deque()  # heard of, not taken in yet
        self._decisions: deque[DecisionAnswer] = deque()
        self._version = self._decided = 0  # heard of up to here
        self._latest = -1  # student step at which the last decision begins
        grows = None if run.schedule is None else run.schedule.grows
        self._metrics = {1: grows.metric} if grows else {}  # that a version decides on
        self.registered: dict[int, str] = {}  # teacher step -> digest of its weights, as registered when the run began
        self._silent = False  # the service was said to be away
        self._complaints: set[str] = set()
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._talk, name="scheduler", daemon=True)

    def start(self, plan: LivePlan | None, step: int, metrics: Path) -> list[Change]:
        """Register, if the service answers; the changes that it has and the run's folder has not, recorded.

        plan: with the changes on record taken in; step: student steps done before, from which on new ones can begin. metrics:
        metrics.jsonl, whose lines are told as far as the service has not heard of them. Raises UserError; see the class.
        """
        self._plan, self._step = plan, step
        if plan is not None:
            self._version, self._decided, self._latest = plan.version, plan.decided, plan.latest
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                self._register()
                self._look()
                self._hold_to_the_registry()
                self._tell_again(metrics, step)
                break
            except Away as error:
                if time.monotonic() > end:
                    self._heard_nothing(error)
                    self._tell_again(metrics, step, heard=False)
                    break
                time.sleep(0.2)
        found = self._take_all(step)
        self._thread.start()
        return found

    # ------------------------------------------------------------------------------------------------------- the run's side

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._lines |= _figures(kind, values)
        self._reported = step

    def next(self, step: int) -> Change | None:
        self._step = step
        waited = self._flush()
        if waited is not None and self._up:
            waited.wait(DECIDE_SECONDS)
        with self._lock:
            return self._take(step + self._ahead + 1) if self._plan is not None else None

    def sync(self) -> None:
        """Nothing: metrics.jsonl holds what a resumed run tells again."""

    def close(self) -> None:
        self._step = max(self._step, self._reported)
        self._flush()
        self._closed.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS + 1.0)
            if self._outbox or self._owed:
                log.warning("scheduler: %d messages of this run were not told", len(self._outbox) + len(self._owed))
        if not self._thread.is_alive():  # else it is in a call that it needs the connection for; it ends with the process
            self._api.close()

    def _flush(self) -> threading.Event | None:
        """Give what was measured to the thread; what to wait for, if it may lead to a decision."""
        if not self._lines:
            return None
        lines, self._lines = self._lines, {}
        asked = threading.Event() if self._may_decide(lines) else None
        self._outbox.append(_Report(self._reported, lines, asked))
        self._wake.set()
        return asked

    def _may_decide(self, lines: Mapping[str, float]) -> bool:
        if self._plan is None or self._reported >= self._plan.steps:
            return False
        version = self._plan.version_at(self._reported)
        # What a version that was taken up before the run was resumed decides on is not on record: any line may be it.
        return version.policy == "adaptive" and self._metrics.get(version.version, next(iter(lines))) in lines

    def _take(self, soonest: int) -> Change | None:
        """The next change that was heard of; it begins at student step `soonest` or later. On record before the service hears so:
        what it was told that a run has taken up, the run must know."""
        assert self._plan is not None
        if self._decisions:
            made = self._decisions.popleft()
            begin = self._latest = self._begin(f"decision {made.sequence}", made, max(soonest, self._latest + 1))
            given = {field.name: getattr(made, field.name) for field in fields(Decision)}
            decision = self._record(Decision(**{**given, "effective": begin}))
            if begin != (made.effective if made.applied is None else made.applied):
                self._owe(f"decisions/{made.sequence}", begin)
            return decision
        while self._versions:
            told = self._versions.popleft()
            begin = self._begin(f"version {told.version}", told, soonest)
            version = self._resolved(told, begin)
            if version is not None:
                self._record(version)
            else:
                begin = max(told.applied or 0, self._plan.steps)  # never: the service's record, too, goes on without it
            if begin != told.applied:
                self._owe(f"schedules/{told.version}", begin)
            if version is not None:
                return version
        return None

    def _begin(self, what: str, told: VersionAnswer | DecisionAnswer, soonest: int) -> int:
        if told.applied is not None and told.applied < soonest:
            self._complain(f"{what} of the schedule is on record as taken up at student step {told.applied}, which has passed")
        return max(told.effective if told.applied is None else told.applied, soonest)

    def _owe(self, change: str, step: int) -> None:
        self._owed[f"{change}/applied"] = step
        self._wake.set()

    def _record(self, change: Change) -> Change:
        self._log.append(change)
        return change

    def _take_all(self, step: int) -> list[Change]:
        found: list[Change] = []
        while self._plan is not None:
            change = self._take(step)
            if change is None:
                break
            found.append(change)
            self._plan.take(change)
        return found

    def _resolved(self, told: VersionAnswer, begin: int) -> Version | None:
        """None, and an error is logged, where the run cannot follow it."""
        assert self._plan is not None
        if begin >= self._plan.steps:
            log.warning("version %d of the schedule begins at student step %d, after the run's end", told.version, begin)
            return None
        try:
            schedule = _SCHEDULE.validate_python(told.document)
            began = self._run.schedule
            if schedule.waits is not None and (began is None or began.waits is None):
                why = "needs a run that began with it, whose teacher may still be training"
                raise UserError(f"schedule.policy: {schedule.policy} {why}")
            version = resolved(told.version, begin, schedule, self._resolve(schedule))
        except (ValueError, OSError) as error:  # a policy of a newer megapd, what the trajectory lacks, a file system's trouble
            log.error("version %d of the schedule cannot be taken up: %s", told.version, error)
            return None
        if schedule.grows:
            self._metrics[told.version] = schedule.grows.metric
        return version

    # ---------------------------------------------------------------------------------------------------- the thread's side

    def _talk(self) -> None:
        end = float("inf")
        while True:
            closing = self._closed.is_set()
            if closing:
                end = min(end, time.monotonic() + CLOSE_SECONDS)
            try:
                if not self._registered:
                    self._register()
                self._tell(end)
                if not closing:
                    self._look()
                elif self._plan is not None and self._step >= self._plan.steps:
                    self._leave_aside()
                    self._tell(end)
            except Away as error:
                self._heard_nothing(error)
            except Refusal as error:
                if error.status == 404:  # a service that began anew
                    self._begin_anew()
                self._complain(str(error))
                self._wait_for_nothing()
            if closing and (time.monotonic() > end or not (self._outbox or self._owed)):
                return
            self._wake.wait(POLL_SECONDS if not closing else 0.2)
            self._wake.clear()

    def _register(self) -> None:
        run = self._run
        body = {"trajectory": run.trajectory, "group": run.group, "steps": run.steps, "facts": dict(run.facts)}
        found = answers.ask(self._api, answers.RUN, "PUT", self._path, body)
        if run.schedule is not None:
            self._agree_on_first(found.schedule_version)
            self._agree_on_changes()
        self._registered = True
        self._heard()

    def _begin_anew(self) -> None:
        """The service does not know the run: register again, and hear all that is not on record."""
        with self._lock:
            self._registered = False
            self._owed.clear()
            self._versions.clear()
            self._decisions.clear()
            self._version = max((change.version for change in self._log.changes if isinstance(change, Version)), default=1)
            self._decided = sum(isinstance(change, Decision) for change in self._log.changes)

    def _agree_on_changes(self) -> None:
        """The service hears again where the changes on record begin, which a crash may have kept from it. Refusal if it has lost
        them, or has others: what it would decide from there on would rest on another run's history."""
        if not self._log.changes:
            return
        sets = {
            told.version: told for told in answers.pages(self._api, answers.VERSIONS, f"{self._path}/schedules", "version", 1)
        }
        mades = {
            made.sequence: made for made in answers.pages(self._api, answers.DECISIONS, f"{self._path}/decisions", "sequence", -1)
        }
        with self._lock:
            for change in self._log.changes:
                if isinstance(change, Version):
                    what, path, begin = f"version {change.version}", f"schedules/{change.version}", change.start
                    told: VersionAnswer | DecisionAnswer | None = sets.get(change.version)
                    same = isinstance(told, VersionAnswer) and told.document.get("policy") == change.policy
                else:
                    what, path, begin = f"decision {change.sequence}", f"decisions/{change.sequence}", change.effective
                    told = mades.get(change.sequence)
                    same = isinstance(told, DecisionAnswer) and (told.step, told.checkpoint) == (change.step, change.checkpoint)
                if told is None or not same or told.effective > begin or told.applied not in (None, begin):
                    raise Refusal(
                        f"schedule: in the run's folder, {what} of {self._run.name} is on record from student step {begin} on, "
                        f"but the scheduler has {'none' if told is None else 'another'}; restore scheduler.database, or choose "
                        f"another name",
                        409,
                        None,
                    )
                if told.applied is None and (begin != told.effective or isinstance(change, Version)):
                    self._owe(path, begin)

    def _hold_to_the_registry(self) -> None:
        """UserError where the run's own folder has other weights than those that are registered."""
        if self._plan is None or self._run.trajectory is None:
            return
        path = f"/v1/trajectories/{quote(self._run.trajectory, safe='')}/checkpoints"
        self.registered = {
            record.step: record.weights for record in answers.pages(self._api, answers.CHECKPOINTS, path, "step", -1)
        }
        for step in self._plan.teachers:
            found = self._weights(step) if step in self.registered else None
            if found is not None and found != self.registered[step]:
                raise UserError(
                    f"teacher.trajectory: the checkpoint of step {step} has digest {found}, but {self.registered[step]} is "
                    f"registered as scheduler.trajectory {self._run.trajectory}; name the trajectory that is registered, or "
                    f"import this one"
                )

    def _agree_on_first(self, newest: int) -> None:
        """The first version is the run's own configuration. UserError if the service has another for a run of that name."""
        assert self._run.schedule is not None
        document = self._run.schedule.model_dump(mode="json")
        if newest == 0:
            body = {"expected": 0, "effective": 0, "document": document, "note": "the run's configuration"}
            answers.ask(self._api, answers.ANYTHING, "PUT", f"{self._path}/schedule", body)
            return
        first = answers.ask(self._api, answers.VERSION, "GET", f"{self._path}/schedule?version=1").document
        try:
            same = _SCHEDULE.validate_python(first) == self._run.schedule
        except ValidationError:  # of a newer megapd
            same = False
        if not same:
            raise Refusal(
                f"schedule: the scheduler knows {self._run.name} with another first schedule, {json.dumps(first)}; "
                f"choose another name, or restore it and change it with `megapd schedule set`",
                409,
                first,
            )

    def _look(self) -> None:
        """Hear of changes."""
        if self._run.schedule is None:
            return
        found = answers.ask(self._api, answers.RUN, "GET", self._path)
        self._heard()
        if found.schedule_version > max(self._version, 1):
            self._hear_versions(
                answers.pages(self._api, answers.VERSIONS, f"{self._path}/schedules", "version", max(self._version, 1))
            )
        if found.decisions > self._decided:
            self._hear_decisions(
                answers.pages(self._api, answers.DECISIONS, f"{self._path}/decisions", "sequence", self._decided - 1)
            )

    def _leave_aside(self) -> None:
        """The run has ended: what was not taken in by then never teaches."""
        self._look()
        assert self._plan is not None
        with self._lock:
            left: dict[str, VersionAnswer | DecisionAnswer] = {}
            left |= {f"schedules/{version.version}": version for version in self._versions}
            left |= {f"decisions/{made.sequence}": made for made in self._decisions}
            for what, told in left.items():
                if told.applied is None and told.effective < self._plan.steps:
                    self._owe(what, self._plan.steps)
            self._versions.clear()
            self._decisions.clear()

    def _tell(self, end: float) -> None:
        """Until there is no more to tell, or `end`, of time.monotonic. Where changes begin comes first: what a report leads to
        depends on it."""
        while self._owed and time.monotonic() < end:
            with self._lock:
                path, step = next(iter(self._owed.items()))
            try:
                answers.ask(self._api, answers.ANYTHING, "POST", f"{self._path}/{path}", {"step": step})
            except Refusal as error:
                self._unless_for_later(error)
                self._complain(f"{path} of this run: {error}")
            self._owed.pop(path)
            self._heard()
        while self._outbox and time.monotonic() < end:
            report = self._outbox[0]
            body: dict[str, Any] = {"step": report.step, "metrics": report.metrics}
            if self._step > report.step:
                body["now"] = self._step
            try:
                decision = answers.ask(self._api, answers.REPORTED, "POST", f"{self._path}/reports", body).decision
                if decision is not None:
                    self._hear_decisions([decision])
            except Refusal as error:
                self._unless_for_later(error)
                self._complain(f"reports of this run: {error}")
            if self._outbox and self._outbox[0] is report:
                self._outbox.popleft()
            if report.asked is not None:
                report.asked.set()
            self._heard()

    @staticmethod
    def _unless_for_later(error: Refusal) -> None:
        """Raises it where another token, or another registration, may make it good."""
        if error.status in (401, 403, 404):
            raise error

    def _tell_again(self, metrics: Path, step: int, *, heard: bool = True) -> None:
        """What the service has not heard of a run that goes on; heard: it can be asked what it has."""
        lines: dict[int, dict[str, float]] = {}
        for line in answers.recorded(metrics):
            if line["step"] <= step and line["kind"] in NAMES:
                lines.setdefault(line["step"], {}).update(_figures(line["kind"], line))
        steps = sorted(lines)
        # Its own step of the run says nothing: that of a late report is the step at which it was sent, others may still lack.
        low, high = 0, len(steps) if heard else 0
        middle = high - 1
        while low < high:
            if answers.ask(self._api, answers.LIST, "GET", f"{self._path}/reports?after={steps[middle] - 1}&limit=1"):
                low = middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        self._outbox.extend(_Report(at, lines[at]) for at in steps[low:])

    def _hear_versions(self, versions: Sequence[VersionAnswer]) -> None:
        with self._lock:
            for version in versions:
                if version.version > self._version:
                    self._versions.append(version)
                    self._version = version.version

    def _hear_decisions(self, decisions: Sequence[DecisionAnswer]) -> None:
        with self._lock:
            for decision in decisions:
                if decision.sequence == self._decided:
                    self._decisions.append(decision)
                    self._decided += 1

    def _heard(self) -> None:
        if self._silent:
            log.warning("scheduler.url: %s answers again", self._api.url)
        self._up, self._silent = True, False

    def _heard_nothing(self, error: Away) -> None:
        self._wait_for_nothing()
        if not self._silent:
            log.warning("%s; the run goes on with the schedule that it knows", error)
        self._silent = True

    def _wait_for_nothing(self) -> None:
        self._up = False
        for report in list(self._outbox):
            if report.asked is not None:
                report.asked.set()

    def _complain(self, text: str) -> None:
        if text in self._complaints:
            return
        log.error("%s", text)
        if len(self._complaints) == COMPLAINTS:
            self._complaints.clear()
        self._complaints.add(text)


def _figures(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    names = NAMES.get(kind, {})
    given = ((names[key], value) for key, value in values.items() if key in names)
    return {name: float(value) for name, value in given if isinstance(value, int | float) and math.isfinite(value)}
