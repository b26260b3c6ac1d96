"""Fixtures of the tests with teachers on threads of their own process."""

import pyarrow.flight as flight
import pytest

from tests.teacher.serving import TOKEN, served


@pytest.fixture
def _soon(monkeypatch):
    """Tries follow each other faster than in earnest."""
    monkeypatch.setattr("megapd.teacher.client.replicas.BACKOFF", (0.02, 1.0))
    monkeypatch.setattr("megapd.teacher.server.dispatch.POLL_SECONDS", 0.02)


@pytest.fixture(params=[False, True], ids=["tcp", "memory"])
def shared_memory(request):
    """Either carrier of a served stream."""
    return request.param


@pytest.fixture(scope="module")
def server():
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with flight.FlightClient(server.address) as found:
        yield found


@pytest.fixture
def token_file(tmp_path):
    """What teacher.token names."""
    file = tmp_path / "token"
    file.write_bytes(TOKEN + b"\n")
    return file
