"""Calls of a teacher as raw as Flight makes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from megapd.teacher.wire.refusals import refusal
from megapd.teacher.wire.requests import COMMAND


def exchange(
    client: flight.FlightClient,
    record: pa.RecordBatch,
    command: bytes | flight.FlightDescriptor = COMMAND,
    token: bytes | None = None,
    seconds: float = 10.0,
) -> flight.FlightStreamChunk:
    """The first chunk of the answer."""
    descriptor = flight.FlightDescriptor.for_command(command) if isinstance(command, bytes) else command
    writer, reader = client.do_exchange(descriptor, options(token, seconds))
    with writer:
        writer.begin(record.schema)
        writer.write_batch(record)
        writer.done_writing()
        return reader.read_chunk()


def act(client: flight.FlightClient, name: str, body: object = b"", token: bytes | None = None) -> Any:
    """The JSON of an action's result; body: bytes, or what becomes JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    (result,) = client.do_action(flight.Action(name, body), options(token))
    return json.loads(result.body.to_pybytes())


def options(token: bytes | None = None, seconds: float = 10.0) -> flight.FlightCallOptions:
    """token: the whole value of the authorization header."""
    headers = [] if token is None else [(b"authorization", token)]
    return flight.FlightCallOptions(timeout=seconds, headers=headers)


@contextmanager
def refused(kind: str, *texts: str) -> Iterator[None]:
    """The block ends in a refusal of this kind, whose message has all of the texts."""
    with pytest.raises((flight.FlightError, pa.ArrowException)) as caught:
        yield
    told = refusal(caught.value)
    assert told is not None, caught.value
    assert told.kind == kind, told
    assert all(text in str(told) for text in texts), told
