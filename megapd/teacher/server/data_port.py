"""The server's end of the data port: connections that ask for signals, a thread each. wire/frames.py has the protocol."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable

import pyarrow as pa

from megapd.config import TeacherServerConfig
from megapd.errors import UserError
from megapd.signals.signal import SignalDamaged
from megapd.teacher.wire.calls import parse_json
from megapd.teacher.wire.frames import FORMAT, Frame, Link, read_stream, stream_parts
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import MAX_BYTES
from megapd.teacher.wire.secrets import check_token

log = logging.getLogger(__name__)


HELLO_SECONDS = 10.0  # that a client may take to say who it is, TLS included


FRAME_SECONDS = 60.0  # that a frame may take on its way, once begun


STRANGERS = 128  # connections that have not said who they are


CONNECTIONS = 1024  # others at once; a rank of a student has at most megapd.teacher.client.served.WORKERS


QUESTION_BYTES = MAX_BYTES + (1 << 20)  # with its schema


# A question's record batch, and whether its client has gone: the answer, or its bytes in the client's memory. Raises Refused.
Answer = Callable[[pa.RecordBatch, Callable[[], bool]], pa.RecordBatch | int]


class DataPort:
    """Listens from its construction on; `close` ends it. port: the one it has."""

    def __init__(self, options: TeacherServerConfig, answer: Answer, token: bytes | None, refused: Callable[[str], None]) -> None:
        """token: what clients must show. refused: told the kind of each refusal before a question. UserError where it cannot
        listen, or TLS cannot be set up."""
        self._answer, self._token, self._refused = answer, token, refused
        self._tls = _context(options)
        self._links: set[Link] = set()
        self._strangers = 0
        self._busy = 0  # connections with a question that is not answered
        self._changed = threading.Condition()
        self._closed = False
        assert options.data_port is not None
        both = options.host == "::" and socket.has_dualstack_ipv6()
        try:
            family = socket.getaddrinfo(options.host, options.data_port, type=socket.SOCK_STREAM)[0][0]
            place = options.host, options.data_port
            self._listener = socket.create_server(place, family=family, backlog=128, dualstack_ipv6=both)
        except OSError as error:
            raise UserError(
                f"teacher.server.data_port: cannot listen on {options.host}:{options.data_port}, {error.strerror}; choose another"
            ) from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="teacher-data", daemon=True).start()

    def close(self, seconds: float) -> None:
        """No new connections; answers under way are waited for at most `seconds`, then all connections end."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._listener.close()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy, seconds):
                log.warning("%d answers were still being sent after %g s", self._busy, seconds)
            for link in self._links:
                link.cancel()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:  # out of descriptors, for one
                    log.warning("the data port took no connection: %s", error)
                    time.sleep(0.1)
                continue
            if self._strangers >= STRANGERS or len(self._links) >= CONNECTIONS:
                connection.close()  # the client takes the signal over Flight
                continue
            with self._changed:
                self._strangers += 1
            try:
                threading.Thread(target=self._serve, args=(connection,), name="teacher-data", daemon=True).start()
            except RuntimeError as error:  # the system has no more threads
                log.warning("the data port took no connection: %s", error)
                connection.close()
                with self._changed:
                    self._strangers -= 1

    def _serve(self, connection: socket.socket) -> None:
        link, stranger = None, True
        try:
            connection.settimeout(HELLO_SECONDS)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            link = Link(connection)
            if self._greet(link):
                with self._changed:
                    self._strangers, stranger = self._strangers - 1, False
                    self._links.add(link)
                self._converse(link)
        except (OSError, SignalDamaged) as error:
            log.debug("a connection to the data port ended: %s", error)
        except Exception:
            log.exception("a connection to the data port failed")
        finally:
            connection.close()
            with self._changed:
                self._strangers -= stranger
                if link is not None:
                    self._links.discard(link)

    def _greet(self, link: Link) -> bool:
        """Whether the client may ask."""
        link.within(HELLO_SECONDS)
        frame = link.read()
        if frame is None:
            return False
        try:
            if frame[0] is not Frame.HELLO:
                raise Refused("invalid", "the data port: a connection begins with HELLO")
            hello = parse_json(link.take(frame[1]))
            given = hello.get("token")
            # Before anything else is told.
            if self._token is not None:
                check_token(str(given).encode("utf-8", "replace"), self._token)
            if hello.get("format") != FORMAT:
                text = f"the data port: the format is not {FORMAT}; student and teacher run different versions of megapd"
                raise Refused("invalid", text)
        except Refused as error:
            self._refused(error.kind)
            link.write(Frame.REFUSED, [error.as_json()])
            return False
        link.write(Frame.HELLO, [b"{}"])
        return True

    def _converse(self, link: Link) -> None:
        """Answer one question after the other, until the client has no more."""
        while True:
            link.within(None)
            frame = link.read(QUESTION_BYTES)
            if frame is None or self._closed:
                return
            with self._changed:
                self._busy += 1
            try:
                self._reply(link, *frame)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _reply(self, link: Link, kind: Frame, length: int) -> None:
        link.within(FRAME_SECONDS)
        if kind is not Frame.QUESTION:
            raise SignalDamaged(f"the data port: {kind.name} where a question belongs")
        question = pa.allocate_buffer(length)
        link.fill(memoryview(question).cast("B"))
        kind, parts = self._found(question, link)
        link.within(FRAME_SECONDS)
        link.write(kind, parts)

    def _found(self, question: pa.Buffer, link: Link) -> tuple[Frame, list[bytes | pa.Buffer]]:
        try:
            found = self._answer(_read(question), link.gone)
        except Refused as error:
            return Frame.REFUSED, [error.as_json()]
        if isinstance(found, int):
            return Frame.WRITTEN, [b'{"bytes": %d}' % found]
        return Frame.RECORD, stream_parts(found)


def _read(question: pa.Buffer) -> pa.RecordBatch:
    try:
        return read_stream(question)
    except SignalDamaged as error:
        raise Refused("invalid", f"request: no record batch: {error}") from error


def _context(options: TeacherServerConfig) -> ssl.SSLContext | None:
    if options.certificate is None or options.key is None:
        return None
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(options.certificate, options.key)
        if options.client_authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(options.client_authority)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"teacher.server: certificate, key or client_authority cannot be used: {error}") from error
    return context
