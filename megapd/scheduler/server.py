"""The scheduler over HTTP: uvicorn, on the application of app.py.

No route opens a path: locations are text that runs and replicas understand. Folders are imported by `megapd trajectory import`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import threading
from collections.abc import Callable

import uvicorn

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.network import check_transport, is_loopback, server_address
from megapd.scheduler.app import build_app
from megapd.scheduler.service import Service
from megapd.scheduler.store import Store, tokens

log = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5  # for answers that are on their way


def serve(settings: SchedulerConfig, stop: threading.Event, *, ready: Callable[[int], None] = lambda port: None) -> None:
    """Answer until `stop` is set. ready: called with the port once requests are taken.

    Raises UserError where the database, the address or the TLS files cannot be used, or an address that other machines reach
    lacks tokens or TLS.
    """
    with contextlib.closing(Store(settings.database.reveal("scheduler.database"))) as store:
        if not is_loopback(settings.host):
            _check_public(settings, store)
        store.lock_service()
        with contextlib.closing(_listen(settings.host, settings.port)) as listening:
            port = listening.getsockname()[1]
            service = Service(store, settings)
            if service.authenticator.open():
                log.warning("no tokens: everybody on this machine may change schedules; `megapd scheduler token admin` ends that")
            _Server(service, stop, lambda: ready(port)).run(sockets=[listening])


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it takes requests, ends where `stop` says so, and ends event streams first."""

    def __init__(self, service: Service, stop: threading.Event, ready: Callable[[], None]) -> None:
        super().__init__(_uvicorn(service))
        self._service, self._stop, self._ready = service, stop, ready

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """None: `stop` is set by whoever takes the process's signals."""
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            # What is there now stays: a full collection that walks all of it stops every answer for 40 ms, each minute or so.
            gc.collect()
            gc.freeze()
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.stop()
        await super().shutdown(sockets)


def _uvicorn(service: Service) -> uvicorn.Config:
    settings = service.settings
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
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


def _check_public(settings: SchedulerConfig, store: Store) -> None:
    where = f"scheduler.host: {settings.host} is reached from other machines"
    scheme = "http" if settings.certificate is None else "https"
    fix = "set scheduler.certificate and scheduler.key"
    check_transport("scheduler", server_address(scheme, settings.host), token=True, insecure=settings.insecure, fix=fix)
    if not store.read(tokens.list_tokens):
        raise UserError(f"{where}, and there are no tokens; make one with `megapd scheduler token admin`, or listen on 127.0.0.1")


def _listen(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as failed:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            listening = failed.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError as error:
            where = f"scheduler.host, scheduler.port: cannot listen on {host}:{port}"
            raise UserError(f"{where}: {error.strerror or error}; choose others") from error
        failed.pop_all()
    return listening
