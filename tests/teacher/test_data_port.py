"""The data port: who may ask, what damages it, and the way without it."""

import contextlib
import errno
import json
import logging
import mmap
import socket
import threading
import time
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapd.signals.arrow import decode
from megapd.signals.signal import SignalDamaged
from megapd.teacher.client.connections import Connections, ask
from megapd.teacher.client.served import WORKERS
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.wire.frames import FORMAT, Frame, Link, frame_header, read_stream, stream_parts
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import encode_request
from megapd.teacher.wire.shared_memory import Slot
from tests.teacher.proxy import Proxy
from tests.teacher.serving import (
    DENSE,
    DIGESTS,
    PLAN,
    TOKEN,
    FakeReplica,
    make_batch,
    queued,
    run_through,
    same,
    served,
    stream_of,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("_soon")

QUESTION = stream_parts(encode_request(20, DIGESTS[20], DENSE, make_batch(0)))
HELLO = json.dumps({"format": FORMAT, "token": None}).encode()


class Told(TeacherFlight):
    """Tells another data port than there is: that of `proxy`, made for it."""

    proxy: Proxy
    made: ClassVar[list[TeacherFlight]] = []

    def __setattr__(self, name, value):
        if name == "data_port" and value is not None:
            self.proxy = Proxy(value, flight=False)
            Told.made.append(self)
            value = self.proxy.port
        super().__setattr__(name, value)


def port_of(stream):
    """The data port of the stream's replica."""
    (remote,) = stream._replicas.current()
    return json.loads(remote.action("data", b"", 5))["port"]


@pytest.fixture
def port(server):
    """Of the module's server, which answers at the end."""
    with stream_of(server) as stream:
        yield port_of(stream)
        batch = make_batch(1)
        (found,) = stream.signals(0, [batch])
        assert same(found, server.replica.expected(10, batch, DENSE))
        assert stream.counts["retries"] == 0


@contextlib.contextmanager
def connected(port, hello=HELLO):
    """A link on which HELLO was answered."""
    with contextlib.closing(Link(socket.create_connection(("127.0.0.1", port), 5))) as link:
        link.within(5)
        link.write(Frame.HELLO, [hello])
        frame = link.read()
        assert frame is not None
        body = link.take(frame[1])
        if frame[0] is Frame.REFUSED:
            raise Refused(json.loads(body)["kind"], json.loads(body)["message"])
        yield link


# ---------------------------------------------------------------------------------------------------- the usual way


def test_signals_travel_over_it_on_few_connections(monkeypatch):
    calls = []
    monkeypatch.setattr(TeacherFlight, "do_exchange", lambda *_: calls.append("flight"))
    greeted = []
    greet = Connections._greet
    monkeypatch.setattr(Connections, "_greet", lambda *arguments: greeted.append(greet(*arguments)))
    with served() as server, stream_of(server) as stream:
        assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
    assert not calls
    assert 1 <= len(greeted) <= WORKERS


@pytest.mark.parametrize("where", ["server", "student"])
def test_signals_go_over_flight_without_it(where, shared_memory, monkeypatch):
    monkeypatch.setattr(Connections, "_connect", lambda *_: pytest.fail("it is off"))
    off = {"server": ["--teacher.server.data_port=null"], "student": []}[where]
    own = ("--teacher.data_port=false",) if where == "student" else ()
    with served(None, *off) as server, stream_of(server, shared_memory=shared_memory, overrides=own) as stream:
        assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
        assert stream.counts["retries"] == 0


def test_a_port_that_cannot_be_reached_is_told_once(caplog):
    with served(flight_class=Told) as server, caplog.at_level(logging.WARNING):
        Told.made.pop().proxy.cut()
        with stream_of(server) as stream:
            assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
            assert stream.counts["retries"] == 0
    warned = [record for record in caplog.records if "teacher.server.data_port" in record.getMessage()]
    assert len(warned) == 1


def test_flipped_bits_and_cut_connections():
    with served(flight_class=Told) as server, stream_of(server) as stream:
        proxy = Told.made.pop().proxy
        for number, _ in enumerate(run_through(stream, server.replica)):
            if number == 4:
                proxy.answers.left, proxy.requests.left = 3, 1
            if number == 10:
                proxy.cut()
                proxy.mend()
        proxy.cut()
        assert (proxy.answers.done, proxy.requests.done) == (3, 1)
        assert stream.counts["retries"] >= 4
        assert stream.counts["lost"] == 0


# ------------------------------------------------------------------------------------------------- who asks, and what


def test_without_the_token_nothing_is_answered(token_file):
    with served(None, f"--teacher.token={token_file}") as server:
        with stream_of(server, overrides=(f"--teacher.token={token_file}",)) as stream:
            port = port_of(stream)
        for token in (None, "", TOKEN.decode()[:-1], TOKEN.decode() + "0", "\ud800", 7, {}):
            hello = json.dumps({"format": FORMAT, "token": token}).encode()
            with pytest.raises(Refused) as caught, connected(port, hello):
                pass
            assert caught.value.kind == "token"
        with contextlib.closing(Link(socket.create_connection(("127.0.0.1", port), 5))) as link:
            link.within(5)
            link.write(Frame.QUESTION, QUESTION)  # without a word before
            frame, length = link.read()
            assert frame is Frame.REFUSED
            assert json.loads(link.take(length))["kind"] == "invalid"
        assert not server.replica.asked
        with connected(port, json.dumps({"format": FORMAT, "token": TOKEN.decode()}).encode()) as link:
            assert ask(link, QUESTION, 10)[0] is Frame.RECORD
        assert server.replica.asked


def test_another_version_is_told_so(port):
    with pytest.raises(Refused, match="different versions"), connected(port, b'{"format": "megapd-data/9"}'):
        pass
    with pytest.raises(Refused, match="JSON"), connected(port, b"[]"):
        pass


def test_one_question_after_the_other_also_after_refusals(port, server):
    batch = make_batch(0)
    with connected(port) as link:
        for _ in range(3):
            _, length = ask(link, QUESTION, 10)
            found = decode(read_stream(link.take(length)), DENSE, DIGESTS[20], batch)
            assert same(found, server.replica.expected(20, batch, DENSE))
            with pytest.raises(Refused, match="no record batch"):
                ask(link, [b"no arrow stream"], 10)
            with pytest.raises(Refused, match="digest"):
                ask(link, stream_parts(encode_request(20, DIGESTS[10], DENSE, batch)), 10)


def test_slow_and_silent_peers_are_left(monkeypatch):
    monkeypatch.setattr("megapd.teacher.server.data_port.HELLO_SECONDS", 0.3)
    monkeypatch.setattr("megapd.teacher.server.data_port.FRAME_SECONDS", 0.3)
    with served() as server, stream_of(server) as stream:
        port = port_of(stream)
        silent = socket.create_connection(("127.0.0.1", port), 5)
        dripping = socket.create_connection(("127.0.0.1", port), 5)
        with connected(port) as half:
            half._socket.sendall(frame_header(Frame.QUESTION, 5000) + b"x" * 10)
            with contextlib.suppress(OSError):
                for byte in frame_header(Frame.HELLO, 50):
                    dripping.send(bytes([byte]))
                    threading.Event().wait(0.05)
            for each in (silent, dripping, half._socket):
                each.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert each.recv(1) == b""
                each.close()


def _frame(kind, body):
    return frame_header(kind, len(body)) + body


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.integers(0, 255),
    length=st.integers(0, 100) | st.integers(0, (1 << 64) - 1),
    body=st.binary(max_size=100),
    greeted=st.booleans(),
    raw=st.binary(max_size=60),
)
def test_whatever_is_sent_the_next_one_is_answered(port, kind, length, body, greeted, raw):
    """`port` asks for a signal at the end."""
    fresh = contextlib.closing(Link(socket.create_connection(("127.0.0.1", port), 5)))
    with connected(port) if greeted else fresh as link:
        link.within(5)
        try:
            link._socket.sendall(frame_header(kind, length) + body)
            link._socket.sendall(raw)
            link._socket.shutdown(socket.SHUT_WR)
            while link._socket.recv(1 << 16):
                pass
        except OSError as error:  # closed by the server, while this end was still sending
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise


# --------------------------------------------------------------------------------------------- teachers that are none


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\nabcdefgh",
        frame_header(Frame.RECORD, 1 << 60),
        frame_header(Frame.HELLO, 2) + b"{}",
        frame_header(Frame.RECORD, 40) + b"no arrow stream" + b"x" * 25,
        frame_header(Frame.RECORD, 0),
        frame_header(Frame.WRITTEN, 4) + b"nono",
        frame_header(Frame.REFUSED, 2) + b"{}",
        frame_header(Frame.REFUSED, 1 << 33),
        _frame(Frame.REFUSED, b'{"kind": "small", "message": "", "needed": 1e400}'),
        _frame(Frame.REFUSED, b'{"kind": [], "message": ""}'),
        _frame(Frame.REFUSED, b"[" * 60_000),
        frame_header(Frame.RECORD, 1000) + b"ends early",
        b"",
    ],
    ids=[
        "http",
        "huge",
        "hello",
        "garbage",
        "empty",
        "no-json",
        "no-refusal",
        "long",
        "needed",
        "kind",
        "deep",
        "short",
        "closed",
    ],
)
def test_what_a_broken_server_answers_is_asked_for_again(answer):
    """The first answer is broken, the connections after it lead to the teacher."""
    with served(flight_class=Told) as server, stream_of(server) as stream:
        proxy = Told.made.pop().proxy
        proxy.cut()
        listener = socket.create_server(("127.0.0.1", proxy.port))

        def answer_once():
            connection, _ = listener.accept()
            link = Link(connection)
            frame = link.read()
            link.take(frame[1])
            link.write(Frame.HELLO, [b"{}"])
            link.take(link.read(1 << 20)[1])
            listener.close()
            connection.sendall(answer)
            connection.close()
            proxy.mend()

        thread = threading.Thread(target=answer_once, daemon=True)
        thread.start()
        batch = make_batch(0)
        (found,) = stream.signals(0, [batch])
        thread.join(10)
        assert same(found, server.replica.expected(10, batch, DENSE))
        assert stream.counts["retries"] >= 1
        proxy.cut()


@pytest.fixture
def pair():
    """(link, the socket at its other end)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        link = Link(listener.accept()[0])
    yield link, other
    link.close()
    other.close()


def test_a_peer_that_moves_a_little_now_and_then_gains_no_time(pair):
    link, other = pair
    stop = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                other.recv(1 << 14)
                other.send(b"x")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    for act in (lambda: link.write(Frame.RECORD, [bytes(64 << 20)]), lambda: link.take(1000)):
        link.within(0.5)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            act()
        assert 0.4 < time.monotonic() - start < 2
    stop.set()
    thread.join(5)


def test_threads_may_ask_at_once_whether_a_peer_is_gone(pair):
    link, other = pair
    errors = []

    def look(number):
        try:
            for _ in range(3000):
                link.gone()
        except Exception as error:
            errors.append((number, error))

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not link.gone()
    other.close()
    assert link.gone()
    link.close()
    assert link.gone()


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


def test_idle_connections_that_broke_are_not_used_again(pair):
    link, other = pair
    connections = Connections("grpc://127.0.0.1:1", None, None, allowed=True)
    connections.give(link)
    assert connections.take(lambda: b"{}", 1) is link
    connections.give(link)
    other.sendall(b"more than was asked for")
    wait_for(link.gone)
    assert connections.take(lambda: b'{"port": null}', 1) is None


def test_a_port_that_could_not_be_reached_is_tried_again(monkeypatch):
    monkeypatch.setattr("megapd.teacher.client.connections.AGAIN_SECONDS", 0.1)
    with served(flight_class=Told) as server, stream_of(server) as stream:
        proxy = Told.made.pop().proxy
        proxy.cut()
        steps = run_through(stream, server.replica)
        next(steps)
        (remote,) = stream._replicas.current()
        assert not remote.connections._idle
        proxy.mend()
        time.sleep(0.2)
        assert len(list(steps)) == 2 * PLAN.steps - 1
        assert remote.connections._idle
        proxy.cut()


def test_a_frame_must_be_whole(pair):
    link, theirs = pair
    link.within(2)
    theirs.sendall(frame_header(Frame.HELLO, 1)[:-1] + b"?")
    with pytest.raises(SignalDamaged, match="not a frame"):
        link.read()
    link.within(0.05)
    with pytest.raises(TimeoutError):
        link.read()
    link.within(2)
    theirs.sendall(frame_header(Frame.HELLO, 10)[:5])
    theirs.close()
    with pytest.raises(ConnectionResetError):
        link.read()
    assert link.gone()


def test_a_client_that_went_is_noticed_and_its_question_forgotten(monkeypatch):
    monkeypatch.setattr("megapd.teacher.server.flight.GONE_SECONDS", 0.05)
    replica = FakeReplica()
    with served(replica) as server, stream_of(server) as stream:
        port = port_of(stream)
        replica.gate.clear()
        with connected(port) as first, connected(port) as second:
            first.write(Frame.QUESTION, QUESTION)
            wait_for(lambda: replica.entered == 1)
            second.write(Frame.QUESTION, stream_parts(encode_request(20, DIGESTS[20], DENSE, make_batch(5))))
            wait_for(lambda: queued(stream) == 1)
        wait_for(lambda: queued(stream) == 0)
        replica.gate.set()
        assert len(list(run_through(stream, replica, steps=range(1)))) == 2
        assert replica.asked[0] == (20, 3)
        assert all(step == 10 for step, _ in replica.asked[1:])
