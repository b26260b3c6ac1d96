"""What a failure is, told by types, status codes and a connection of the client's own; never by words."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from megapd.errors import SignalDamaged, SignalMismatch
from megapd.network import client_tls
from megapd.processes.local import free_port
from megapd.teacher.client.probe import reach
from megapd.teacher.client.replicas import classify
from megapd.teacher.wire.refusals import Refused
from tests.teacher.serving import make_authority, served

MISLEADING = "handshake failed: Socket closed, invalid token, failed to connect"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (flight.FlightUnavailableError(MISLEADING), "away"),
        (flight.FlightTimedOutError(MISLEADING), "away"),
        (flight.FlightCancelledError(MISLEADING), "away"),
        (flight.FlightInternalError(MISLEADING), "away"),
        (flight.FlightServerError(MISLEADING), "away"),
        (flight.FlightUnauthenticatedError(MISLEADING), "token"),
        (flight.FlightUnauthorizedError(MISLEADING), "token"),
        (flight.FlightUnavailableError(MISLEADING, json.dumps({"kind": "busy", "message": "later"}).encode()), "busy"),
        (flight.FlightServerError(MISLEADING, json.dumps({"kind": "absent", "message": "later"}).encode()), "absent"),
        (Refused("memory", MISLEADING), "memory"),
        (SignalMismatch(MISLEADING), "wrong_teacher"),
        (SignalDamaged(MISLEADING), "damaged"),
        (pa.ArrowInvalid(MISLEADING), "damaged"),
        (OSError(MISLEADING), "away"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_failures_are_told_by_type_and_status(error, failure):
    assert classify(error)[0] == failure


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    return make_authority(folder / "ours"), make_authority(folder / "theirs")


def context(authority, pair=None):
    files = () if pair is None else (pair.certificate, pair.key)
    return client_tls("test", authority.root, *files, protocol="h2")


def test_how_far_a_connection_comes(authorities):
    ours, theirs = authorities
    own = [f"--teacher.server.certificate={ours.server.certificate}", f"--teacher.server.key={ours.server.key}"]
    mutually = f"--teacher.server.client_authority={ours.root}"
    with served() as plain, served(None, *own) as tls, served(None, *own, mutually) as mutual:
        assert reach(plain.address, None, 5) == ("away", "the connection was lost")  # whatever it was, it is over
        assert reach(tls.address, context(ours), 5)[0] == "away"
        assert reach(mutual.address, context(ours, ours.client), 5)[0] == "away"
        for pair in (None, ours.expired, theirs.client):
            assert reach(mutual.address, context(ours, pair), 5)[0] == "silent", pair
        assert reach(mutual.address, context(theirs, ours.client), 5)[0] == "certificate"
        assert reach(tls.address.replace("+tls", ""), None, 5)[0] == "silent"
        assert reach(plain.address.replace("grpc", "grpc+tls"), context(ours), 5)[0] == "certificate"
    away, message = reach(f"grpc://127.0.0.1:{free_port()}", None, 5)
    assert away == "away"
    assert "refused" in message


def test_who_closes_without_a_word_is_silent_and_who_says_nothing_is_away():
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        address = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        assert reach(address, None, 5)[0] == "silent"
        thread.join()
        assert reach(address, None, 0.1)[0] == "away"  # in the queue of a server that hangs
        stack.enter_context(listener.accept()[0])


@pytest.mark.parametrize("address", ["grpc://a..b:1", "grpc://host", "grpc://127.0.0.1:99999", "grpc+unix:///tmp/x"])
def test_an_address_that_no_socket_takes_is_away(address):
    """A lease may name one, and the client that asks it goes on with the other replicas."""
    assert reach(address, None, 1)[0] == "away"
    assert reach(address, ssl.create_default_context(), 1)[0] == "away"
