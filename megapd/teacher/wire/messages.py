"""Arrow streams as bytes: cut into what a call carries, and looked at before anything of them is decoded.

Questions, signals and heads travel in Flight's do_exchange, but not as its record batches: pyarrow decodes those, compressed
buffers included, before its caller sees anything, and a few KiB of zstd hold 1 GiB of zeros. So each is an Arrow stream in bytes
of a known number, and `read_stream` makes views of them.

    client  descriptor's command  KIND, 8 bytes, and the question: an Arrow stream (wire/requests.py), or JSON (wire/calls.py)
    server  metadata, repeated    8 bytes of the answer's length, little-endian, and the answer, an Arrow stream, in pieces
            or metadata, once     8 bytes of its length alone, where it lies in the client's memory

A call's command arrives after its token was checked. No message is longer than PIECE_BYTES and some, so that an answer may be
longer than the 2 GiB of a gRPC message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

import pyarrow as pa

from megapd.errors import SignalDamaged
from megapd.signals import NO_ARROW
from megapd.teacher.wire.refusals import MAX_ANSWER_BYTES

KIND_BYTES = 8  # a multiple of 8: what follows stays aligned
SIGNAL, HEAD = (name.ljust(KIND_BYTES) for name in (b"signal", b"head"))
PIECE_BYTES = 2 << 20  # of a message: 64 KiB ones cost a quarter more of the CPU, one of 6 MiB as much
MESSAGE_BYTES = 64 << 20  # of any message to a client: the trajectory's description is one
SMALL_BYTES = 64 << 10  # a buffer of fewer is copied together with its neighbours
ANSWER_BYTES = MAX_ANSWER_BYTES + (16 << 20)  # with schema, digests and checksums
LENGTH = struct.Struct("<Q")
Parts = list[bytes | pa.Buffer]


class _Sink:
    """A file that keeps what is written to it: of an Arrow stream, the record batches' own buffers."""

    closed = False

    def __init__(self) -> None:
        self.parts: Parts = []
        self.bytes = 0

    def write(self, data: bytes | pa.Buffer) -> int:
        self.parts.append(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...


def stream_parts(schema: pa.Schema, records: Iterable[pa.RecordBatch]) -> tuple[Parts, int]:
    """(an Arrow stream in parts, the record batches' buffers among them; its bytes): 36 us for one of 6 MiB."""
    sink = _Sink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as stream:
        for record in records:
            stream.write_batch(record)
    return sink.parts, sink.bytes


def stream_bytes(record: pa.RecordBatch) -> bytes:
    """An Arrow stream of one record batch."""
    return b"".join(stream_parts(record.schema, [record])[0])


def pieces(parts: Parts, length: int) -> Iterator[pa.Buffer]:
    """The messages of an answer of `length` bytes: small parts together, large ones cut."""
    held = [LENGTH.pack(length)]
    for part in parts:
        if len(part) < SMALL_BYTES:
            held.append(part)
            continue
        if held:
            yield pa.py_buffer(b"".join(held))
            held = []
        whole = pa.py_buffer(part)
        for start in range(0, whole.size, PIECE_BYTES):
            yield whole.slice(start, min(PIECE_BYTES, whole.size - start))
    if held:
        yield pa.py_buffer(b"".join(held))


def answer_length(message: pa.Buffer) -> tuple[int, pa.Buffer]:
    """(the answer's length, its first piece) by its first message. Raises SignalDamaged if there is none, or it is too long."""
    if message.size < LENGTH.size:
        raise SignalDamaged(f"the answer begins with {message.size} bytes, {LENGTH.size} name its length")
    (length,) = LENGTH.unpack_from(message)
    if not 0 < length <= ANSWER_BYTES:
        raise SignalDamaged(f"an answer of {length} bytes, {ANSWER_BYTES} at most")
    return length, message.slice(LENGTH.size)


def fill(view: memoryview, found: Iterable[pa.Buffer]) -> None:
    """Write all pieces of an answer into a view of its length. Raises SignalDamaged unless they fill it."""
    done = 0
    for piece in found:
        if piece.size > len(view) - done:
            raise SignalDamaged(f"the answer is longer than the {len(view)} bytes that it named")
        view[done : done + piece.size] = memoryview(piece).cast("B")
        done += piece.size
    if done < len(view):
        raise SignalDamaged(f"the answer ended after {done} of {len(view)} bytes")


def read_stream(buffer: pa.Buffer) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches, views; SignalDamaged if it is no Arrow stream, or has compressed buffers or a dictionary."""
    try:
        messages = pa.ipc.MessageReader.open_stream(buffer)
        opening = messages.read_next_message()
        if opening.type != "schema":  # in one of no known kind nothing was verified: read_schema would follow it
            raise SignalDamaged(f"not an Arrow stream: it begins with a message of type {opening.type}")
        schema = pa.ipc.read_schema(opening)
        records = []
        for message in messages:
            if message.type != "record batch" or _compressed(message.metadata):
                raise SignalDamaged("not an Arrow stream of plain record batches: a dictionary, or compressed buffers")
            records.append(pa.ipc.read_record_batch(message, schema))
    except (*NO_ARROW, StopIteration, struct.error) as error:
        raise SignalDamaged(f"not an Arrow stream: {' '.join(str(error).split()) or 'it ends early'}") from error
    return schema, records


def read_record(buffer: pa.Buffer) -> pa.RecordBatch:
    """The one record batch of an Arrow stream, as `read_stream` reads it."""
    _, records = read_stream(buffer)
    if len(records) != 1:
        raise SignalDamaged(f"an Arrow stream of {len(records)} record batches instead of one")
    return records[0]


def _compressed(metadata: pa.Buffer) -> bool:
    """Whether the header of a record batch says that its buffers are compressed (format/Message.fbs of Arrow, a flatbuffer)."""
    view = memoryview(metadata).cast("B")
    message = struct.unpack_from("<I", view)[0]
    header, own = _field(view, message, 2), _field(view, message, 4)
    # Its own metadata is where Arrow 0.17 told of compression, which readers still take.
    return own > 0 or bool(header and _field(view, header + struct.unpack_from("<I", view, header)[0], 3))


def _field(view: memoryview, table: int, number: int) -> int:
    """Where the field of that number of a flatbuffer's table lies; 0: it is absent."""
    slots = table - struct.unpack_from("<i", view, table)[0]
    size, place = struct.unpack_from("<H", view, slots)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", view, slots + place)[0] if place < size else 0
    return table + offset if offset else 0
