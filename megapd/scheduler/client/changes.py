"""A run's line to the scheduler, on rank 0: it registers, reports, and hears of schedule versions and decisions.

A thread of its own talks to the service. While that is away the run goes on with what it knows; what it measured meanwhile is
told when the service is back. Only a report that an adaptive schedule may decide on is waited for, and only while the service
answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import Change, LivePlan
from megapd.scheduler.client.answers import DecisionAnswer
from megapd.scheduler.client.http import Api, Away, Contact, Refusal, patiently
from megapd.scheduler.client.listener import Listener
from megapd.scheduler.client.registration import Registration, Resolve, Weights, register, registered_weights, untold_beginnings
from megapd.scheduler.client.sender import Sender, figures

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between looks for changes; what the run has to say goes at once
START_SECONDS = 5.0  # a run that starts waits so long for a service that does not answer
DECIDE_SECONDS = 5.0  # longest wait for what a report leads to
CLOSE_SECONDS = 5.0  # a run that ends tells the rest for so long


class ServiceSource:
    """The service's changes of a run's schedule; see schedule.changes.ChangeSource, whose contract it keeps.

    Nothing here stops a run but what is wrong from its start: a token that is refused, another run of that name, a schedule that
    the registered trajectory cannot follow. Later troubles are logged, once each.

    The run's thread calls the public methods. All else happens in the line's own thread, which `start` starts last. What both
    need lies in Sender and Listener, which say how it is guarded.
    """

    def __init__(
        self,
        api: Api,
        run: Registration,
        plan: LivePlan | None,
        changes: ChangeLog,
        resolve: Resolve,
        weights: Weights,
        *,
        ahead: int,
    ) -> None:
        """plan: with the changes on record taken in, None where nothing teaches. ahead: steps before its own that signals are
        asked for."""
        self.registered: dict[int, str] = {}  # teacher step -> digest of its weights, as registered when the run began
        self._run, self._log, self._weights, self._ahead = run, changes, weights, ahead
        self._contact = Contact(api, "the run goes on with the schedule that it knows")
        self._wake, self._closed = threading.Event(), threading.Event()
        self._sender = Sender(self._contact, run.path, self._hear, self._wake)
        self._listener = None if plan is None else Listener(self._contact, run, plan, changes, resolve, self._sender)
        self._known_there = False  # the service has the run
        self._lines: dict[str, float] = {}  # of the step that was reported last, until it is told
        self._reported = 0
        self._thread = threading.Thread(target=self._talk, name="scheduler", daemon=True)

    def start(self, step: int, metrics: Path) -> None:
        """Register, if the service answers, and take in the changes that it has and the run's folder has not.

        step: student steps done before, from which on they can begin. metrics: metrics.jsonl, whose lines are told as far as the
        service has not heard of them. Raises UserError, see the class, and is closed then.
        """
        self._sender.step = step
        try:
            try:
                patiently(START_SECONDS, pause=0.5)(self._begin, step, metrics)
            except Away as error:
                self._contact.failed(error)
                self._sender.tell_again(metrics, step, heard=False)
            if self._listener is not None:
                self._listener.take_all(step)
        except BaseException:
            self._contact.api.close()
            raise
        self._thread.start()

    # ------------------------------------------------------------------------------------------------------- the run's side

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._lines |= figures(kind, values)
        self._reported = step

    def next(self, step: int) -> Change | None:
        self._sender.step = step
        answered = self._flush()
        if answered is not None and self._contact.up:
            answered.wait(DECIDE_SECONDS)
        return None if self._listener is None else self._listener.take(step + self._ahead + 1)

    def sync(self) -> tuple[int, str]:
        """No report of its own: metrics.jsonl holds what a resumed run tells again."""
        return 0, ""

    def close(self) -> None:
        self._sender.step = max(self._sender.step, self._reported)
        self._flush()
        self._closed.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_SECONDS + 1.0)
            if self._sender.untold:
                log.warning("scheduler: %d messages of this run were not told", self._sender.untold)
        if not self._thread.is_alive():  # else it is in a call that it needs the connection for; it ends with the process
            self._contact.api.close()

    def _flush(self) -> threading.Event | None:
        """Give what was measured to the thread; what to wait for, if it may lead to a decision."""
        if not self._lines:
            return None
        lines, self._lines = self._lines, {}
        answered = self._sender.report(self._reported, lines)
        return answered if self._listener is not None and self._listener.may_decide(self._reported, lines) else None

    # ---------------------------------------------------------------------------------------------------- the thread's side

    def _talk(self) -> None:
        end = float("inf")
        while True:
            closing = self._closed.is_set()
            if closing:
                end = min(end, time.monotonic() + CLOSE_SECONDS)
            try:
                self._converse(end, closing)
            except Exception as error:  # whatever it is, the user hears of it and the thread goes on
                if isinstance(error, Refusal) and error.status == 404:
                    self._begin_anew()
                self._contact.failed(error)
                self._sender.release()
            if closing and (time.monotonic() > end or not self._sender.untold):
                return
            self._wake.wait(POLL_SECONDS if not closing else 0.2)
            self._wake.clear()

    def _converse(self, end: float, closing: bool) -> None:
        if not self._known_there:
            self._register()
        self._sender.tell(end)
        if self._listener is None:
            return
        if not closing:
            self._listener.look()
        else:
            self._listener.leave_aside(self._sender.step)
            self._sender.tell(end)

    def _begin(self, step: int, metrics: Path) -> None:
        self._register()
        if self._listener is not None:
            self._listener.look()
            self.registered = registered_weights(self._contact.api, self._run, self._listener.plan.teachers, self._weights)
        self._sender.tell_again(metrics, step, heard=True)

    def _register(self) -> None:
        changes = self._log.changes
        register(self._contact.api, self._run)
        if self._listener is not None:
            for path, begin in untold_beginnings(self._contact.api, self._run, changes).items():
                self._sender.owe(path, begin)
        self._known_there = True
        self._contact.heard()

    def _begin_anew(self) -> None:
        """The service does not know the run: register again. The listener first: what it forgets, nobody can owe any more."""
        self._known_there = False
        if self._listener is not None:
            self._listener.begin_anew()
        self._sender.forgive()

    def _hear(self, decisions: Sequence[DecisionAnswer]) -> None:
        if self._listener is not None:
            self._listener.hear(decisions)
