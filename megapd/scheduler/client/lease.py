"""Leases at the scheduler: a replica holds one, and students find by them the replicas that teach their run.

The scheduler is asked beside what replicas and students do and never in its way. While it is away a replica answers on and a
student keeps the replicas that it knows; both try again until it is back.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as flight
from pydantic import TypeAdapter

from megapd.config import SchedulerConfig, TeacherServerConfig
from megapd.errors import UserError
from megapd.network import server_address
from megapd.scheduler.client import answers
from megapd.scheduler.client.http import CALL_SECONDS, Api, Away, Contact, Refusal, mistake

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # after a call of a replica that failed; shorter where a third of the lease is
SAY_SECONDS = 2.0  # that a replica which ends waits for its word to be heard; with drain_seconds 25, twice, within the usual 30

POLL_SECONDS = 1.0  # between a student's looks for a list that has changed
FIRST_SECONDS = 5.0  # that the first question for the endpoints waits for an answer

T = TypeVar("T")


def advertised(options: TeacherServerConfig, port: int) -> str:
    """The endpoint that a replica listening on `port` registers. UserError if students could not reach it."""
    host = options.host if options.advertise is None else options.advertise
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    if everywhere:
        raise UserError(
            f"teacher.server.advertise: the scheduler has to tell students a host, and {host} is none; "
            f"give the name or address of this machine that they reach it by"
        )
    scheme = "grpc" if options.certificate is None else "grpc+tls"
    endpoint = server_address(scheme, host, port)
    try:
        flight.Location(endpoint)
    except pa.ArrowException as error:
        raise UserError(f"teacher.server.advertise: {host!r} is no host ({error}); give a name or an address alone") from error
    return endpoint


class ReplicaLease:
    """The lease of this process's replica: taken on entry, given back on exit, in between beaten by a thread of its own.

    The thread makes every call, so that none overtakes another. It goes on for as long as the service is away.
    """

    def __init__(
        self, settings: SchedulerConfig, group: str, endpoint: str, facts: dict[str, Any], figures: Callable[[], dict[str, float]]
    ) -> None:
        """facts: kept with the registration, a JSON object. figures: of each beat, finite numbers.

        UserError where scheduler.token or scheduler.root_certificate cannot be read; connects to nothing yet.
        """
        self.id = secrets.token_hex(16)
        self.endpoint = endpoint
        api = Api(settings, timeout_seconds=CALL_SECONDS)
        self._contact = Contact(api, "the teacher answers on, and students keep the replicas that they know")
        self._body = {"group": group, "endpoint": endpoint, "facts": facts}
        self._figures = figures
        self._registered = False
        self._seconds = 0.0  # of the lease, as the service said last; 0: not heard yet
        self._draining, self._leaving = threading.Event(), threading.Event()
        self._drained = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="teacher-lease", daemon=True)

    def __enter__(self) -> ReplicaLease:
        """Registers, or leaves that to the thread where the service is away. UserError where it refuses."""
        try:
            self._register()
        except Away as error:
            self._contact.failed(error)
        except BaseException as error:
            self._contact.api.close()
            if isinstance(error, Refusal):
                raise mistake(error, "run") from error
            raise
        self._thread.start()
        return self

    def drain(self) -> None:
        """Have students sent elsewhere. Returns when the service has it, at the latest after SAY_SECONDS; then the thread goes on
        trying."""
        self._draining.set()
        self._wake.set()
        if not self._drained.wait(SAY_SECONDS):
            log.warning("the scheduler was not told that %s drains", self.endpoint)

    def __exit__(self, *_: object) -> None:
        """Give the lease back and end the thread; after SAY_SECONDS the lease is left to run out."""
        self._leaving.set()
        self._wake.set()
        self._thread.join(SAY_SECONDS)
        if self._thread.is_alive():
            log.warning("the scheduler was not told that %s ends; its lease will run out", self.endpoint)

    def _run(self) -> None:
        failed = not self._registered
        try:
            while not self._leaving.is_set():
                pause = self._seconds / 3 if self._seconds else RETRY_SECONDS
                self._wake.wait(min(pause, RETRY_SECONDS) if failed else pause)
                self._wake.clear()
                if self._leaving.is_set():
                    break
                try:
                    self._turn()
                    self._contact.heard()
                    failed = False
                except Exception as error:  # whatever it is, the user hears of it and the thread goes on
                    self._contact.failed(error)
                    failed = True
            self._give_back()
        finally:
            self._drained.set()
            self._contact.api.close()

    def _turn(self) -> None:
        if self._draining.is_set() and not self._drained.is_set():
            # Though it may not be registered: the answer that it is may have been lost.
            self._held(answers.ANYTHING, "POST", "/drain")
            self._drained.set()
        elif self._registered:
            beaten = self._held(answers.LEASE, "POST", "/beat", {"figures": self._figures()})
            if beaten is not None:
                self._seconds = beaten.lease_seconds
            else:
                self._registered = False
                if not self._draining.is_set():
                    log.warning("the scheduler had dropped the lease of %s; it is registered again", self.endpoint)
                    self._register()
        elif not self._draining.is_set():
            self._register()

    def _register(self) -> None:
        self._seconds = self._ask(answers.LEASE, "PUT", "", self._body).lease_seconds
        self._registered = True

    def _held(self, kind: TypeAdapter[T], method: str, action: str, body: Any = None) -> T | None:
        """The answer, None if the service has no such lease."""
        try:
            return self._ask(kind, method, action, body)
        except Refusal as error:
            if error.status != 404:
                raise
            return None

    def _ask(self, kind: TypeAdapter[T], method: str, action: str, body: Any = None) -> T:
        return answers.ask(self._contact.api, kind, method, f"/v1/replicas/{self.id}{action}", body)

    def _give_back(self) -> None:
        try:
            self._held(answers.ANYTHING, "DELETE", "")
        except (Away, Refusal) as error:
            log.warning("%s; the lease of %s will run out", error, self.endpoint)


# ------------------------------------------------------------------------------------------------------- a student's side


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
