"""The client's end of the data port: connections to one replica, each kept for the next question."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pyarrow as pa

from megapd.config import TeacherConfig
from megapd.errors import UserError
from megapd.signals.signal import SignalDamaged
from megapd.teacher.wire.calls import parse_json
from megapd.teacher.wire.frames import FORMAT, Frame, Link
from megapd.teacher.wire.refusals import MAX_ANSWER_BYTES, Refused, parse_refusal

log = logging.getLogger(__name__)


CONNECT_SECONDS = 5.0


AGAIN_SECONDS = 30.0  # before a data port that could not be reached is tried once more


ANSWER_BYTES = MAX_ANSWER_BYTES + (16 << 20)  # with schema, digests and checksums


class HandshakeFailed(OSError):
    """A certificate that either end does not take."""


class Connections:
    """To the data port of one replica; thread-safe. A connection is used by one thread at a time."""

    def __init__(self, address: str, token: str | None, tls: ssl.SSLContext | None, *, allowed: bool) -> None:
        """address: grpc://HOST:PORT of the replica. tls: for grpc+tls://. allowed: False: signals go over Flight."""
        self._host = urlsplit(address).hostname or ""
        self._address, self._token, self._tls = address, token, tls
        self._idle: list[Link] = []
        self._port: int | None = None
        self._allowed = allowed
        self._again = float("-inf")  # monotonic; from when on the port is to be asked for
        self._warned = False
        self._lock = threading.Lock()

    def take(self, ask: Callable[[], bytes], seconds: float) -> Link | None:
        """A connection for one question; None where signals go over Flight. ask: the answer to the action `data`.

        Raises OSError, Refused, SignalDamaged, or what `ask` raises.
        """
        if not self._allowed:
            return None
        with self._lock:
            while self._idle:
                link = self._idle.pop()
                if not link.gone():  # closed by a teacher that ended, or with bytes that nobody asked for
                    return link
                link.close()
            if time.monotonic() > self._again:  # others wait: they need it too
                self._port, self._again = _port(ask), float("inf")
            port = self._port
        return None if port is None else self._connect(port, min(seconds, CONNECT_SECONDS))

    def give(self, link: Link) -> None:
        """Back, after a question that was answered."""
        with self._lock:
            self._idle.append(link)

    def forget(self) -> None:
        """The replica may have become another process: its port is asked for again."""
        with self._lock:
            idle, self._idle, self._again = self._idle, [], float("-inf")
        for link in idle:
            link.close()

    def _connect(self, port: int, seconds: float) -> Link | None:
        """None, and none for a while, where the port is closed to us."""
        try:
            return self._open(port, seconds)
        except HandshakeFailed:
            raise
        except OSError as error:
            if isinstance(error, TimeoutError) and seconds < CONNECT_SECONDS:
                raise  # the caller's time, which was short
            with self._lock:
                told, self._warned = self._warned, True
                self._port, self._again = None, time.monotonic() + AGAIN_SECONDS
            if not told:
                log.warning(
                    "%s: its data port %d cannot be reached (%s); signals travel over Flight, which is slower. Let the port "
                    "through, or set teacher.server.data_port to null there",
                    self._address,
                    port,
                    error.strerror or error,
                )
            return None

    def _open(self, port: int, seconds: float) -> Link:
        connection = socket.create_connection((self._host, port), seconds)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_hostname=self._host)
            link = Link(connection)
            self._greet(link, seconds)
        except ssl.SSLError as error:
            connection.close()
            raise HandshakeFailed(f"the TLS handshake failed: {error}") from error
        except BaseException:
            connection.close()
            raise
        return link

    def _greet(self, link: Link, seconds: float) -> None:
        link.within(seconds)
        link.write(Frame.HELLO, [json.dumps({"format": FORMAT, "token": self._token}).encode()])
        _, length = _answer(link, Frame.HELLO)
        link.take(length)


def ask(link: Link, question: list[bytes | pa.Buffer], seconds: float) -> tuple[Frame, int]:
    """Send a question; the kind of the answer, RECORD or WRITTEN, and its bytes, which are yet to be read. Raises Refused."""
    link.within(seconds)
    link.write(Frame.QUESTION, question)
    return _answer(link, Frame.RECORD, Frame.WRITTEN)


def _answer(link: Link, *wanted: Frame) -> tuple[Frame, int]:
    """The next frame, one of those wanted. Raises Refused, SignalDamaged, ConnectionResetError."""
    frame = link.read(ANSWER_BYTES)
    if frame is None:
        raise ConnectionResetError("the teacher closed the connection before it answered")
    kind, length = frame
    if kind is Frame.REFUSED:
        raise parse_refusal(link.take(length)) or SignalDamaged("the data port: a refusal that says nothing")
    if kind not in wanted:
        raise SignalDamaged(f"the data port: {kind.name} where {' or '.join(each.name for each in wanted)} belongs")
    return frame


def client_context(config: TeacherConfig) -> ssl.SSLContext:
    """Of grpc+tls:// replicas. Raises UserError where a certificate cannot be used."""
    try:
        context = ssl.create_default_context(cafile=config.root_certificate)
        if config.certificate is not None:
            context.load_cert_chain(config.certificate, config.key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"teacher.root_certificate, teacher.certificate, teacher.key: they cannot be used: {error}") from error
    return context


def _port(ask: Callable[[], bytes]) -> int | None:
    try:
        port = parse_json(ask()).get("port")
    except Refused as error:
        if error.kind == "invalid":  # a server of before there was one
            return None
        raise
    if port is not None and not (type(port) is int and 0 < port < 1 << 16):
        raise SignalDamaged(f"data: {port!r} is no port")
    return port
