"""Calls of a teacher as raw as Flight makes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from megapd.signals import Head, decode_head
from megapd.teacher.wire.calls import encode_head_question
from megapd.teacher.wire.messages import HEAD, SIGNAL, answer_length, fill, read_record, read_stream, stream_bytes
from megapd.teacher.wire.refusals import refusal
from megapd.teacher.wire.requests import Request, decode_request


def exchange(
    client: flight.FlightClient,
    asked: pa.RecordBatch | bytes | flight.FlightDescriptor,
    token: bytes | None = None,
    seconds: float = 10.0,
) -> pa.RecordBatch:
    """The signal that answers a question: its record batch, a call's whole command, or a descriptor."""
    return read_record(answer(client, asked, token, seconds))


def head(client: flight.FlightClient, step: int, teacher: str, token: bytes | None = None) -> Head:
    """The output layer of a checkpoint."""
    return decode_head(*read_stream(answer(client, HEAD + encode_head_question(step, teacher), token)), teacher)


def answer(
    client: flight.FlightClient,
    asked: pa.RecordBatch | bytes | flight.FlightDescriptor,
    token: bytes | None = None,
    seconds: float = 10.0,
) -> pa.Buffer:
    """What comes back, whole."""
    if isinstance(asked, pa.RecordBatch):
        asked = SIGNAL + stream_bytes(asked)
    descriptor = flight.FlightDescriptor.for_command(asked) if isinstance(asked, bytes) else asked
    writer, reader = client.do_exchange(descriptor, options(token, seconds))
    with writer:
        writer.done_writing()
        length, first = answer_length(reader.read_chunk().app_metadata)
        found = bytearray(length)
        fill(memoryview(found), [first, *(chunk.app_metadata for chunk in reader)])
    return pa.py_buffer(found)


def asked(record: pa.RecordBatch) -> Request:
    """The request in a record batch, as it arrives."""
    return decode_request(pa.py_buffer(stream_bytes(record)))


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
