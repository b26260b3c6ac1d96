"""Leases of teacher replicas: registered, renewed, drained; the silent ones are dropped, and students' lists follow.

What a replica is, and that it drains or is gone, is in the store before it is acknowledged. A heartbeat is acknowledged from
memory: all it says is that the lease runs from now, and a service that starts gives every replica of the store a whole lease
from then, later than any heartbeat that it lost. So a restart drops nobody who is alive; one who died meanwhile is dropped a
lease after the start.

A service that stood still (a suspended machine, a database that did not answer) has not heard heartbeats that were sent: what it
stood still is added to every lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from megapd.scheduler.store import Conflict, NotFound, Store
from megapd.scheduler.store.events import emit
from megapd.scheduler.store.runs import reassign
from megapd.scheduler.store.tables import canonical, replicas

log = logging.getLogger(__name__)

SWEEP_SHARE = 0.1  # of a lease between two looks for those that ran out


@dataclass
class Lease:
    """A replica of the store as the service sees it. heard: monotonic time of its last heartbeat, metrics: what that told."""

    id: str
    group: str
    endpoint: str
    state: str
    heard: float
    metrics: dict[str, float] = field(default_factory=dict)


class LeaseTable:
    """Of one service: `heartbeat` is for its event loop, what writes returns a future, `sweep` is called every `interval` s."""

    def __init__(self, store: Store, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.interval = seconds, seconds * SWEEP_SHARE
        self._store, self._clock = store, clock
        self._swept = clock()
        found = store.read(lambda connection: connection.execute(select(replicas).where(replicas.c.state != "gone")).all())
        self._held = {row.id: Lease(row.id, row.group, row.endpoint, row.state, self._swept) for row in found}

    def held(self) -> list[Lease]:
        return sorted([*self._held.values()], key=lambda lease: (lease.group, lease.endpoint))

    def age(self, lease: Lease) -> float:
        """Seconds since the last heartbeat."""
        return self._clock() - lease.heard

    def register(self, id: str, group: str, endpoint: str, facts: dict[str, Any]) -> Future[bool]:
        """Whether it is new. id: the replica's process's own, so that a repeat is known for one; Conflict if another uses it."""

        def written(result: tuple[bool, list[str]]) -> bool:
            new, replaced = result
            for other in replaced:
                self._held.pop(other, None)
            self._held[id] = Lease(id, group, endpoint, "live", self._clock())
            return new

        write = self._store.submit(lambda connection: _register(connection, id, group, endpoint, facts))
        return self._then(write, written)

    def heartbeat(self, id: str, metrics: dict[str, float]) -> Lease:
        """Renew a lease. NotFound once it was dropped: the replica registers again."""
        lease = self._held.get(id)
        if lease is None:
            raise NotFound(f"replica: {id} has no lease (any more); register it again")
        lease.heard, lease.metrics = self._clock(), metrics
        return lease

    def drain(self, id: str) -> Future[None]:
        """Students are sent elsewhere; the replica answers what it has and renews its lease until it leaves."""
        return self._change(id, "draining", "")

    def leave(self, id: str) -> Future[None]:
        return self._change(id, "gone", "left")

    def sweep(self) -> list[Future[None]]:
        """Drop the silent ones; the writes that say so."""
        now = self._clock()
        stood_still = now - self._swept - 2 * self.interval
        self._swept = now
        if stood_still > 0:
            for lease in list(self._held.values()):
                lease.heard += stood_still
        silent = [lease for lease in list(self._held.values()) if now - lease.heard > self.seconds]
        if silent:
            log.warning("dropping %d replicas after %g s of silence, e.g. %s", len(silent), self.seconds, silent[0].endpoint)
        return [self._change(lease.id, "gone", "expired", lease.heard) for lease in silent]

    def prune(self, before: float) -> Future[int]:
        """Forget replicas that were registered before that time and are gone; how many."""
        gone = (replicas.c.state == "gone") & (replicas.c.registered < before)
        return self._store.submit(lambda connection: connection.execute(delete(replicas).where(gone)).rowcount)

    def _change(self, id: str, state: str, reason: str, heard: float | None = None) -> Future[None]:
        """heard: leave it where a heartbeat came since."""

        def write(connection: Connection) -> bool:
            lease = self._held.get(id)
            if heard is not None and lease is not None and lease.heard > heard:
                return False
            _change(connection, id, state, reason)
            return True

        def written(done: bool) -> None:
            if not done:
                return
            if state == "gone":
                self._held.pop(id, None)
            elif id in self._held:
                self._held[id].state = state

        return self._then(self._store.submit(write), written)

    @staticmethod
    def _then(future: Future[Any], do: Callable[[Any], Any]) -> Future[Any]:
        """A future of what `do` returns, called as soon as the write is done and before anybody hears of it."""
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()  # the write goes on though a caller that waited for it is cancelled

        def done(finished: Future[Any]) -> None:
            try:
                result.set_result(do(finished.result()))
            except BaseException as error:  # the write's, or that of `do`: whoever waits hears of it
                result.set_exception(error)

        future.add_done_callback(done)
        return result


def _register(connection: Connection, id: str, group: str, endpoint: str, facts: dict[str, Any]) -> tuple[bool, list[str]]:
    found = connection.execute(select(replicas).where(replicas.c.id == id)).first()
    if found is not None and (found.endpoint, found.group) != (endpoint, group):
        raise Conflict(f"id: {id} is the replica {found.endpoint} of {found.group}; each process takes an id of its own")
    same = (replicas.c.endpoint == endpoint) & (replicas.c.state != "gone") & (replicas.c.id != id)
    others = connection.execute(select(replicas.c.id, replicas.c.group).where(same)).all()
    for other in others:  # a replica that was started again where one stood that ended without a word
        _change(connection, other.id, "gone", "replaced")
    if found is None:
        row = {"id": id, "group": group, "endpoint": endpoint, "facts": canonical(facts), "state": "live", "reason": ""}
        connection.execute(insert(replicas), {**row, "registered": time.time()})
    elif found.state != "live":
        values = {"state": "live", "reason": "", "facts": canonical(facts)}
        connection.execute(update(replicas).where(replicas.c.id == id).values(values))
    if found is None or found.state != "live":
        emit(connection, "replica", replica=id, group=group, endpoint=endpoint, state="live")
        reassign(connection, group)
    return found is None, [other.id for other in others]


def _change(connection: Connection, id: str, state: str, reason: str) -> None:
    found = connection.execute(select(replicas).where(replicas.c.id == id)).first()
    if found is None or (found.state == "gone" and state != "gone"):
        raise NotFound(f"replica: {id} has no lease (any more)")
    if found.state == state:
        return
    connection.execute(update(replicas).where(replicas.c.id == id).values(state=state, reason=reason))
    emit(connection, "replica", replica=id, group=found.group, endpoint=found.endpoint, state=state, reason=reason)
    reassign(connection, found.group)
