"""The checkpoint scheduler over HTTP: FastAPI on the store and the leases. `serve` runs it, `build_app` makes the application.

No route opens a path: locations are text that runs and replicas understand. Folders are imported by `megapd trajectory import`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.app import build_app
from megapd.scheduler.service.access import is_loopback
from megapd.scheduler.service.hub import Service
from megapd.scheduler.store import tokens as journal
from megapd.scheduler.store.database import Store

log = logging.getLogger(__name__)


SHUTDOWN_SECONDS = 5  # for answers that are on their way


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


def serve(settings: SchedulerConfig, *, ready: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> None:
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


def _uvicorn(settings: SchedulerConfig, app: FastAPI) -> uvicorn.Config:
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


def _check_public(settings: SchedulerConfig, store: Store) -> None:
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
