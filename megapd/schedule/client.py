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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter

from megapd.config import Follow, Schedule
from megapd.errors import UserError
from megapd.schedule.adaptive import Decision
from megapd.schedule.http import Api, Away, Refusal
from megapd.schedule.live import Change, ChangeLog, LivePlan, Version, resolved
from megapd.schedule.policies import Plan

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between looks for changes; what the run has to say goes at once
START_SECONDS = 5.0  # a run that starts waits so long for a service that does not answer
DECIDE_SECONDS = 5.0  # longest wait for what a report leads to
CLOSE_SECONDS = 5.0  # a run that ends tells the rest for so long
PAGE = 1000
REPORTS = 10_000  # that are kept while the service is away; the oldest go first, metrics.jsonl has them

# What a report holds of a line of metrics; held-out accuracy and loss under names of their own.
TOLD = ("loss", "divergence", "cross_entropy", "grad_norm", "lr", "tok_per_sec", "teacher_step")
NAMES = {"train": {**{name: name for name in TOLD}, "accuracy": "train_accuracy"}}
NAMES["eval"] = {"accuracy": "accuracy", "loss": "heldout_loss"}

_SCHEDULE: TypeAdapter[Schedule] = TypeAdapter(Schedule)


@dataclass(frozen=True)
class Registration:
    """What the service is told of a run. schedule: None where nothing teaches. group: whose replicas do."""

    name: str
    steps: int
    trajectory: str | None
    group: str | None
    facts: Mapping[str, Any]
    schedule: Schedule | None


@dataclass
class _Saying:
    """Something to tell the service. asked: it may lead to a decision that the run waits for."""

    path: str
    body: dict[str, Any]
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
        resolve: Callable[[Schedule], Plan],
        weights: Callable[[int], str | None],
        *,
        ahead: int,
    ) -> None:
        """resolve: a schedule over the run's own trajectory. weights: of a teacher step, the digest of its weights there, None:
        not written yet. ahead: steps before its own that a step's signals are asked for."""
        self._api, self._run, self._log, self._resolve, self._ahead = api, run, changes, resolve, ahead
        self._weights = weights
        self._path = f"/v1/runs/{quote(run.name, safe='')}"
        self._registered = self._up = False
        self._plan: LivePlan | None = None
        self._lines: dict[str, float] = {}  # of the step that was reported last, until it is told
        self._step = self._reported = 0
        self._outbox: deque[_Saying] = deque(maxlen=REPORTS)
        self._versions: deque[dict[str, Any]] = deque()  # heard of, not taken in yet
        self._decisions: deque[dict[str, Any]] = deque()
        self._version = self._decided = 0  # heard of up to here
        self._latest = -1  # student step at which the last decision begins
        self._told_up_to = -1  # the last step that the service knew of when the run registered
        self._said = ""
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
                break
            except Away as error:
                if time.monotonic() > end:
                    self._heard_nothing(error)
                    break
                time.sleep(0.2)
        self._tell_again(metrics, step)
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
        self._api.close()

    def _flush(self) -> threading.Event | None:
        """Give what was measured to the thread; what to wait for, if it may lead to a decision."""
        if not self._lines:
            return None
        lines, self._lines = self._lines, {}
        adaptive = self._plan is not None and self._reported < self._plan.steps
        adaptive = adaptive and self._plan.version_at(self._reported).policy == "adaptive"  # type: ignore[union-attr]
        asked = threading.Event() if adaptive else None
        self._outbox.append(_Saying("reports", {"step": self._reported, "metrics": lines}, asked))
        self._wake.set()
        return asked

    def _take(self, soonest: int) -> Change | None:
        """The next change that was heard of, recorded; it begins at student step `soonest` or later."""
        assert self._plan is not None
        if self._decisions:
            told = self._decisions.popleft()
            begin = self._latest = _begin(told, max(soonest, self._latest + 1))
            if begin != told["effective"] and told["applied"] is None:
                self._say(f"decisions/{told['sequence']}/applied", {"step": begin})
            decision = Decision(**{key: value for key, value in told.items() if key != "applied"})
            return self._record(replace(decision, effective=begin))
        while self._versions:
            told = self._versions.popleft()
            begin = _begin(told, soonest)
            if begin >= self._plan.steps:
                log.warning("version %d of the schedule begins at student step %d, after the run's end", told["version"], begin)
                continue
            try:
                version = self._resolved(told, begin)
            except UserError as error:
                log.error("version %d of the schedule cannot be taken up: %s", told["version"], error)
                continue
            if told["applied"] is None:
                self._say(f"schedules/{told['version']}/applied", {"step": begin})
            return self._record(version)
        return None

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

    def _resolved(self, told: Mapping[str, Any], begin: int) -> Version:
        schedule = _SCHEDULE.validate_python(told["document"])
        if isinstance(schedule, Follow) and not isinstance(self._run.schedule, Follow):
            raise UserError("schedule.policy: follow needs a run that began with it, whose teacher may still be training")
        return resolved(told["version"], begin, schedule, self._resolve(schedule))

    # ---------------------------------------------------------------------------------------------------- the thread's side

    def _talk(self) -> None:
        end = float("inf")
        while True:
            try:
                if not self._registered:
                    self._register()
                self._tell()
                if not self._closed.is_set():
                    self._look()
            except Away as error:
                self._heard_nothing(error)
            except Refusal as error:
                if error.status == 404:  # a service that began anew
                    self._registered = False
                self._complain(str(error))
            if self._closed.is_set():
                end = min(end, time.monotonic() + CLOSE_SECONDS)
                if not self._outbox:
                    return
                if time.monotonic() > end:
                    log.warning("scheduler: %d messages of this run were not told", len(self._outbox))
                    return
            self._wake.wait(POLL_SECONDS if not self._closed.is_set() else 0.2)
            self._wake.clear()

    def _register(self) -> None:
        run = self._run
        body = {"trajectory": run.trajectory, "group": run.group, "steps": run.steps, "facts": dict(run.facts)}
        found = self._api.ask("PUT", self._path, body)
        if run.schedule is not None:
            self._agree_on_first(found["schedule_version"])
        self._told_up_to = found["step"]
        self._registered = True
        self._heard()

    def _hold_to_the_registry(self) -> None:
        """UserError where the run's own folder has other weights than those that are registered."""
        if self._plan is None or self._run.trajectory is None:
            return
        path = f"/v1/trajectories/{quote(self._run.trajectory, safe='')}/checkpoints"
        registered = {record["step"]: record["weights"] for record in self._pages(path, "step", -1)}
        for step in self._plan.teachers:
            found = self._weights(step) if step in registered else None
            if found is not None and found != registered[step]:
                raise UserError(
                    f"teacher.trajectory: the checkpoint of step {step} has digest {found}, but {registered[step]} is registered "
                    f"as scheduler.trajectory {self._run.trajectory}; name the trajectory that is registered, or import this one"
                )

    def _agree_on_first(self, newest: int) -> None:
        """The first version is the run's own configuration. UserError if the service has another for a run of that name."""
        assert self._run.schedule is not None
        document = self._run.schedule.model_dump(mode="json")
        if newest == 0:
            body = {"expected": 0, "effective": 0, "document": document, "note": "the run's configuration"}
            self._api.ask("PUT", f"{self._path}/schedule", body)
            return
        first = self._api.ask("GET", f"{self._path}/schedule?version=1")
        if _SCHEDULE.validate_python(first["document"]) != self._run.schedule:
            raise Refusal(
                f"schedule: the scheduler knows {self._run.name} with another first schedule, {json.dumps(first['document'])}; "
                f"choose another name, or restore it and change it with `megapd schedule set`",
                409,
                first,
            )

    def _look(self) -> None:
        """Hear of changes."""
        if self._run.schedule is None:
            return
        found = self._api.ask("GET", self._path)
        self._heard()
        if found["schedule_version"] > max(self._version, 1):
            self._hear_versions(self._pages(f"{self._path}/schedules", "version", max(self._version, 1)))
        if found["decisions"] > self._decided:
            self._hear_decisions(self._pages(f"{self._path}/decisions", "sequence", self._decided - 1))

    def _tell(self) -> None:
        while self._outbox:
            saying = self._outbox[0]
            body = dict(saying.body)
            if saying.path == "reports" and self._step > body["step"]:
                body["now"] = self._step
            try:
                answer = self._api.ask("POST", f"{self._path}/{saying.path}", body)
                if saying.path == "reports" and answer["decision"] is not None:
                    self._hear_decisions([answer["decision"]])
            except Refusal as error:
                if error.status == 404:
                    raise
                self._complain(f"{saying.path} of this run: {error}")
            if self._outbox and self._outbox[0] is saying:
                self._outbox.popleft()
            if saying.asked is not None:
                saying.asked.set()
            self._heard()

    def _tell_again(self, metrics: Path, step: int) -> None:
        """What the service has not heard of a run that goes on."""
        if not metrics.exists():
            return
        after = self._told_up_to
        lines: dict[int, dict[str, float]] = {}
        for text in metrics.read_text().splitlines():
            line = json.loads(text)
            if after < line["step"] <= step and line["kind"] in NAMES:
                lines.setdefault(line["step"], {}).update(_figures(line["kind"], line))
        for at, figures in sorted(lines.items()):
            self._say("reports", {"step": at, "metrics": figures})

    def _hear_versions(self, versions: Sequence[dict[str, Any]]) -> None:
        with self._lock:
            for version in versions:
                if version["version"] > self._version:
                    self._versions.append(version)
                    self._version = version["version"]

    def _hear_decisions(self, decisions: Sequence[dict[str, Any]]) -> None:
        with self._lock:
            for decision in decisions:
                if decision["sequence"] == self._decided:
                    self._decisions.append(decision)
                    self._decided += 1

    def _pages(self, path: str, key: str, after: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            page = self._api.ask("GET", f"{path}?after={found[-1][key] if found else after}&limit={PAGE}")
            found += page
            if len(page) < PAGE:
                return found

    def _say(self, path: str, body: dict[str, Any]) -> None:
        self._outbox.append(_Saying(path, body))
        self._wake.set()

    def _heard(self) -> None:
        if not self._up and self._said:
            log.warning("scheduler.url: %s answers again", self._api.url)
        self._up, self._said = True, ""

    def _heard_nothing(self, error: Away) -> None:
        self._up = False
        for saying in list(self._outbox):
            if saying.asked is not None:
                saying.asked.set()
        if not self._said:
            log.warning("%s; the run goes on with the schedule that it knows", error)
        self._said = str(error)

    def _complain(self, text: str) -> None:
        if text != self._said:
            log.error("%s", text)
        self._said = text


def _begin(told: Mapping[str, Any], soonest: int) -> int:
    return told["applied"] if told["applied"] is not None else max(told["effective"], soonest)


def _figures(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    names = NAMES.get(kind, {})
    given = ((names[key], value) for key, value in values.items() if key in names)
    return {name: float(value) for name, value in given if isinstance(value, int | float) and math.isfinite(value)}
