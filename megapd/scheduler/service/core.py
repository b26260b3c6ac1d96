"""One service: what its routes share, and what it does beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from fastapi import Response
from sqlalchemy import Connection

from megapd.config import SchedulerConfig
from megapd.network import is_loopback
from megapd.scheduler.service.access import Authenticator
from megapd.scheduler.service.lease_table import LeaseTable
from megapd.scheduler.service.metrics import Metrics
from megapd.scheduler.store import NotFound, Store, Unavailable, events
from megapd.scheduler.store.tables import canonical

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)
PRUNE_SECONDS = 3600.0
DAY = 86400.0


class Service:
    """What the routes share: the store from an event loop, the leases, and word of commits."""

    def __init__(self, store: Store, settings: SchedulerConfig) -> None:
        self.store, self.settings = store, settings
        self.leases = LeaseTable(store, settings.lease_seconds)
        self.metrics = Metrics()
        self.authenticator = Authenticator(store, loopback=is_loopback(settings.host))
        self.streams = 0
        self.stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    async def look(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A read of a few rows by their keys, with SQLite at once: it takes 0.1 ms, a thread more, and it waits for nobody."""
        if not self.store.sqlite:
            return await self.read(do, *args, **kwargs)
        return self.store.read(lambda connection: do(connection, *args, **kwargs))

    async def read(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A read of many rows, beside the event loop."""
        return await asyncio.to_thread(self.store.read, lambda connection: do(connection, *args, **kwargs))

    async def write(self, do: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns when it is on the disk."""
        return await asyncio.wrap_future(self.store.submit(lambda connection: do(connection, *args, **kwargs)))

    async def changed(self, seconds: float) -> None:
        """Returns when something was written, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.store.on_commit(self._committed)
        tasks = [asyncio.create_task(self._sweep()), asyncio.create_task(self._prune())]
        try:
            yield
        finally:
            self.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self) -> None:
        """End the event streams; for the loop's thread."""
        self.stopping = True
        self._tell()

    def _committed(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.leases.interval)
            for write in self.leases.sweep():
                try:
                    await asyncio.wrap_future(write)
                except (Unavailable, NotFound) as error:
                    log.warning("a silent replica was not dropped, trying again: %s", error)

    async def _prune(self) -> None:
        while True:
            before = time.time() - self.settings.retention_days * DAY
            try:
                await self.write(events.prune, before)
                await asyncio.wrap_future(self.leases.prune(before))
            except Unavailable as error:
                log.warning("old events were not removed, trying again in an hour: %s", error)
            await asyncio.sleep(PRUNE_SECONDS)


class CanonicalJSON(Response):
    """JSON in ASCII: a tree may hold what UTF-8 cannot (half of a surrogate pair), as JSON can."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return canonical(content).encode()


def problem(status: int, detail: str, current: Any = None, **headers: str) -> CanonicalJSON:
    """An api.Problem."""
    body = {"detail": detail} if current is None else {"detail": detail, "current": current}
    return CanonicalJSON(body, status, headers=headers)


def unavailable(error: Exception) -> CanonicalJSON:
    return problem(503, f"the database does not answer: {error}", **{"Retry-After": "2"})
