"""`serve`: one replica of the teacher behind its Flight service, until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

import pyarrow as pa
import pyarrow.flight as flight

from megapd.config import Config, TeacherServerConfig
from megapd.errors import UserError
from megapd.interrupts import until_signalled
from megapd.network import check_transport, is_loopback, read_secret, server_address
from megapd.scheduler.client.lease import ReplicaLease, advertised
from megapd.teacher.server.dispatch import Dispatcher, Replica
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.server.metrics import Metrics, MetricsServer
from megapd.teacher.wire.secrets import read_bearer

TELL_SECONDS = 10.0
log = logging.getLogger(__name__)


def serve(
    config: Config,
    replica: Replica,
    *,
    ready: Callable[[int], None] | None = None,
    told: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    flight_class: type[TeacherFlight] = TeacherFlight,
) -> None:
    """Answer for `replica` until SIGTERM, SIGINT or `stop`, then drain: at most teacher.server.drain_seconds for what is queued.

    With scheduler.url the replica holds a lease, given back after the drain, which begins when students were sent elsewhere.
    The calling thread is the engine's: the only one that calls replica.signal, head and idle. ready: called with the port once
    requests are taken; told: from another thread each TELL_SECONDS, and at the end, with the tokens answered. Raises UserError
    where a setting or a file it names cannot be used. The replica is left open.
    """
    if config.teacher is None:
        raise UserError("teacher: the configuration has no such section; name teacher.trajectory, whose checkpoints are served")
    options = config.teacher.server
    token = read_bearer(config.teacher.token)
    if token is None and not is_loopback(options.host):
        needed = f"teacher.server.host {options.host} is reached from other machines, so a token is needed"
        raise UserError(f"teacher.token: {needed}; name a file that holds one, or listen on 127.0.0.1")
    scheme = "grpc" if options.certificate is None else "grpc+tls"
    location = server_address(scheme, options.host, options.port)
    fix = "set teacher.server.certificate and teacher.server.key"
    check_transport("teacher", location, token=token is not None, insecure=config.teacher.insecure, fix=fix)
    stop = threading.Event() if stop is None else stop
    metrics = Metrics()
    dispatcher = Dispatcher(replica, metrics, limit=options.queue, token_budget=options.token_budget)
    with contextlib.ExitStack() as stack:
        if options.metrics_port is not None:
            shown = MetricsServer(metrics, options.host, options.metrics_port, lambda: dispatcher.draining)
            stack.callback(shown.close)
        server = _listen(location, options, dispatcher, token, flight_class)
        stack.callback(_shut, server, options.drain_seconds)
        stack.enter_context(until_signalled(stop))
        pa.array([0]).to_numpy()  # imports pandas, up to 1 s that the first requests would wait for
        log.info("teacher listens on %s:%d", options.host, server.port)
        if config.scheduler.url is not None:
            stop = _drained(stop, stack.enter_context(_lease(config, server.port, dispatcher)))
        if ready is not None:
            ready(server.port)
        if told is not None:
            stack.callback(_telling(metrics, told))
        dispatcher.run(stop, options.drain_seconds)


def _telling(metrics: Metrics, told: Callable[[int], None]) -> Callable[[], None]:
    """Tell the tokens answered until what is returned is called, and then once more."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(TELL_SECONDS):
            told(metrics.answered)
        told(metrics.answered)

    thread = threading.Thread(target=tell, name="teacher-tells", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()

    return end


def _lease(config: Config, port: int, dispatcher: Dispatcher) -> ReplicaLease:
    teacher = config.teacher
    assert teacher is not None
    facts = {"trajectory": teacher.trajectory, "sharding": teacher.sharding, "ranks": teacher.server.ranks, "pid": os.getpid()}

    def figures() -> dict[str, float]:
        return {"tokens_per_second": dispatcher.tokens_per_second, "queued": float(dispatcher.queued)}

    endpoint = advertised(teacher.server, port)
    return ReplicaLease(config.scheduler, config.scheduler.group or config.name, endpoint, facts, figures)


def _drained(stop: threading.Event, lease: ReplicaLease) -> threading.Event:
    """Set when, after `stop`, the scheduler was told: meanwhile the engine answers on."""
    told = threading.Event()

    def tell() -> None:
        stop.wait()
        try:
            lease.drain()
        finally:
            told.set()

    threading.Thread(target=tell, name="teacher-drain", daemon=True).start()
    return told


def _listen(
    location: str, options: TeacherServerConfig, dispatcher: Dispatcher, token: bytes | None, cls: type[TeacherFlight]
) -> TeacherFlight:
    tls = client_authority = None
    if options.certificate is not None and options.key is not None:
        certificate = read_secret(options.certificate, "teacher.server.certificate")
        tls = certificate, read_secret(options.key, "teacher.server.key")
    if options.client_authority is not None:
        client_authority = read_secret(options.client_authority, "teacher.server.client_authority")
    try:
        _check_free(options.host, options.port)
        return cls(location, dispatcher, token=token, tls=tls, client_authority=client_authority)
    except (OSError, pa.ArrowException, flight.FlightError) as error:
        failed = f"cannot listen on {options.host}:{options.port}: {' '.join(str(error).split())}"
        raise UserError(f"teacher.server: {failed}; choose another host or port, and check certificate and key") from error


def _check_free(host: str, port: int) -> None:
    """gRPC shares a port with whoever listens on it already, so that two teachers would answer in turns: OSError instead."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _shut(server: TeacherFlight, seconds: float) -> None:
    """Flight waits without end for calls that are still being sent, so it is given a thread and not waited for longer."""
    closing = threading.Thread(target=server.shutdown, name="teacher-shutdown", daemon=True)
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        log.warning("some answers were still being sent after %g s", seconds)
