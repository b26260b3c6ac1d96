"""Leases at the checkpoint scheduler: a replica holds one, and students find by them the replicas that teach their run.

The scheduler is asked beside what replicas and students do and never in its way. While it is away a replica answers on and a
student keeps the replicas that it knows; both try again until it is back.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from megapd.config import SchedulerConfig, TeacherServerConfig
from megapd.errors import UserError
from megapd.scheduler.client.contact import _Contact, _mistake
from megapd.scheduler.client.http import Away, Refusal

log = logging.getLogger(__name__)


RETRY_SECONDS = 1.0  # after a call of a replica that failed; shorter where a third of the lease is


SAY_SECONDS = 2.0  # that a replica which ends waits for its word to be heard; with drain_seconds 25, twice, within the usual 30


# ---------------------------------------------------------------------------------------------------------------- replicas


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
        settings: SchedulerConfig,
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
