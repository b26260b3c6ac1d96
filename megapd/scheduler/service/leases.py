"""Leases of teacher replicas: registered, beaten, drained; the silent ones are dropped, and students' lists follow.

What a replica is, and that it drains or is gone, is in the store before it is acknowledged. A beat is acknowledged from memory:
all it says is that the lease runs from now, and a service that starts gives every replica of the store a whole lease from then,
later than any beat that it lost. So a restart drops nobody who is alive; one who died meanwhile is dropped a lease after the
start.

A service that stood still (a suspended machine, a database that did not answer) has not heard beats that were sent: what it stood
still is added to every lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update

from megapd.scheduler.store.database import Conflict, NotFound, Store
from megapd.scheduler.store.events import emit
from megapd.scheduler.store.runs import reassign
from megapd.scheduler.store.tables import canonical, replicas

log = logging.getLogger(__name__)


SWEEP_SHARE = 0.1  # of a lease between two looks for those that ran out


@dataclass
class Lease:
    """A replica of the store as the service sees it. beaten: monotonic time; figures: what its last beat told."""

    id: str
    group: str
    endpoint: str
    state: str
    beaten: float
    figures: dict[str, float] = field(default_factory=dict)


class Leases:
    """Of one service: `beat` is for its event loop, what writes returns a future, `sweep` is called every `interval` seconds."""

    def __init__(self, store: Store, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.interval = seconds, seconds * SWEEP_SHARE
        self._store, self._clock = store, clock
        self._swept = clock()
        found = store.read(lambda connection: connection.execute(select(replicas).where(replicas.c.state != "gone")).all())
        self._held = {row.id: Lease(row.id, row.group, row.endpoint, row.state, self._swept) for row in found}

    def __len__(self) -> int:
        return len(self._held)

    def held(self) -> list[Lease]:
        return sorted([*self._held.values()], key=lambda lease: (lease.group, lease.endpoint))

    def age(self, lease: Lease) -> float:
        """Seconds since the last beat."""
        return self._clock() - lease.beaten

    def register(self, id: str, group: str, endpoint: str, facts: dict[str, Any]) -> Future[bool]:
        """Whether it is new. id: chosen by the replica's process, so that a repeat is known for one; Conflict if another uses
        it."""

        def write(connection: Connection) -> tuple[bool, list[str]]:
            return _register(connection, id, group, endpoint, facts)

        def written(result: tuple[bool, list[str]]) -> bool:
            new, replaced = result
            for other in replaced:
                self._held.pop(other, None)
            self._held[id] = Lease(id, group, endpoint, "live", self._clock())
            return new

        return self._then(self._store.submit(write), written)

    def beat(self, id: str, figures: dict[str, float]) -> Lease:
        """Renew a lease. NotFound once it was dropped: the replica registers again."""
        lease = self._held.get(id)
        if lease is None:
            raise NotFound(f"replica: {id} has no lease (any more); register it again")
        lease.beaten, lease.figures = self._clock(), figures
        return lease

    def drain(self, id: str) -> Future[None]:
        """Students are sent elsewhere; the replica answers what it has and beats on until it leaves."""
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
                lease.beaten += stood_still
        silent = [lease for lease in list(self._held.values()) if now - lease.beaten > self.seconds]
        if silent:
            log.warning("dropping %d replicas after %g s of silence, e.g. %s", len(silent), self.seconds, silent[0].endpoint)
        return [self._change(lease.id, "gone", "expired", lease.beaten) for lease in silent]

    def prune(self, before: float) -> Future[int]:
        """Forget replicas that were registered before that time and are gone; how many."""
        gone = (replicas.c.state == "gone") & (replicas.c.registered < before)
        return self._store.submit(lambda connection: connection.execute(delete(replicas).where(gone)).rowcount)

    def _change(self, id: str, state: str, reason: str, beaten: float | None = None) -> Future[None]:
        """beaten: leave it where it has beaten since."""

        def write(connection: Connection) -> bool:
            lease = self._held.get(id)
            if beaten is not None and lease is not None and lease.beaten > beaten:
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

        def done(finished: Future[Any]) -> None:
            error = finished.exception()
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(do(finished.result()))

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


def list_replicas(connection: Connection, after: str, limit: int) -> list[dict[str, Any]]:
    """Those that are gone and not yet forgotten as well, in the order of their ids."""
    query = select(replicas).where(replicas.c.id > after).order_by(replicas.c.id).limit(limit)
    return [dict(row._mapping) for row in connection.execute(query)]
