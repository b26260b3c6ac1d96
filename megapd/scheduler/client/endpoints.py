"""The replicas that teach a run, as the scheduler assigns them: a student's side of leases."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.flight as flight

from megapd.config import SchedulerConfig
from megapd.scheduler.client import answers
from megapd.scheduler.client.contact import CALL_SECONDS, Contact, mistake
from megapd.scheduler.client.http import Api, Refusal

POLL_SECONDS = 1.0  # between a student's looks for a list that has changed
FIRST_SECONDS = 5.0  # that the first question for the endpoints waits for an answer


class LeasedEndpoints:
    """The replicas that teach a run now, as the scheduler assigns them; see replicas.Endpoints.

    Of a run that the scheduler does not know (only training registers one): all that hold a lease in its group.
    """

    def __init__(self, settings: SchedulerConfig, run: str) -> None:
        """UserError where scheduler.token or scheduler.root_certificate cannot be read; connects to nothing yet."""
        self._watch = _Watch(settings, run)
        self._ended = weakref.finalize(self, self._watch.closed.set)  # the thread of one that nobody closed ends with it

    def current(self) -> Sequence[str]:
        """What is known, at once; the first call waits for an answer, some seconds at most. Thread-safe.

        Raises UserError where the scheduler's first answer is a refusal: of the token, for one.
        """
        return self._watch.current()

    def close(self) -> None:
        """What was known last stays. The thread, a daemon, ends with its present call."""
        self._ended()


class _Watch:
    """What LeasedEndpoints knows, and the thread that asks; apart, so that the thread does not keep its owner alive."""

    def __init__(self, settings: SchedulerConfig, run: str) -> None:
        self.closed = threading.Event()
        self._contact = Contact(Api(settings, timeout_seconds=CALL_SECONDS), "the teacher's replicas stay those known last")
        self._run_name, self._group = run, settings.group or run
        self._known: tuple[str, ...] = ()
        self._settled = threading.Event()  # `current` waits no more
        self._refused: Refusal | None = None
        self._began = 0.0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def current(self) -> tuple[str, ...]:
        with self._lock:
            if self._thread is None and not self.closed.is_set():
                self._began = time.monotonic()
                self._thread = threading.Thread(target=self._run, name="teacher-endpoints", daemon=True)
                self._thread.start()
        if not self.closed.is_set() and not self._settled.wait(max(0.0, self._began + FIRST_SECONDS - time.monotonic())):
            self._settled.set()
        if self._refused is not None:
            raise mistake(self._refused, "read") from self._refused
        return self._known

    def _run(self) -> None:
        try:
            while not self.closed.is_set():
                try:
                    self._known = self._ask()
                except Exception as error:  # whatever it is, the user hears of it and the thread goes on
                    if isinstance(error, Refusal) and not self._settled.is_set():
                        self._refused = error
                        return
                    self._contact.failed(error)
                else:
                    self._contact.heard()
                    self._settled.set()
                self.closed.wait(POLL_SECONDS)
        finally:
            self._settled.set()
            self._contact.api.close()

    def _ask(self) -> tuple[str, ...]:
        api = self._contact.api
        try:
            found = answers.ask(api, answers.ASSIGNMENT, "GET", f"/v1/runs/{self._run_name}/assignment").endpoints
        except Refusal as error:
            if error.status != 404:
                raise
            leases = answers.ask(api, answers.REPLICAS, "GET", "/v1/replicas")
            found = [lease.endpoint for lease in leases if lease.group == self._group and lease.state == "live"]
        return tuple(address for address in dict.fromkeys(found) if self._usable(address))

    def _usable(self, address: str) -> bool:
        """Whether a client can be made of it: one replica that gave an odd address must not keep students from the others."""
        try:
            flight.Location(address)
        except (pa.ArrowException, TypeError) as error:
            self._contact.complain(f"the scheduler names a replica that is no address and is left out: {error}")
            return False
        return True
