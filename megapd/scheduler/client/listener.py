"""What a run hears from the scheduler, and takes in: versions of its schedule, and decisions."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence

from megapd.errors import UserError
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import Change, LivePlan, Version, resolved
from megapd.scheduler.client import answers
from megapd.scheduler.client.answers import DecisionAnswer, VersionAnswer
from megapd.scheduler.client.http import Contact
from megapd.scheduler.client.registration import Registration, Resolve
from megapd.scheduler.client.sender import Sender

log = logging.getLogger(__name__)


class Listener:
    """Changes that were heard of, in order, until the run takes them in.

    The run's thread calls `may_decide`, `take` and `take_all`, the line's own thread the rest; before that is started, the run's
    thread calls all. One lock guards what was heard; Sender.owe is called while it is held.
    """

    def __init__(
        self, contact: Contact, run: Registration, plan: LivePlan, changes: ChangeLog, resolve: Resolve, sender: Sender
    ) -> None:
        """plan: with the changes on record taken in."""
        assert run.schedule is not None
        self.plan, self._contact, self._run, self._log = plan, contact, run, changes
        self._first, self._resolve, self._sender = run.schedule, resolve, sender
        self._versions: deque[VersionAnswer] = deque()  # heard of, not taken in yet
        self._decisions: deque[DecisionAnswer] = deque()
        self._version, self._decided = plan.version, plan.decided  # heard of up to here
        grows = run.schedule.grows
        # What a version decides on: of the first, and of those taken in since the run was started.
        self._metrics = {} if grows is None else {1: grows.metric}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------------- hearing

    def look(self) -> None:
        """Ask for changes. Raises Refusal, or Away."""
        api, path = self._contact.api, self._run.path
        found = answers.ask(api, answers.RUN, "GET", path)
        if found.schedule_version > self._version:
            versions = answers.pages(api, answers.VERSIONS, f"{path}/schedules", "version", self._version)
            with self._lock:
                for version in versions:
                    if version.version > self._version:
                        self._versions.append(version)
                        self._version = version.version
        if found.decisions > self._decided:
            self.hear(answers.pages(api, answers.DECISIONS, f"{path}/decisions", "sequence", self._decided - 1))
        self._contact.heard()

    def hear(self, decisions: Sequence[DecisionAnswer]) -> None:
        """Those that are not the next are left aside."""
        with self._lock:
            for decision in decisions:
                if decision.sequence == self._decided:
                    self._decisions.append(decision)
                    self._decided += 1

    def begin_anew(self) -> None:
        """The service has lost the run: hear all that is not on record."""
        with self._lock:
            self._versions.clear()
            self._decisions.clear()
            self._version = max((change.version for change in self._log.changes if isinstance(change, Version)), default=1)
            self._decided = len(self._log.decisions)

    def leave_aside(self, done: int) -> None:
        """If the run has ended, after `done` student steps: what was not taken in by then never teaches, and the service is to
        record so."""
        if done < self.plan.steps:
            return
        self.look()
        with self._lock:
            left: list[VersionAnswer | DecisionAnswer] = [*self._versions, *self._decisions]
            for told in left:
                if told.applied is None and told.effective < self.plan.steps:
                    self._sender.owe(told.path, self.plan.steps)
            self._versions.clear()
            self._decisions.clear()

    # -------------------------------------------------------------------------------------------------------- taking

    def may_decide(self, step: int, lines: Mapping[str, float]) -> bool:
        """Whether a report of `lines` after `step` student steps may lead to a decision."""
        if step >= self.plan.steps:
            return False
        version = self.plan.version_at(step)
        # What a version that was taken up before the run was resumed decides on is not on record: any line may be it.
        return version.grows and self._metrics.get(version.version, next(iter(lines))) in lines

    def take_all(self, soonest: int) -> None:
        while (change := self.take(soonest)) is not None:
            self.plan.take(change)

    def take(self, soonest: int) -> Change | None:
        """The next change that was heard of; it begins at student step `soonest` or later. The plan takes it before the next.

        On record before the service hears so: what it was told that a run has taken up, the run must know.
        """
        with self._lock:
            if self._decisions:
                made = self._decisions.popleft()
                begin = self._begin(made, max(soonest, self.plan.latest + 1))
                decision = made.taken(begin)
                self._log.append(decision)
                if begin != made.begin:
                    self._sender.owe(made.path, begin)
                return decision
            while self._versions:
                told = self._versions.popleft()
                begin = self._begin(told, soonest)
                version = self._resolved(told, begin)
                if version is None:
                    begin = max(told.applied or 0, self.plan.steps)  # never: the service's record, too, goes on without it
                else:
                    self._log.append(version)
                if begin != told.applied:
                    self._sender.owe(told.path, begin)
                if version is not None:
                    return version
        return None

    def _begin(self, told: VersionAnswer | DecisionAnswer, soonest: int) -> int:
        if told.applied is not None and told.applied < soonest:
            self._contact.complain(
                f"{told} of the schedule is on record as taken up at student step {told.applied}, which has passed"
            )
        return max(told.begin, soonest)

    def _resolved(self, told: VersionAnswer, begin: int) -> Version | None:
        """None, and it is logged, where the run cannot follow it."""
        if begin >= self.plan.steps:
            log.warning("%s of the schedule begins at student step %d, after the run's end", told, begin)
            return None
        try:
            schedule = answers.SCHEDULE.validate_python(told.document)
            if schedule.waits is not None and self._first.waits is None:
                why = "needs a run that began with it, whose teacher may still be training"
                raise UserError(f"schedule.policy: {schedule.policy} {why}")
            version = resolved(told.version, begin, schedule, self._resolve(schedule))
        except (ValueError, OSError) as error:  # a policy of a newer megapd, what the trajectory lacks, a file system's trouble
            log.error("%s of the schedule cannot be taken up: %s", told, error)
            return None
        if schedule.grows is not None:
            self._metrics[told.version] = schedule.grows.metric
        return version
