"""The served teacher by itself: what it answers, whom it refuses, what it tells about itself."""

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
import torch

from megapd.errors import UserError
from megapd.processes.local import free_port
from megapd.signals import decode, decode_head
from megapd.teacher.server.dispatch import Dispatcher, Job
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.server.metrics import Metrics, MetricsServer
from megapd.teacher.wire.messages import HEAD, stream_bytes
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import encode_request
from tests.teacher.serving import (
    DENSE,
    DIGESTS,
    LENGTH,
    SPECS,
    STEPS,
    VOCABULARY,
    FakeReplica,
    FakeTrajectory,
    Served,
    act,
    asked,
    configuration,
    exchange,
    head,
    make_batch,
    options,
    refused,
    same,
    served,
    stream_of,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("_soon")


# ------------------------------------------------------------------------------------------------------------- answers


def test_a_request_is_answered(server, client):
    batch = make_batch(0, segments=True)
    record = exchange(client, encode_request(20, DIGESTS[20], DENSE, batch))
    assert same(decode(record, DENSE, DIGESTS[20], batch), server.replica.expected(20, batch, DENSE))
    again = exchange(client, encode_request(20, DIGESTS[20], DENSE, batch))
    assert again.equals(record)  # whatever was asked before


@pytest.mark.parametrize("segments", [False, True])
def test_rows_of_several_lengths_are_answered_together_where_they_can(segments):
    dispatcher = Dispatcher(replica := FakeReplica(), Metrics(), limit=8, token_budget=1000)
    batches = [make_batch(number, segments=segments, padded=number < 2) for number in range(3)]
    jobs = [Job(20, DIGESTS[20], asked(encode_request(20, DIGESTS[20], DENSE, batch)), lambda: False) for batch in batches]
    for job in jobs:
        dispatcher.submit(job)
    dispatcher.turn(0)
    dispatcher.turn(0)
    assert [samples for _, samples in replica.asked] == [6, 3]
    for job, batch in zip(jobs, batches, strict=True):
        assert same(job.answer.result(0).signal, replica.expected(20, batch, DENSE))


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ([0, 1, 1], "rows of 0 to 1 tokens"),
        ([99, 1, 1], "rows of 1 to 99 tokens"),
        ([1, 1, 1], "a position in the padding of its row"),
        ([None, 1, 1], "has nulls"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, told):
    record = encode_request(20, DIGESTS[20], DENSE, make_batch(0, padded=True))
    place = record.schema.get_field_index("lengths")
    changed = record.set_column(place, "lengths", pa.array(lengths, pa.uint8()))
    with pytest.raises(Refused, match=told):
        asked(changed.replace_schema_metadata(record.schema.metadata))


def test_a_huge_answer_comes_in_parts(server, client, monkeypatch):
    monkeypatch.setattr("megapd.teacher.wire.messages.PIECE_BYTES", 1000)
    monkeypatch.setattr("megapd.teacher.wire.messages.SMALL_BYTES", 500)
    batches = [make_batch(0, samples=30)]
    with stream_of(server) as stream:
        assert same(stream.signals(4, batches)[0], server.replica.expected(20, batches[0], DENSE))


def test_the_head_of_a_checkpoint(server, client):
    assert torch.equal(head(client, 20, DIGESTS[20]).weight, server.replica.head(20).weight)


def test_a_head_on_its_way_does_not_change_with_the_replica():
    """A replica changes its weights in place."""
    weight = torch.ones(3, 2)

    class InPlace(FakeReplica):
        def head(self, step):
            return replace(super().head(step), weight=weight.fill_(step), bias=None)

    dispatcher = Dispatcher(InPlace(), Metrics(), limit=4, token_budget=100)
    jobs = [Job(step, DIGESTS[step], None, lambda: False) for step in STEPS]
    for job in jobs:
        dispatcher.submit(job)
        dispatcher.turn(0)
    for job in jobs:
        schema, batches = job.answer.result(0)
        assert (decode_head(schema, batches, job.teacher).weight == job.step).all()


def test_the_trajectory_as_json(client):
    tree = act(client, "trajectory")
    assert tree["steps"] == list(STEPS)
    assert [entry["digest"] for entry in tree["checkpoints"]] == list(DIGESTS.values())
    assert len(tree["configs"]) == 1
    assert not {"path", "files"} & tree["checkpoints"][0].keys()
    assert [entry["step"] for entry in act(client, "trajectory", {"steps": [30, 20, 25]})["checkpoints"]] == [20, 30]
    assert act(client, "trajectory", {"steps": []})["checkpoints"] == []


def test_prepare_health_and_capacity(server, client):
    assert act(client, "prepare", {"step": 30, "teacher": DIGESTS[30], "wait": 1.0}) == {"ready": True}
    assert 30 in server.replica.prepared
    assert act(client, "health") == {"draining": False}
    exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(1)))
    capacity = act(client, "capacity")
    assert capacity.keys() == {"queued", "limit", "tokens_per_second", "resident", "draining"}
    assert (capacity["queued"], capacity["limit"], capacity["resident"]) == (0, 64, [DIGESTS[20]])
    assert capacity["tokens_per_second"] > 0


def test_staging_is_waited_for_in_parts():
    replica, staged = FakeReplica(), Future()
    replica.staging[20] = staged
    body = {"step": 20, "teacher": DIGESTS[20]}
    with served(replica) as server, flight.FlightClient(server.address) as client:
        assert act(client, "prepare", body) == {"ready": False}
        assert act(client, "prepare", {**body, "wait": 0.1}) == {"ready": False}
        staged.set_exception(UserError("step_20: its sha256 is another"))
        with refused("failed", "its sha256 is another"):
            act(client, "prepare", body)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_digest_of_another_run_is_refused_with_both(client):
    other = FakeTrajectory("other").checkpoint(20).digest
    calls = (
        lambda: exchange(client, encode_request(20, other, DENSE, make_batch(0))),
        lambda: head(client, 20, other),
        lambda: act(client, "prepare", {"step": 20, "teacher": other}),
    )
    for call in calls:
        with refused("wrong_teacher", other, DIGESTS[20]):
            call()


def test_steps_that_are_not_there_and_paths_are_refused(client):
    with refused("absent", "the nearest: 10, 20, 30"):
        exchange(client, encode_request(25, DIGESTS[20], DENSE, make_batch(0)))
    with refused("absent"):
        act(client, "prepare", {"step": 25, "teacher": DIGESTS[20]})
    for step in ("../../etc/passwd", "step_20", "/", "20/../30", "٢٠", "2e1", "-20", "020", "", None, True, 20.0, [20], "20\x00"):
        with refused("invalid"):
            act(client, "prepare", {"step": step, "teacher": DIGESTS[20]})
        with refused("invalid"):
            exchange(client, HEAD + json.dumps({"head": step, "teacher": DIGESTS[20]}).encode())
        record = encode_request(20, DIGESTS[20], DENSE, make_batch(0))
        changed = record.replace_schema_metadata({**record.schema.metadata, b"step": str(step).encode()})
        with refused("invalid"):
            exchange(client, changed)
    for digest in ("../x", "", DIGESTS[20][:-1], DIGESTS[20].upper(), 7):
        with refused("invalid"):
            act(client, "prepare", {"step": 20, "teacher": digest})


def test_calls_that_a_teacher_does_not_know(client):
    record = encode_request(20, DIGESTS[20], DENSE, make_batch(0))
    path = flight.FlightDescriptor.for_path("etc", "passwd")

    def put():
        writer, _ = client.do_put(path, record.schema, options())
        writer.close()

    calls = (
        lambda: list(client.list_flights(options=options())),
        lambda: list(client.list_actions(options())),
        lambda: client.get_flight_info(path, options()),
        put,
        lambda: act(client, "shutdown"),
        lambda: act(client, "../trajectory"),
        lambda: exchange(client, b"signals " + stream_bytes(record)),
        lambda: exchange(client, path),
        lambda: client.do_get(flight.Ticket(b"/etc/passwd"), options()).read_all(),
        lambda: act(client, "trajectory", {"steps": ["../.."]}),
        lambda: act(client, "prepare", {"step": 20, "teacher": DIGESTS[20], "wait": 1e9}),
    )
    for call in calls:
        with refused("invalid"):
            call()
    with pytest.raises(pa.ArrowException):  # pyarrow passes no refusal on here
        client.get_schema(path, options())


def change(record, name, array):
    place = record.schema.get_field_index(name)
    field = pa.field(name, array.type, nullable=array.null_count > 0)
    return record.set_column(place, field, array).replace_schema_metadata(record.schema.metadata)


def lists(rows, dtype=np.uint16):
    return pa.array(rows, pa.list_(pa.from_numpy_dtype(dtype)))


def test_requests_that_are_not_as_they_must_be(client):
    batch = make_batch(0)
    good = encode_request(20, DIGESTS[20], DENSE, batch)
    big = make_batch(1)
    big.ids[0, 0] = VOCABULARY
    long = make_batch(1, length=LENGTH + 1)
    nulls = pa.array([[None] * LENGTH] * 3, pa.list_(pa.uint8(), LENGTH))
    cases = {
        "digests are not": change(good, "ids", encode_request(20, DIGESTS[20], DENSE, make_batch(5)).column("ids")),
        "outside the teacher's vocabulary": encode_request(20, DIGESTS[20], DENSE, big),
        "positions for 12": encode_request(20, DIGESTS[20], DENSE, long),
        "do not increase": change(good, "positions", lists([[3, 2], [], []])),
        "position 12 in samples": change(good, "positions", lists([[12], [], []])),
        "positions is of type": change(good, "positions", pa.array([[1], [], []], pa.list_(pa.int64()))),
        "ids is of type": change(good, "ids", pa.array([[1] * LENGTH] * 3, pa.list_(pa.int32(), LENGTH))),
        "has nulls": change(good, "ids", nulls),
        "between 1 and": good.slice(0, 0),
        "unknown columns": good.select(["sample", "ids"]),
        "format": good.replace_schema_metadata({}),
        "its id is not": good.replace_schema_metadata({**good.schema.metadata, b"request": b"0" * 32}),
        "parameters": good.replace_schema_metadata({**good.schema.metadata, b"parameters": b'{"kind": "shell"}'}),
        "memory needs": good.replace_schema_metadata({**good.schema.metadata, b"memory": b'{"pid": "1"}'}),
        "more than": encode_request(20, DIGESTS[20], replace(SPECS["sampled"], k=(1 << 20) - 1), make_batch(3, samples=5000)),
        "but the teacher has 40 classes": encode_request(20, DIGESTS[20], replace(SPECS["topk"], k=41), batch),
    }
    for text, record in cases.items():
        with refused("invalid", text):
            exchange(client, record)
    assert exchange(client, good).num_rows == 3


def test_what_fails_in_the_replica_is_told_to_its_client_alone():
    replica = FakeReplica()
    replica.failing = 299
    bad, good = make_batch(0), make_batch(1)
    bad.ids[0, 0] = 299
    good.ids.clamp_(max=298)
    with served(replica) as server, flight.FlightClient(server.address) as client:
        with refused("failed", "this id cannot be answered"):
            exchange(client, encode_request(20, DIGESTS[20], DENSE, bad))
        assert exchange(client, encode_request(20, DIGESTS[20], DENSE, good)).num_rows == 3


def test_a_replica_that_answers_with_another_checkpoint_is_told():
    class Confused(FakeReplica):
        def signal(self, step, batch, spec):
            return super().signal(30, batch, spec)

    with served(Confused()) as server, flight.FlightClient(server.address) as client, refused("wrong_teacher", DIGESTS[30]):
        exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(0)))


def test_clients_that_are_gone_are_not_answered():
    replica = FakeReplica()
    with served(replica) as server, flight.FlightClient(server.address) as client:
        replica.gate.clear()
        with pytest.raises(flight.FlightTimedOutError):
            exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(0)), seconds=0.3)
        for seed in (1, 2):
            with pytest.raises(flight.FlightTimedOutError):
                exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(seed)), seconds=0.3)
        replica.gate.set()
        exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(3)))
        assert len(replica.asked) == 2  # the one that was under way, and the one that is waited for


def test_a_broken_device_ends_the_server():
    """Whatever came next would fail too: a supervisor starts it again."""

    class Broken(FakeReplica):
        def signal(self, step, batch, spec):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    server = Served(Broken(), configuration())
    with flight.FlightClient(server.address) as client, refused("draining"):
        exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(0)))
    server.thread.join(10)
    assert isinstance(server.error, torch.AcceleratorError)


def test_an_idle_replica_hears_from_its_engine(monkeypatch):
    monkeypatch.setattr("megapd.teacher.server.dispatch.IDLE_SECONDS", 0.05)
    replica = FakeReplica()
    with served(replica):
        wait_for(lambda: replica.idled >= 2, 5)


# ------------------------------------------------------------------------------------------------------ metrics, drain


def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_over_http():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    replica = FakeReplica()
    with served(replica, f"--teacher.server.metrics_port={port}") as server, flight.FlightClient(server.address) as client:
        for step in (20, 30):
            answer = exchange(client, encode_request(step, DIGESTS[step], DENSE, make_batch(0)))
        with refused("absent"):
            exchange(client, encode_request(25, DIGESTS[20], DENSE, make_batch(0)))
        status, text = fetch(f"{url}/metrics")
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

        def value(name):
            return float(values[f"megapd_teacher_{name}"])

        assert status == 200
        assert value('requests_total{call="signal",outcome="ok"}') == 2
        assert value('requests_total{call="signal",outcome="absent"}') == 1
        assert value("tokens_total") == 2 * 3 * LENGTH
        assert value("rotations_total") == 2
        assert value("resident") == 1
        assert value("queue") == 0
        assert value("sent_bytes_total") >= 2 * answer.column("values").values.nbytes
        assert value('seconds_count{phase="forward"}') == value('seconds_count{phase="queue"}') == 2
        assert value('batch_samples_bucket{le="4.0"}') == 2
        assert fetch(f"{url}/health") == (200, "ok\n")
        assert fetch(f"{url}/etc/passwd")[0] == 404


def test_draining_is_told_and_refuses_what_is_new():
    replica, metrics, stop = FakeReplica(), Metrics(), threading.Event()
    dispatcher = Dispatcher(replica, metrics, limit=4, token_budget=100)
    server = TeacherFlight("grpc://127.0.0.1:0", dispatcher)
    shown = MetricsServer(metrics, "127.0.0.1", 0, lambda: dispatcher.draining)
    assert fetch(f"http://127.0.0.1:{shown.port}/health") == (200, "ok\n")
    engine = threading.Thread(target=dispatcher.run, args=(stop, 5.0))
    engine.start()
    with flight.FlightClient(f"grpc://127.0.0.1:{server.port}") as client:
        dispatcher.drain()
        assert act(client, "health") == {"draining": True}
        assert act(client, "capacity")["draining"]
        with refused("draining", "ask another"):
            exchange(client, encode_request(20, DIGESTS[20], DENSE, make_batch(0)))
        assert fetch(f"http://127.0.0.1:{shown.port}/health") == (503, "draining\n")
        assert "megapd_teacher_draining 1.0" in fetch(f"http://127.0.0.1:{shown.port}/metrics")[1]
    stop.set()
    engine.join(5)
    server.shutdown()
    shown.close()


def test_what_is_not_answered_in_time_is_refused_at_the_end():
    replica, stop = FakeReplica(), threading.Event()
    dispatcher = Dispatcher(replica, Metrics(), limit=4, token_budget=100)
    job = Job(20, DIGESTS[20], None, lambda: False)
    replica.staging[20] = Future()  # never staged
    dispatcher.submit(job)
    stop.set()
    dispatcher.run(stop, 0.1)
    with pytest.raises(Exception, match="ended before"):
        job.answer.result(0)
