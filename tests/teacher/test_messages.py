"""What travels between students and teachers: damage, bombs, cuts, peers that are none, and what is longer than a message."""

import contextlib
import errno
import json
import mmap
import socket
import struct
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapd.errors import SignalDamaged, TeacherLost
from megapd.signals import decode, encode
from megapd.teacher.client.probe import PREFACE
from megapd.teacher.client.served import WORKERS
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.wire.messages import (
    ANSWER_BYTES,
    HEAD,
    LENGTH,
    MESSAGE_BYTES,
    SIGNAL,
    _field,
    pieces,
    read_record,
    read_stream,
    stream_bytes,
    stream_parts,
)
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import decode_request, encode_request
from megapd.teacher.wire.shared_memory import Slot
from tests.teacher.proxy import Proxy
from tests.teacher.serving import (
    CLASSES,
    DENSE,
    DIGESTS,
    SPECS,
    FakeReplica,
    act,
    answer,
    exchange,
    make_batch,
    queued,
    refused,
    run_through,
    same,
    served,
    stream_of,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_soon")]

QUESTION = encode_request(20, DIGESTS[20], DENSE, make_batch(0))
GIBIBYTE = 1 << 30


@pytest.fixture
def still_there(server):
    """The module's server answers at the end."""
    yield server
    with stream_of(server) as stream:
        batch = make_batch(1)
        (found,) = stream.signals(0, [batch])
        assert same(found, server.replica.expected(10, batch, DENSE))
        assert stream.counts["retries"] == 0


# ------------------------------------------------------------------------------------------------------------- damage


def test_flipped_bits_and_cut_connections():
    with served() as server, contextlib.closing(Proxy(server.port)) as proxy, stream_of(proxy.endpoint) as stream:
        for number, _ in enumerate(run_through(stream, server.replica)):
            if number == 2:
                assert 1 <= len(proxy.connections) <= WORKERS
            if number == 4:
                proxy.answers.left, proxy.requests.left = 3, 1
            if number == 10:
                proxy.cut()
                proxy.mend()
        assert (proxy.answers.done, proxy.requests.done) == (3, 1)
        assert stream.counts["retries"] >= 4
        assert stream.counts["lost"] == 0


def test_one_question_after_the_other_also_after_refusals(client, still_there):
    batch = make_batch(0)
    for _ in range(3):
        found = decode(exchange(client, QUESTION), DENSE, DIGESTS[20], batch)
        assert same(found, still_there.replica.expected(20, batch, DENSE))
        with refused("invalid", "not an Arrow stream"):
            exchange(client, SIGNAL + b"no arrow stream")
        with refused("wrong_teacher", "digest"):
            exchange(client, encode_request(20, DIGESTS[10], DENSE, batch))


def test_another_version_is_told_so(client):
    with refused("invalid", "different versions"):
        exchange(client, b"signal")
    with refused("invalid", "different versions"):
        exchange(client, QUESTION.replace_schema_metadata({**QUESTION.schema.metadata, b"format": b"megapd-request/9"}))
    with refused("invalid", "JSON"):
        exchange(client, HEAD + b"[]")


# -------------------------------------------------------------------------------------------------- sizes, compression


def compressed(record, codec="zstd"):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
        stream.write_batch(record)
    return sink.getvalue()


@pytest.fixture(scope="module")
def bomb():
    """A record batch of 1 GiB of zeros, and the few KiB that it takes as a stream."""
    record = pa.record_batch([pa.array(np.zeros(GIBIBYTE, np.uint8))], names=["values"])
    stream = compressed(record)
    assert stream.size < 1 << 20
    return record, stream


@contextlib.contextmanager
def without_much_memory():
    """The block takes less than 256 MiB of this process's memory, at its peak."""

    def peak(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = peak("VmRSS")
    yield
    assert peak("VmHWM") - before < 256 << 20


def test_a_compressed_question_is_refused_before_it_is_decoded(client, bomb, still_there):
    with without_much_memory(), refused("invalid", "compressed"):
        exchange(client, SIGNAL + bomb[1].to_pybytes())
    for codec in ("zstd", "lz4"):
        with refused("invalid", "compressed"):
            exchange(client, SIGNAL + compressed(QUESTION, codec).to_pybytes())
    assert exchange(client, QUESTION).num_rows == 3


def test_compression_as_old_arrow_tells_it_is_refused():
    """Of a record batch's own metadata, which readers look at too: a batch that has any is not taken."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, QUESTION.schema) as stream:
        stream.write_batch(QUESTION, custom_metadata={"ARROW:experimental_compression": "zstd"})
    with pytest.raises(SignalDamaged, match="compressed"):
        read_record(sink.getvalue())
    words = pa.record_batch({"x": pa.array(["a", "b"]).dictionary_encode()})
    with pytest.raises(SignalDamaged, match="dictionary"):
        read_record(compressed(words, None))


def test_a_question_that_is_too_long_is_refused_before_it_is_decoded(client, monkeypatch, still_there):
    monkeypatch.setattr("megapd.teacher.wire.requests.QUESTION_BYTES", 100)
    monkeypatch.setattr("megapd.teacher.wire.requests.read_record", lambda _: pytest.fail("it is decoded"))
    with refused("invalid", "100 at most; lower the micro-batch"):
        exchange(client, QUESTION)
    monkeypatch.undo()
    assert len(stream_bytes(QUESTION)) > 100


def test_an_answer_beyond_a_message_is_cut(still_there, client, monkeypatch):
    """One sample alone may be: 64k positions of 50k classes in bf16 are 6 GiB."""
    monkeypatch.setattr("megapd.teacher.wire.messages.PIECE_BYTES", 100)
    monkeypatch.setattr("megapd.teacher.wire.messages.SMALL_BYTES", 50)
    batch = make_batch(0, samples=1)
    assert 160 * batch.labelled > 400
    with stream_of(still_there) as stream:
        assert same(stream.signals(4, [batch])[0], still_there.replica.expected(20, batch, DENSE))
    with stream_of(still_there, spec=SPECS["hidden"]) as stream:
        assert stream.signals(4, [batch])[0].head.weight.shape[0] == CLASSES


@pytest.mark.parametrize("labelled", [0, 1, 2000, 9000])
def test_pieces_are_the_stream(labelled):
    record = pa.record_batch({"a": pa.array(np.arange(labelled, dtype=np.float64)), "b": pa.array([0] * labelled, pa.int8())})
    whole = stream_bytes(record)
    found = list(pieces(*stream_parts(record.schema, [record])))
    assert b"".join(piece.to_pybytes() for piece in found) == LENGTH.pack(len(whole)) + whole
    assert read_record(pa.py_buffer(whole)).equals(record)


# --------------------------------------------------------------------------------------------- teachers that are none


class Broken(TeacherFlight):
    """Its first answer, or the writer's whole turn, is what the test says."""

    answers: ClassVar[list] = []

    def do_exchange(self, context, descriptor, reader, writer):
        if not self.answers:
            return super().do_exchange(context, descriptor, reader, writer)
        answer = self.answers.pop()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, pa.RecordBatch):
            writer.begin(answer.schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
            writer.write_batch(answer)
            return None
        for message in answer:
            writer.write_metadata(pa.py_buffer(message))
        return None


GOOD = stream_bytes(encode(FakeReplica().expected(10, make_batch(0), DENSE), make_batch(0), CLASSES))


def extra(text):
    return flight.FlightServerError("no", text)


@pytest.mark.parametrize(
    "broken",
    [
        [b"HTTP/1.1 400 Bad Request\r\n\r\nabcdefgh"],
        [LENGTH.pack(ANSWER_BYTES + 1)],
        [LENGTH.pack(1 << 60) + GOOD],
        [b"{}"],
        [LENGTH.pack(40) + b"no arrow stream" + b"x" * 25],
        [LENGTH.pack(0)],
        [LENGTH.pack(1000) + b"ends early"],
        [LENGTH.pack(len(GOOD)) + GOOD[:-100]],
        [LENGTH.pack(len(GOOD)) + GOOD, b"and more"],
        [LENGTH.pack(len(GOOD)) + bytes([GOOD[0] ^ 1]) + GOOD[1:]],
        [LENGTH.pack(5), b"", b"12345"],
        [],
        [b""],
        [bytes(MESSAGE_BYTES + 1)],
        QUESTION,
        extra(b"{}"),
        extra(b'{"kind": "small", "message": "", "needed": 1e400}'),
        extra(b'{"kind": [], "message": ""}'),
        extra(b"[" * 5000),
        extra(b""),
    ],
    ids=[
        *("http", "long", "huge", "short-json", "garbage", "empty", "early", "cut", "more", "bit", "no-stream", "nothing"),
        *("no-bytes", "message", "record", "no-refusal", "needed", "kind", "deep", "no-extra"),
    ],
)
def test_what_a_broken_server_answers_is_asked_for_again(broken, monkeypatch, shared_memory):
    monkeypatch.setattr(Broken, "answers", [broken])
    with served(flight_class=Broken) as server, stream_of(server, shared_memory=shared_memory) as stream:
        batch = make_batch(0)
        (found,) = stream.signals(0, [batch])
        assert same(found, server.replica.expected(10, batch, DENSE))
        assert stream.counts["retries"] >= 1


@pytest.mark.parametrize("form", ["record", "bytes", "memory"])
def test_a_compressed_answer_is_not_decoded(bomb, form, monkeypatch):
    """Neither as a record batch of Flight's, nor in the bytes that a signal's record is."""
    record, stream = bomb
    answers = {"record": [record], "bytes": [[LENGTH.pack(stream.size) + stream.to_pybytes()]], "memory": []}
    monkeypatch.setattr(Broken, "answers", answers[form])
    put = [stream] if form == "memory" else []
    monkeypatch.setattr("megapd.teacher.server.flight.write", lambda made, memory: _write(put.pop() if put else made, memory))
    with served(flight_class=Broken) as server, stream_of(server, shared_memory=form == "memory") as asked:
        batch = make_batch(0)
        with without_much_memory():
            asked.request(0, [batch])
            wait_for(lambda: asked.counts["damaged"] == 1)
            assert same(asked.signals(0, [batch])[0], server.replica.expected(10, batch, DENSE))


def _write(made, memory):
    stream = made if isinstance(made, pa.Buffer) else pa.py_buffer(stream_bytes(made))
    memoryview(memory).cast("B")[: stream.size] = memoryview(stream).cast("B")
    return stream.size


# --------------------------------------------------------------------------------------------------- slow, silent, gone


class Dripping(TeacherFlight):
    """Sends a byte of its answer now and then."""

    def do_exchange(self, context, descriptor, reader, writer):
        writer.write_metadata(pa.py_buffer(LENGTH.pack(1000)))
        while not context.is_cancelled():
            writer.write_metadata(pa.py_buffer(b"x"))
            time.sleep(0.02)


def test_a_teacher_that_sends_a_little_now_and_then_gains_no_time():
    with served(flight_class=Dripping) as server:
        own = ("--teacher.call_seconds=0.3", "--teacher.deadline_seconds=1")
        with stream_of(server, overrides=own) as stream:
            start = time.monotonic()
            with pytest.raises(TeacherLost, match="in time"):
                stream.signals(0, [make_batch(0)])
            assert stream.counts["requests"] >= 2
            assert time.monotonic() - start < 5


def test_slow_and_silent_peers_keep_nobody_waiting():
    """Nor the end: `served` waits for it."""
    with served() as server, contextlib.ExitStack() as stack:
        for sent in (b"", PREFACE[:10], PREFACE, PREFACE + frame(0, 1, 5000)[:9] + b"x" * 10):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 5))
            peer.sendall(sent)
        with stream_of(server) as stream:
            assert len(list(run_through(stream, server.replica, steps=range(2)))) == 4
            assert stream.counts["retries"] == 0


def frame(kind, flags, length, number=1):
    """An HTTP/2 frame's header."""
    return (length & 0xFFFFFF).to_bytes(3) + struct.pack(">BBI", kind, flags, number)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.integers(0, 255),
    flags=st.integers(0, 255),
    length=st.integers(0, 100) | st.integers(0, (1 << 24) - 1),
    number=st.integers(0, (1 << 32) - 1),
    body=st.binary(max_size=100),
    greeted=st.booleans(),
)
def test_whatever_is_sent_the_next_one_is_answered(still_there, kind, flags, length, number, body, greeted):
    """`still_there` asks for a signal at the end."""
    with socket.create_connection(("127.0.0.1", still_there.port), 5) as peer:
        try:
            peer.sendall((PREFACE if greeted else b"") + frame(kind, flags, length, number) + body)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass
        except OSError as error:  # closed by the server, while this end was still sending
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise


def test_a_client_that_went_is_noticed_and_its_question_forgotten(monkeypatch):
    monkeypatch.setattr("megapd.teacher.server.flight.GONE_SECONDS", 0.05)
    replica = FakeReplica()
    with served(replica) as server, stream_of(server) as stream, flight.FlightClient(server.address) as client:
        replica.gate.clear()
        first = threading.Thread(target=_left, args=(client, QUESTION), daemon=True)
        first.start()
        wait_for(lambda: replica.entered == 1)
        second = threading.Thread(target=_left, args=(client, encode_request(20, DIGESTS[20], DENSE, make_batch(5))), daemon=True)
        second.start()
        wait_for(lambda: queued(stream) == 1)
        wait_for(lambda: queued(stream) == 0)
        replica.gate.set()
        assert len(list(run_through(stream, replica, steps=range(1)))) == 2
        assert replica.asked[0] == (20, 3)
        assert all(step == 10 for step, _ in replica.asked[1:])
        first.join(5)
        second.join(5)


def _left(client, question):
    with contextlib.suppress(flight.FlightTimedOutError):
        answer(client, question, seconds=1.0)


@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_does_not_grow_keeps_its_size(shared, monkeypatch):
    slot = Slot(1 << 20, shared)

    def fail(*_, **__):
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(OSError, match="no memory"):
        slot.grow(8 << 20)
    assert slot.size == 1 << 20
    assert len(slot.writable(slot.size)) == slot.size


def test_actions_tell_no_port_of_signals_any_more(client):
    with refused("invalid", "there are trajectory, prepare, health, capacity"):
        act(client, "data")


def test_damaged_bytes_are_no_request():
    for data in (b"", b"x", stream_bytes(QUESTION)[:-200], json.dumps({}).encode()):
        with pytest.raises(Refused, match="not an Arrow stream"):
            decode_request(pa.py_buffer(data))


@pytest.mark.parametrize("kind", [0, 9])
def test_a_message_of_no_kind_where_the_schema_belongs_is_no_stream(kind):
    """Arrow verifies nothing below a kind that it does not know, and pyarrow's read_schema follows what stands there."""
    stream = bytearray(stream_bytes(QUESTION))
    flatbuffer = memoryview(stream)[8:]  # after the mark and the length

    def points_to(place):
        return place + struct.unpack_from("<I", flatbuffer, place)[0]

    message = points_to(0)
    flatbuffer[_field(flatbuffer, message, 1)] = kind
    columns = _field(flatbuffer, points_to(_field(flatbuffer, message, 2)), 1)
    struct.pack_into("<I", flatbuffer, columns, 0x7FFFFF00)
    with pytest.raises(SignalDamaged, match="it begins with a message of type unknown"):
        read_stream(pa.py_buffer(bytes(stream)))
    with pytest.raises(Refused, match="not an Arrow stream"):
        decode_request(pa.py_buffer(bytes(stream)))
