"""Leases at the checkpoint scheduler: a replica holds one, and students find by them the replicas that teach their run.

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

from megapd.config import Scheduler, TeacherServer
from megapd.errors import UserError
from megapd.schedule.http import Api, Away, Refusal

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between a student's looks for a list that has changed
RETRY_SECONDS = 1.0  # after a call of a replica that failed; shorter where a third of the lease is
CALL_SECONDS = 5.0  # for one answer: with the default lease, two beats may hang before it runs out
FIRST_SECONDS = 5.0  # that the first question for the endpoints waits for an answer
SAY_SECONDS = 2.0  # that a replica which ends waits for its word to be heard; with drain_seconds 25, twice, within the usual 30

T = TypeVar("T")


class _Contact:
    """The service as one client sees it. Tells the user once that it went away, once that it is back."""

    def __init__(self, settings: Scheduler, without: str) -> None:
        """without: what happens meanwhile. UserError where token or certificate cannot be read."""
        self.api = Api(settings, timeout_seconds=CALL_SECONDS)
        self._without, self._trouble = without, ""

    def ask(self, read: Callable[[Any], T], method: str, path: str, body: Any = None) -> T:
        """What `read` makes of the answer. Raises Refusal, or Away: of an answer that is no scheduler's, too."""
        tree = self.api.ask(method, path, body)
        try:
            return read(tree)
        except (LookupError, TypeError, ValueError) as error:
            raise Away(f"scheduler.url: {self.api.url} does not answer {path} as a scheduler does: {error!r}") from error

    def failed(self, error: Exception) -> None:
        """An answer did not come, or was a refusal."""
        trouble = f"{type(error).__name__} {getattr(error, 'status', '')}"
        if trouble != self._trouble:
            self._trouble = trouble
            unknown = None if isinstance(error, Away | Refusal) else error
            log.warning("%s; %s", error, self._without, exc_info=unknown)

    def heard(self) -> None:
        if self._trouble:
            self._trouble = ""
            log.warning("the scheduler at %s answers again", self.api.url)


def _mistake(error: Refusal, role: str) -> UserError:
    """A refusal as the error that ends a program at its start."""
    if error.status in (401, 403):
        fix = f"name a file that holds what `megapd scheduler token {role}` printed"
        return UserError(f"scheduler.token: scheduler.url refuses it: {error}; {fix}")
    return UserError(str(error))


# ---------------------------------------------------------------------------------------------------------------- students


class LeasedEndpoints:
    """The replicas that teach a run now, as the scheduler assigns them; see replicas.Endpoints.

    Of a run that the scheduler does not know (only training registers one): all that hold a lease in its group.
    """

    def __init__(self, settings: Scheduler, run: str) -> None:
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

    def __init__(self, settings: Scheduler, run: str) -> None:
        self.closed = threading.Event()
        self._contact = _Contact(settings, "the teacher's replicas stay those known last")
        self._run_name, self._group = run, settings.group or run
        self._known: tuple[str, ...] = ()
        self._settled = threading.Event()  # `current` waits no more
        self._refused: Refusal | None = None
        self._began = 0.0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._odd: set[str] = set()

    def current(self) -> tuple[str, ...]:
        with self._lock:
            if self._thread is None and not self.closed.is_set():
                self._began = time.monotonic()
                self._thread = threading.Thread(target=self._run, name="teacher-endpoints", daemon=True)
                self._thread.start()
        if not self.closed.is_set() and not self._settled.wait(max(0.0, self._began + FIRST_SECONDS - time.monotonic())):
            self._settled.set()
        if self._refused is not None:
            raise _mistake(self._refused, "read") from self._refused
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
        try:
            found = self._contact.ask(lambda tree: list(tree["endpoints"]), "GET", f"/v1/runs/{self._run_name}/assignment")
        except Refusal as error:
            if error.status != 404:
                raise
            found = self._contact.ask(self._of_group, "GET", "/v1/replicas")
        return tuple(address for address in dict.fromkeys(found) if self._usable(address))

    def _of_group(self, tree: list[dict[str, Any]]) -> list[str]:
        return [lease["endpoint"] for lease in tree if lease["group"] == self._group and lease["state"] == "live"]

    def _usable(self, address: str) -> bool:
        """Whether a client can be made of it: one replica that gave an odd address must not keep students from the others."""
        try:
            flight.Location(address)
        except (pa.ArrowException, TypeError) as error:
            if str(address) not in self._odd:
                self._odd.add(str(address))
                log.error("the scheduler names a replica that is no address and is left out: %s", error)
            return False
        return True


# ---------------------------------------------------------------------------------------------------------------- replicas


def advertised(options: TeacherServer, port: int) -> str:
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
    endpoint = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
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
        self,
        settings: Scheduler,
        group: str,
        endpoint: str,
        facts: dict[str, Any],
        figures: Callable[[], dict[str, float]],
    ) -> None:
        """facts: kept with the registration, a JSON object. figures: of each beat, finite numbers.

        UserError where scheduler.token or scheduler.root_certificate cannot be read; connects to nothing yet.
        """
        self.id = secrets.token_hex(16)
        self.endpoint = endpoint
        self._contact = _Contact(settings, "the teacher answers on, and students keep the replicas that they know")
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
                raise _mistake(error, "run") from error
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def drain(self) -> None:
        """Have students sent elsewhere. Returns when the service has it, at the latest after SAY_SECONDS; then the thread goes on
        trying."""
        self._draining.set()
        self._wake.set()
        if not self._drained.wait(SAY_SECONDS):
            log.warning("the scheduler was not told that %s drains", self.endpoint)

    def leave(self) -> None:
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
            self._held("POST", "/drain")  # though it may not be registered: the answer that it is may have been lost
            self._drained.set()
        elif self._registered:
            body = {"figures": self._figures()}
            if not self._held("POST", "/beat", body, self._take):
                self._registered = False
                if not self._draining.is_set():
                    log.warning("the scheduler had dropped the lease of %s; it is registered again", self.endpoint)
                    self._register()
        elif not self._draining.is_set():
            self._register()

    def _register(self) -> None:
        self._contact.ask(self._take, "PUT", f"/v1/replicas/{self.id}", self._body)
        self._registered = True

    def _held(self, method: str, action: str, body: Any = None, read: Callable[[Any], None] = lambda _: None) -> bool:
        """Make a call; False if the service has no such lease."""
        try:
            self._contact.ask(read, method, f"/v1/replicas/{self.id}{action}", body)
        except Refusal as error:
            if error.status != 404:
                raise
            return False
        return True

    def _take(self, tree: dict[str, Any]) -> None:
        seconds = float(tree["lease_seconds"])
        if not 0.0 < seconds < 1e6:
            raise ValueError(f"a lease of {seconds} s")
        self._seconds = seconds

    def _give_back(self) -> None:
        try:
            self._held("DELETE", "")
        except (Away, Refusal) as error:
            log.warning("%s; the lease of %s will run out", error, self.endpoint)
