"""A TCP proxy between students and a served teacher that damages, cuts and drops what passes through it."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Sequence

import psutil

LARGE = 1000  # bytes of a DATA frame that may be damaged: one that carries ids or values, not headers alone
HEADER_BYTES = 9  # of an HTTP/2 frame
PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


class Damage:
    """Flips one bit in the middle of each of the next `left` large DATA frames of one direction; thread-safe."""

    def __init__(self) -> None:
        self.left = 0
        self.done = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if self.left == 0:
                return False
            self.left, self.done = self.left - 1, self.done + 1
            return True


def http2(header: bytes) -> tuple[int, bool]:
    """(bytes that follow, whether they are data) by a frame's header (RFC 9113, section 4.1)."""
    return int.from_bytes(header[:3]), header[3] == 0


class _Frames:
    """Follows the HTTP/2 frames of one direction of a connection, which begins with `skip` bytes that are none."""

    def __init__(self, damage: Damage, skip: int) -> None:
        self._damage, self._skip = damage, skip
        self._header = bytearray()
        self._length = self._left = 0

    def through(self, data: bytearray) -> None:
        at = min(self._skip, len(data))
        self._skip -= at
        while at < len(data):
            if self._left == 0:
                taken = data[at : at + HEADER_BYTES - len(self._header)]
                self._header += taken
                at += len(taken)
                if len(self._header) == HEADER_BYTES:
                    self._length, self._is_data = http2(bytes(self._header))
                    self._left = self._length
                    self._header.clear()
                continue
            size = min(self._left, len(data) - at)
            passed, middle = self._length - self._left, self._length // 2
            if self._is_data and self._length >= LARGE and passed <= middle < passed + size and self._damage.take():
                data[at + middle - passed] ^= 1 << random.randrange(8)
            self._left -= size
            at += size


class Proxy:
    """Listens on a port of its own and passes everything on to `target`. answers, requests: damage to either direction."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.answers, self.requests = Damage(), Damage()
        self._dropped: set[int] = set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.port = 0
        self.mend()

    @property
    def connections(self) -> list[tuple[socket.socket, socket.socket]]:
        """Those that are open."""
        with self._lock:
            return [pair for pair in self._pairs if pair[0].fileno() >= 0]

    @property
    def endpoint(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def mend(self) -> None:
        """Pass everything on again."""
        self._dropped.clear()
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """As a teacher that died: connections are reset, new ones are refused."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
            self._listener.close()
            self._listener = None
        self._close(lambda peer: True)

    close = cut

    def drop(self, processes: Sequence[int]) -> None:
        """Close the connections of these processes, present and future; those of others go on."""
        self._dropped.update(processes)
        self._close(self._is_dropped)

    def _is_dropped(self, peer: int) -> bool:
        """Whether a socket of that local port belongs to a process that is dropped."""
        for number in self._dropped:
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(found.laddr and found.laddr.port == peer for found in psutil.Process(number).net_connections("tcp")):
                    return True
        return False

    def _close(self, chosen) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            try:
                peer = pair[0].getpeername()[1]
            except OSError:  # closed meanwhile
                continue
            if chosen(peer):
                _end(*pair)
            else:
                with self._lock:
                    self._pairs.append(pair)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, (_, peer) = listener.accept()
            except OSError:
                return
            try:
                if self._dropped and self._is_dropped(peer):
                    raise ConnectionAbortedError
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((client, server))
            for source, sink, damage, skip in ((client, server, self.requests, PREFACE), (server, client, self.answers, 0)):
                threading.Thread(target=_pump, args=(source, sink, _Frames(damage, skip)), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, frames: _Frames) -> None:
    try:
        while data := bytearray(source.recv(1 << 16)):
            frames.through(data)
            sink.sendall(data)
    except OSError:  # reset by either side, or cut
        pass
    finally:
        _end(source, sink)


def _end(*sockets: socket.socket) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
        each.close()
