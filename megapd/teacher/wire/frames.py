"""The data port's protocol: Arrow streams in frames over one socket, plain or TLS, without a copy on the way.

Flight costs about 5 ms of CPU for a signal of 6 MiB on loopback, both ends together, a socket 2: it sends in small HTTP/2 frames,
and receives them into many buffers that are then put together. So signals have a port of their own beside Flight's, told by the
action `data`. A connection carries one question at a time:

    client  HELLO     {"format", "token"}                    once
    server  HELLO     {}, or REFUSED and the end
    client  QUESTION  Arrow stream of megapd.teacher.wire.requests's record batch
    server  RECORD    Arrow stream of megapd.signals.arrow's, or WRITTEN {"bytes"} where it lies in shared memory, or REFUSED

REFUSED holds what a refusal by Flight has in its extra information. Each frame begins with HEADER.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Iterator, Sequence

import pyarrow as pa

from megapd.signals.arrow import NO_ARROW
from megapd.signals.signal import SignalDamaged

FORMAT = "megapd-data/1"


HEADER = struct.Struct("<4sB3xQI")  # mark, kind, bytes that follow, crc32 of these three; little-endian


MARK = b"mgpd"


SMALL_BYTES = 64 << 10  # of every frame but QUESTION and RECORD


TLS_BYTES = 1 << 20  # that are sent between looks at the clock


CALL_BYTES = 1 << 30  # of one call of OpenSSL, whose lengths have 31 bits


_TIMEVAL = struct.Struct("@ll")


_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class Frame(enum.IntEnum):
    """What a frame holds."""

    HELLO = 1
    QUESTION = 2
    RECORD = 3
    WRITTEN = 4
    REFUSED = 5


def frame_header(kind: int, length: int) -> bytes:
    """What stands before a frame's `length` bytes."""
    head = HEADER.pack(MARK, kind, length, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


class Link:
    """Frames over a connected socket, for one thread at a time. Raises OSError where the connection fails or time runs out."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._end = float("inf")  # monotonic
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a peer whose machine is gone says nothing
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        if not self._tls:
            connection.setblocking(True)

    def within(self, seconds: float | None) -> None:
        """How long all that is read and written from now on may take; None: for ever."""
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    def _limit(self, seconds: float | None) -> None:
        if self._tls:
            self._socket.settimeout(seconds)
            return
        # By the kernel: a socket with a time-out of Python's is polled before every read, of which MSG_WAITALL needs one.
        whole = 0.0 if seconds is None else max(seconds, 1e-3)
        value = _TIMEVAL.pack(int(whole), int(whole % 1.0 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def write(self, kind: Frame, parts: Sequence[bytes | pa.Buffer]) -> None:
        """Send one frame, the parts one after the other."""
        views = [memoryview(part) for part in (frame_header(kind, sum(map(len, parts))), *parts)]
        with _timed():
            if self._tls:
                for view in views:
                    done = 0
                    while done < len(view):
                        self._go_on()
                        done += self._socket.send(view[done : done + TLS_BYTES])
                return
            while views:
                self._go_on()
                sent = self._socket.sendmsg(views)
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if views:
                    views[0] = views[0][sent:]

    def read(self, limit: int = SMALL_BYTES) -> tuple[Frame, int] | None:
        """(kind, bytes that follow) of the next frame, None where the peer has closed before it.

        Raises SignalDamaged for anything that is no frame, or a question or record of more bytes than `limit`.
        """
        head = bytearray(HEADER.size)
        if not self._fill(memoryview(head), at_end=True):
            return None
        mark, kind, length, checksum = HEADER.unpack(head)
        if mark != MARK or checksum != zlib.crc32(head[:-4]) or kind not in Frame.__members__.values():
            raise SignalDamaged("the data port: not a frame of megapd's")
        allowed = limit if kind in (Frame.QUESTION, Frame.RECORD) else SMALL_BYTES
        if length > allowed:
            raise SignalDamaged(f"the data port: a frame of {length} bytes, {allowed} at most")
        return Frame(kind), length

    def fill(self, view: memoryview) -> None:
        """Read bytes of a frame into all of `view`."""
        self._fill(view, at_end=False)

    def take(self, length: int) -> bytes:
        """Read bytes of a frame."""
        data = bytearray(length)
        self._fill(memoryview(data), at_end=False)
        return bytes(data)

    def gone(self) -> bool:
        """Whether a client that waits for an answer does so no longer: it has closed, or says something out of turn."""
        poll = select.poll()  # of its own: two threads ask, and one object polls once at a time
        try:
            poll.register(self._socket, select.POLLIN | select.POLLRDHUP)
        except ValueError:  # closed here
            return True
        return bool(poll.poll(0))

    def cancel(self) -> None:
        """End what another thread does with it."""
        with contextlib.suppress(OSError):  # closed by the peer already
            # Not the method of ssl's, which forgets TLS before it shuts down, so that another thread might send plain text.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _fill(self, view: memoryview, *, at_end: bool) -> bool:
        """False where the peer has closed before the first byte and `at_end` allows that."""
        done = 0
        with _timed():
            while done < len(view):
                self._go_on()
                flags = 0 if self._tls else socket.MSG_WAITALL
                here = self._socket.recv_into(view[done : done + CALL_BYTES], 0, flags)
                if not here:
                    if at_end and not done:
                        return False
                    raise ConnectionResetError("the connection was closed in the middle of a frame")
                done += here
        return True

    def _go_on(self) -> None:
        """The next call may take what is left of the time: a peer that moves a byte now and then gains nothing by it."""
        if self._end == float("inf"):
            self._limit(None)
            return
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._limit(left)


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    # The kernel's time-outs look like a socket that would block.
    try:
        yield
    except BlockingIOError as error:
        raise TimeoutError("timed out") from error


class _Parts:
    """A file that keeps what is written to it: of an Arrow stream, the record batch's own buffers."""

    closed = False

    def __init__(self) -> None:
        self.parts: list[bytes | pa.Buffer] = []
        self._bytes = 0

    def write(self, data: bytes | pa.Buffer) -> int:
        self.parts.append(data)
        self._bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...


def stream_parts(record: pa.RecordBatch) -> list[bytes | pa.Buffer]:
    """An Arrow stream of one record batch in pieces, its buffers among them (36 us for 6 MiB)."""
    sink = _Parts()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), record.schema) as stream:
        stream.write_batch(record)
    return sink.parts


def read_stream(buffer: pa.Buffer) -> pa.RecordBatch:
    """The one record batch of an Arrow stream, a view. Raises SignalDamaged if it is none."""
    try:
        return pa.ipc.open_stream(buffer).read_next_batch()
    except (*NO_ARROW, StopIteration) as error:
        raise SignalDamaged(f"not an Arrow stream: {' '.join(str(error).split()) or 'it ends early'}") from error
