"""The API as commands reach it: of the service at scheduler.url or, without one, on the database's own file, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.app import build_app
from megapd.scheduler.client.http import Api, Away
from megapd.scheduler.service import Service
from megapd.scheduler.store import Store

RETRY_SECONDS = 10.0  # a command waits this long for a service that is away


@contextlib.contextmanager
def open_api(settings: SchedulerConfig, *, create: bool = False, retry_seconds: float = RETRY_SECONDS) -> Iterator[Api]:
    """Calls are repeated while the service is away, which is a UserError after retry_seconds. create: also a new database."""
    with contextlib.ExitStack() as stack:
        transport = None
        if settings.url is None:
            store = Store(settings.database.reveal("scheduler.database")) if create else existing_store(settings)
            transport = _InProcess(Service(stack.enter_context(contextlib.closing(store)), settings))
            settings = settings.model_copy(update={"url": "http://localhost", "token": None, "root_certificate": None})
        api = stack.enter_context(contextlib.closing(Api(settings, retry_seconds=retry_seconds, transport=transport)))
        try:
            yield api
        except Away as error:
            raise UserError(f"{error}; is `megapd scheduler` up?") from error


def existing_store(settings: SchedulerConfig) -> Store:
    """The store. UserError where it would be made for a command that only reads, or changes, what is there."""
    url = settings.database.reveal("scheduler.database")
    path = url.removeprefix("sqlite:///")
    if path != url and not Path(path).exists():
        told = "name the service with scheduler.url, or the database's own file"
        raise UserError(f"scheduler.database: there is no {path}; {told}")
    return Store(url)


class _InProcess(httpx.BaseTransport):
    """The application without a network. Its caller has the database, and so is an administrator."""

    def __init__(self, service: Service) -> None:
        self._transport = httpx.ASGITransport(self._application)
        self._app, self._runner, self._turn = build_app(service), asyncio.Runner(), threading.Lock()

    async def _application(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app({**scope, "caller": ("command line", "admin")}, receive, send)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with self._turn:
            return self._runner.run(self._answer(request))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

    def close(self) -> None:
        self._runner.close()
