"""The checkpoint scheduler over HTTP: FastAPI on the store and the leases. `serve` runs it, `build_app` makes the application.

No route opens a path: locations are text that runs and replicas understand. Folders are imported by `megapd trajectory import`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy import Connection
from starlette.exceptions import HTTPException

from megapd import __version__
from megapd.config import Scheduler
from megapd.errors import UserError
from megapd.schedule import journal
from megapd.schedule.api import Problem
from megapd.schedule.auth import Figures, Guard, Tokens
from megapd.schedule.lanes import Lanes
from megapd.schedule.leases import Leases
from megapd.schedule.store import Conflict, NotFound, Refused, Store, Unavailable
from megapd.schedule.tables import canonical

log = logging.getLogger(__name__)

PRUNE_SECONDS = 3600.0
DAY = 86400.0
SHUTDOWN_SECONDS = 5  # for answers that are on their way

T = TypeVar("T")


class Service:
    """What the routes share: the store from an event loop, the leases, and word of commits."""

    def __init__(self, store: Store, settings: Scheduler) -> None:
        self.store, self.settings = store, settings
        self.leases = Leases(store, settings.lease_seconds)
        self.figures = Figures()
        self.tokens = Tokens(store, loopback=is_loopback(settings.host))
        self.streams = 0
        self.stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()

    async def look(self, do: Callable[[Connection], T]) -> T:
        """A read of a few rows by their keys. With SQLite at once: it takes 0.1 ms and waits for nobody, a thread's turn takes
        longer."""
        return self.store.read(do) if self.store.sqlite else await asyncio.to_thread(self.store.read, do)

    async def read(self, do: Callable[[Connection], T]) -> T:
        """A read of many rows, beside the event loop."""
        return await asyncio.to_thread(self.store.read, do)

    async def write(self, do: Callable[[Connection], T]) -> T:
        """Returns when it is on the disk."""
        return await asyncio.wrap_future(self.store.submit(do))

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
            self.stopping = True
            self._tell()
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
                await self.write(lambda connection: journal.prune(connection, before))  # noqa: B023 - done before the next turn
                await asyncio.wrap_future(self.leases.prune(before))
            except Unavailable as error:
                log.warning("old events were not removed, trying again in an hour: %s", error)
            await asyncio.sleep(PRUNE_SECONDS)


class Answer(Response):
    """JSON in ASCII: a tree may hold what UTF-8 cannot (half of a surrogate pair), as JSON can."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return canonical(content).encode()


def build_app(service: Service) -> FastAPI:
    """The application; its lifespan runs the leases."""
    from megapd.schedule import routes_catalogue, routes_runs, routes_service
    from megapd.schedule.dashboard import dashboard

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="megapd scheduler",
        version=__version__,
        summary="Which teacher checkpoint teaches which run, when",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses={code: {"model": Problem} for code in (400, 401, 403, 404, 408, 409, 413, 421, 422, 429, 503)},
    )
    app.state.service = service
    for module in (routes_service, routes_runs, routes_catalogue):  # matched in this order: what is asked most stands first
        app.include_router(module.router(service))
    dashboard(app)
    _handle_errors(app)
    app.add_middleware(
        Guard,
        tokens=service.tokens,
        figures=service.figures,
        lanes=Lanes(service),
        max_body_bytes=service.settings.max_body_bytes,
    )
    return app


def _handle_errors(app: FastAPI) -> None:
    def problem(status: int, detail: str, current: Any = None, **headers: str) -> Answer:
        body = {"detail": detail} if current is None else {"detail": detail, "current": current}
        return Answer(body, status, headers=headers)

    @app.exception_handler(NotFound)
    async def not_found(_: Request, error: Exception) -> Response:
        return problem(404, str(error))

    @app.exception_handler(Conflict)
    async def conflict(_: Request, error: Exception) -> Response:
        return problem(409, str(error), getattr(error, "current", None))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Exception) -> Response:
        return problem(422, str(error))

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: Exception) -> Response:
        return problem(422, str(error))

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Exception) -> Response:
        return problem(503, f"the database does not answer: {error}", **{"Retry-After": "2"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        # Without what was sent, which the default answer repeats: it may be long, or no JSON (NaN).
        assert isinstance(error, RequestValidationError)
        told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        return problem(422, "; ".join(told)[:2000])

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem(error.status_code, str(error.detail), **(error.headers or {}))


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it takes requests, and ends event streams when it is told to end."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # What is there now stays: a full collection that walks all of it stops every answer for 40 ms, each minute or so.
            gc.collect()
            gc.freeze()
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        await super().shutdown(sockets)


def serve(settings: Scheduler, *, ready: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> None:
    """Answer until SIGTERM, SIGINT or `stop`. ready: called with the port once requests are taken.

    Raises UserError where the database, the address or the TLS files cannot be used, or an address that other machines reach
    lacks tokens or TLS.
    """
    with contextlib.closing(Store(settings.database)) as store:
        if not is_loopback(settings.host):
            _check_public(settings, store)
        store.lock_service()
        listening = _listen(settings.host, settings.port)
        with contextlib.closing(listening):
            port = listening.getsockname()[1]
            service = Service(store, settings)
            if service.tokens.open():
                log.warning("no tokens: everybody on this machine may change schedules; `megapd scheduler token admin` ends that")
            server = _Server(_uvicorn(settings, build_app(service)), service, lambda: ready(port) if ready else None)
            with _stopped_by_signals(server, stop):
                server.run(sockets=[listening])


def _uvicorn(settings: Scheduler, app: FastAPI) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=_protocol(),
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"scheduler.certificate, scheduler.key: {error}; name a PEM certificate and its private key") from error
    return config


class _Joined:
    """A transport that sends what is written in one turn of the event loop at once: uvicorn writes head and body of an answer
    apart, which costs two calls of the kernel and two packets; a third of the time of a heartbeat."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            data, self._waiting = b"".join(self._waiting), []
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _protocol() -> type[asyncio.Protocol]:
    """uvicorn's, on httptools where that is installed (uvicorn[standard]: half the time), else on h11."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Joined(transport))

    return Protocol


def _check_public(settings: Scheduler, store: Store) -> None:
    where = f"scheduler.host: {settings.host} is reached from other machines"
    if settings.certificate is None:
        raise UserError(f"{where}, and tokens must not cross a network in the clear; set scheduler.certificate and scheduler.key")
    if not store.read(journal.list_tokens):
        raise UserError(f"{where}, and there are no tokens; make one with `megapd scheduler token admin`, or listen on 127.0.0.1")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"scheduler.host, scheduler.port: cannot listen on {host}:{port}: {error.strerror or error}; choose others"
        ) from error
    return listening


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server, stop: threading.Event | None) -> Any:
    """uvicorn raises the signal that ended it once more when it is done, which would then end the process with it."""
    ended = threading.Event()
    if stop is not None:
        watched = stop

        def watch() -> None:
            while not ended.is_set():
                if watched.wait(0.05):
                    server.should_exit = True
                    return

        threading.Thread(target=watch, name="schedule-stop", daemon=True).start()
    if threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            ended.set()
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
