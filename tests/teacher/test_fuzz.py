"""Whatever a client sends, the server answers the next one."""

import json

import pyarrow as pa
import pyarrow.flight as flight
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megapd.signals import decode
from megapd.teacher.wire.calls import parse_head_question
from megapd.teacher.wire.messages import HEAD, SIGNAL, stream_bytes
from megapd.teacher.wire.refusals import Refused, refusal
from megapd.teacher.wire.requests import decode_request, encode_request
from tests.teacher.serving import DENSE, DIGESTS, asked, exchange, make_batch, options, same

pytestmark = pytest.mark.slow

TEACHER = DIGESTS[20]
GOOD = encode_request(20, TEACHER, DENSE, make_batch(0, padded=True))
ERRORS = (flight.FlightError, pa.ArrowException)

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _still_there(server, client):
    yield
    batch = make_batch(1)
    answer = decode(exchange(client, encode_request(20, TEACHER, DENSE, batch)), DENSE, TEACHER, batch)
    assert same(answer, server.replica.expected(20, batch, DENSE))


def send(client, asked):
    """The answer, or the refusal that came instead: never silence, never a broken connection."""
    try:
        return exchange(client, asked)
    except ERRORS as error:
        return understood(error)


def understood(error):
    """The refusal in an error; the error itself where it is none, or one that says that something broke."""
    told = refusal(error)
    if told is None or told.kind not in ("invalid", "absent", "wrong_teacher", "memory"):
        raise error
    return told


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["head", "teacher", "step", "steps", "wait", "pid", "fd", "name", "bytes", "kind", "k", "encoding"])
BODIES = st.binary(max_size=60) | st.dictionaries(KEYS, JSON, max_size=4).map(lambda tree: json.dumps(tree).encode())
SCALARS = [pa.int8(), pa.uint8(), pa.uint16(), pa.uint32(), pa.int64(), pa.float32(), pa.string(), pa.binary(16), pa.bool_()]


@quick
@given(command=st.binary(max_size=40) | st.tuples(st.sampled_from([SIGNAL, HEAD]), st.binary(max_size=40)).map(b"".join))
def test_descriptors(client, command):
    assert isinstance(send(client, command), Refused)


@settings(quick, max_examples=10)
@given(parts=st.lists(st.text(max_size=20), max_size=4))
def test_paths(client, parts):
    with pytest.raises(ERRORS):
        client.do_exchange(flight.FlightDescriptor.for_path(*parts), options())[1].read_chunk()


@quick
@given(body=BODIES)
def test_questions_for_heads_and_tickets(client, body):
    for call in (lambda: exchange(client, HEAD + body), lambda: client.do_get(flight.Ticket(body), options()).read_all()):
        with pytest.raises(ERRORS) as caught:
            call()
        assert refusal(caught.value).kind == "invalid"
    with pytest.raises(Refused):
        parse_head_question(body)


@quick
@given(name=st.sampled_from(["trajectory", "prepare", "health", "capacity"]) | st.text(max_size=12), body=BODIES)
def test_actions(client, name, body):
    try:
        (answer,) = client.do_action(flight.Action(name, body), options())
    except ERRORS as error:
        understood(error)
    else:
        json.loads(answer.body.to_pybytes())


def test_deep_and_long_json(client):
    for body in (b"[" * 60_000, b'{"a":' * 10_000, b" " * (1 << 20), b'{"step": ' + b"9" * 5000 + b"}"):
        with pytest.raises(ERRORS) as caught:
            list(client.do_action(flight.Action("prepare", body), options()))
        assert refusal(caught.value).kind == "invalid"


NEEDED = [b"format", b"request", b"step", b"teacher", b"parameters"]
METADATA = st.dictionaries(
    st.sampled_from([*NEEDED, b"memory"]) | st.binary(min_size=1, max_size=8),
    BODIES | st.integers(0, 99).map(lambda step: str(step).encode()) | st.just(TEACHER.encode()),
    max_size=3,
)


@quick
@given(changes=METADATA, missing=st.sets(st.sampled_from(NEEDED), max_size=2))
def test_metadata(client, changes, missing):
    metadata = {key: value for key, value in {**GOOD.schema.metadata, **changes}.items() if key not in missing}
    answer = send(client, GOOD.replace_schema_metadata(metadata))
    if missing:
        assert isinstance(answer, Refused)


@st.composite
def arrays(draw, rows):
    """Any array of some type, nulls, nesting and dictionaries included."""
    kind = draw(st.sampled_from(SCALARS))
    form = draw(st.sampled_from(["flat", "list", "large", "fixed", "dictionary"]))
    if form == "dictionary":
        return pa.array(draw(st.lists(st.sampled_from(["a", "b", None]), min_size=rows, max_size=rows))).dictionary_encode()
    if pa.types.is_integer(kind):
        values = st.integers(0, draw(st.sampled_from([1, 11, 127])))
    else:
        values = {
            pa.float32(): st.floats(width=32),
            pa.string(): st.text(max_size=3),
            pa.binary(16): st.binary(min_size=16, max_size=16),
            pa.bool_(): st.booleans(),
        }[kind]
    item = values if draw(st.booleans()) else st.none() | values
    if form == "flat":
        return pa.array(draw(st.lists(item, min_size=rows, max_size=rows)), kind)
    width = draw(st.integers(0, 12))
    sizes = {"min_size": width, "max_size": width} if form == "fixed" else {"max_size": 4}
    inner = st.lists(item, **sizes)
    whole = {"list": pa.list_(kind), "large": pa.large_list(kind), "fixed": pa.list_(kind, width)}[form]
    return pa.array(draw(st.lists(inner if draw(st.booleans()) else st.none() | inner, min_size=rows, max_size=rows)), whole)


@quick
@given(data=st.data())
def test_record_batches_of_any_schema(client, data):
    rows = data.draw(st.integers(0, 3))
    known = [["sample", "ids", *more, "positions"] for more in ([], ["segments"], ["lengths"], ["segments", "lengths"])]
    names = data.draw(st.sampled_from([*known, ["x"], []]))
    columns = [data.draw(arrays(rows)) for _ in names]
    record = pa.RecordBatch.from_arrays(columns, names=names).replace_schema_metadata(GOOD.schema.metadata)
    assert isinstance(send(client, record), Refused)


@quick
@given(data=st.data())
def test_one_column_of_a_good_request_replaced(client, data):
    place = data.draw(st.integers(0, GOOD.num_columns - 1))
    column = data.draw(arrays(GOOD.num_rows))
    record = GOOD.set_column(place, GOOD.schema.names[place], column).replace_schema_metadata(GOOD.schema.metadata)
    assert isinstance(send(client, record), Refused)


@settings(quick, max_examples=300)
@given(place=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_flipped_bytes_of_a_request_never_pass_for_another(place, flip):
    """Refused, or exactly the question that was asked; the step alone is no part of its id, but it goes with a digest."""
    sent = bytearray(stream_bytes(GOOD))
    sent[place % len(sent)] ^= flip
    try:
        request = decode_request(pa.py_buffer(bytes(sent)))
    except Refused:
        return
    whole = asked(GOOD)
    assert (request.id, request.teacher, request.spec) == (whole.id, whole.teacher, whole.spec)
    assert request.batch.digest == make_batch(0, padded=True).digest
    counted = torch.arange(GOOD.schema.field("ids").type.list_size) < request.batch.lengths[:, None]
    assert torch.equal(request.batch.ids[counted], make_batch(0).ids[counted])  # padding says nothing, and is not checked
