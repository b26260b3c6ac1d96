"""A teacher without a model, served on a thread of the test's own process; raw calls of it, and certificates for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
import torch
import trustme

from megapd.batch import Batch
from megapd.config import Config, load
from megapd.errors import UserError
from megapd.schedule.plan import Plan
from megapd.signals import Head, Signal, SignalSpec, as_sent, decode_head
from megapd.teacher.client import FixedEndpoints, ServedStream
from megapd.teacher.server import serve
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.wire.calls import encode_head_question
from megapd.teacher.wire.messages import HEAD, SIGNAL, answer_length, fill, read_record, read_stream, stream_bytes
from megapd.teacher.wire.refusals import refusal
from megapd.teacher.wire.requests import Request, decode_request
from megapd.trajectory import Checkpoint

VOCABULARY, CLASSES, WIDTH, LENGTH = 300, 40, 8, 12
MODEL = {"kind": "mlp", "width": WIDTH}
STEPS = (10, 20, 30)
TOKEN = b"0123456789abcdef0123"
PLAN = Plan("explicit", 9, tuple(zip((0, 4, 6), STEPS, strict=True)))
SPECS = {
    "dense": SignalSpec("dense"),
    "dense-bf16": SignalSpec("dense", "bf16"),
    "hidden": SignalSpec("hidden", "fp16"),
    "hidden-int8": SignalSpec("hidden", "int8"),
    "topk": SignalSpec("topk", "fp16", k=5, temperature=1.5),
    "sampled": SignalSpec("sampled", k=4, seed=3),
    "argmax": SignalSpec("argmax"),
}


def make_batch(seed: int, samples: int = 3, segments: bool = False, length: int = LENGTH, padded: bool = False) -> Batch:
    random = np.random.default_rng(seed)
    ids = torch.from_numpy(random.integers(0, VOCABULARY, (samples, length)))
    chosen = np.flatnonzero(random.random(samples * length) < 0.3)
    lengths = np.maximum(1, length - np.arange(samples)) if padded else None
    if lengths is not None:
        chosen = chosen[chosen % length < lengths[chosen // length]]
    labels = torch.from_numpy(random.integers(0, CLASSES, len(chosen)))
    parts = torch.from_numpy(np.sort(random.integers(0, 3, (samples, length)), axis=1)) if segments else None
    counted = None if lengths is None else torch.from_numpy(lengths)
    return Batch(ids, parts, torch.from_numpy(chosen), labels, torch.arange(samples), counted)


class FakeTrajectory:
    """Checkpoints of a run without weights; runs of different names have different digests."""

    def __init__(self, run: str = "run", steps: tuple[int, ...] = STEPS, vocabulary: str = "words") -> None:
        self.run, self.steps, self.vocabulary = run, steps, vocabulary
        self.incomplete: tuple[int, ...] = ()

    def refresh(self) -> tuple[int, ...]:
        return self.steps

    def written(self, step: int) -> bool:
        return step in self.steps

    def checkpoint(self, step: int) -> Checkpoint:
        if step not in self.steps:
            raise UserError(f"no checkpoint of step {step}")
        digest = hashlib.sha256(f"{self.run} {step}".encode()).hexdigest()
        shapes = {"vocab_size": VOCABULARY, "classes": CLASSES, "length": LENGTH}
        return Checkpoint(
            step, Path(self.run), digest, self.vocabulary, {"model": MODEL, "shapes": shapes}, {"loss": 1.0 / step}, {}
        )


DENSE = SPECS["dense"]
DIGESTS = {step: FakeTrajectory().checkpoint(step).digest for step in STEPS}


class FakeReplica:
    """Answers as a function of (checkpoint, id), so that any way of putting requests together gives the same.

    gate      while it is cleared, the engine waits, `entered` one more
    failing   batches with this id in them raise
    asked     (teacher step, samples) of each forward pass
    staging   what `prepare` returns for a step, where a test sets it
    """

    classes = CLASSES

    def __init__(self, trajectory: FakeTrajectory | None = None, resident: int = 1) -> None:
        self.trajectory = trajectory if trajectory is not None else FakeTrajectory()
        self.resident = resident
        self.held: tuple[str, ...] = ()
        self.gate = threading.Event()
        self.gate.set()
        self.failing: int | None = None
        self.asked: list[tuple[int, int]] = []
        self.prepared: list[int] = []
        self.staging: dict[int, Future[Checkpoint]] = {}
        self.entered = self.idled = 0

    def prepare(self, step: int) -> Future[Checkpoint]:
        self.prepared.append(step)
        if step in self.staging:
            return self.staging[step]
        future: Future[Checkpoint] = Future()
        future.set_result(self.trajectory.checkpoint(step))
        return future

    def signal(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        self.entered += 1
        assert self.gate.wait(30)
        self.asked.append((step, batch.samples))
        self.rotate(step)
        if self.failing is not None and (batch.ids == self.failing).any():
            raise RuntimeError("this id cannot be answered")
        return self.expected(step, batch, spec)

    def head(self, step: int) -> Head:
        self.rotate(step)
        generator = torch.Generator().manual_seed(step)
        return Head(torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES, generator=generator))

    def idle(self) -> None:
        self.idled += 1

    def rotate(self, step: int) -> None:
        digest = self.trajectory.checkpoint(step).digest
        self.held = (*[other for other in self.held if other != digest], digest)[-self.resident :]

    def expected(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        ids = batch.ids.reshape(-1)[batch.positions]
        wide = torch.sin((ids[:, None] + step) * torch.arange(1, CLASSES + 1)).float()
        values, head, logprobs, log_rest = wide, None, None, None
        if spec.kind == "hidden":
            values, head = wide[:, :WIDTH].contiguous(), Head(torch.empty(0, 0), None)
        elif spec.kind == "topk":
            top = torch.log_softmax(wide / spec.temperature, -1).topk(spec.k)
            values, logprobs = top.indices, top.values
            log_rest = torch.log1p(-logprobs.exp().sum(-1))
        elif spec.kind == "sampled":
            values = (ids[:, None] * 7 + torch.arange(spec.k) + step) % CLASSES
        elif spec.kind == "argmax":
            values = wide.argmax(-1)
        digest = self.trajectory.checkpoint(step).digest
        return as_sent(Signal(spec, digest, batch.digest, values, head, logprobs, log_rest))


def configuration(*overrides: str, port: int = 0) -> Config:
    quick = ["--teacher.call_seconds=10", "--teacher.deadline_seconds=20", "--teacher.server.drain_seconds=5"]
    fixed = ["--teacher.trajectory=unused", f"--teacher.server.port={port}", "--schedule.policy=one_shot"]
    return load(None, [*fixed, *quick, *overrides])


class Served:
    """serve() on a thread. address: of the client; replica: the fake; stop(): drains and waits for the end."""

    def __init__(self, replica: Any, config: Config, flight_class: type[TeacherFlight] = TeacherFlight) -> None:
        self.replica, self.config = replica, config
        self._stop, ready = threading.Event(), threading.Event()
        self.port = 0
        self.error: BaseException | None = None

        def opened(port: int) -> None:
            self.port = port
            ready.set()

        def run() -> None:
            try:
                serve(config, replica, ready=opened, stop=self._stop, flight_class=flight_class)
            except BaseException as error:
                self.error = error
                ready.set()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(20)
        if self.error is not None:
            raise self.error
        assert config.teacher is not None
        scheme = "grpc+tls" if config.teacher.server.certificate else "grpc"
        self.address = f"{scheme}://127.0.0.1:{self.port}"

    def begin_stop(self) -> None:
        self._stop.set()

    def stop(self) -> None:
        self._stop.set()
        if isinstance(self.replica, FakeReplica):
            self.replica.gate.set()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.error is None


@contextlib.contextmanager
def served(
    replica: Any = None, *overrides: str, port: int = 0, flight_class: type[TeacherFlight] = TeacherFlight
) -> Iterator[Served]:
    server = Served(replica or FakeReplica(), configuration(*overrides, port=port), flight_class)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def stream_of(
    *servers: Served | str,
    spec: SignalSpec = SPECS["dense"],
    trajectory: FakeTrajectory | None = None,
    shared_memory: bool = False,
    plan: Plan = PLAN,
    overrides: tuple[str, ...] = (),
) -> Iterator[ServedStream]:
    """A student's stream from these servers, or addresses."""
    config = configuration(*overrides)
    assert config.teacher is not None
    addresses = [server if isinstance(server, str) else server.address for server in servers]
    stream = ServedStream(
        config.teacher,
        plan,
        spec,
        trajectory or FakeTrajectory(),
        device=torch.device("cpu"),
        shared_memory=shared_memory,
        endpoints=FixedEndpoints(addresses),
    )
    try:
        yield stream
    finally:
        stream.close()


def same(found: Signal, expected: Signal) -> bool:
    """Whether two signals hold the same values, bitwise; heads apart."""
    pairs = [(found.values, expected.values), (found.logprobs, expected.logprobs), (found.log_rest, expected.log_rest)]
    tensors = all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)
    return tensors and (found.teacher, found.samples, found.spec) == (expected.teacher, expected.samples, expected.spec)


def batches_of(step: int, count: int = 2, segments: bool = False) -> list[Batch]:
    return [make_batch(100 * step + number, segments=segments, padded=step % 3 == 2) for number in range(count)]


def run_through(
    stream: ServedStream, replica: FakeReplica, steps: range = range(PLAN.steps), ahead: int = 2
) -> Iterator[tuple[int, Signal]]:
    """Steps as a loop takes them, requested ahead; every signal is the teacher's own."""
    requested = steps.start
    for step in steps:
        while requested < min(step + ahead + 1, steps.stop):
            stream.request(requested, batches_of(requested, segments=requested % 2 == 0))
            requested += 1
        batches = batches_of(step, segments=step % 2 == 0)
        for found, batch in zip(stream.signals(step, batches), batches, strict=True):
            assert same(found, replica.expected(PLAN.checkpoint_at(step), batch, stream.spec))
            yield step, found


def wait_for(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def queued(stream: ServedStream) -> int:
    """Requests that wait at the stream's first replica."""
    return json.loads(stream._replicas.current()[0].action("capacity", b"", 5))["queued"]


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


@dataclass(frozen=True)
class Pair:
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """root: its own PEM; server: for 127.0.0.1; client: valid; expired: a client's, since yesterday."""

    root: Path
    server: Pair
    client: Pair
    expired: Pair


def make_authority(folder: Path) -> Authority:
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    root = folder / "root.pem"
    authority.cert_pem.write_to_path(str(root))

    def pair(name: str, issued: trustme.LeafCert) -> Pair:
        found = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        found.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(found.key))
        return found

    yesterday = datetime.now(UTC) - timedelta(days=1)
    expired = authority.issue_cert("student", not_before=yesterday - timedelta(days=1), not_after=yesterday)
    return Authority(
        root,
        pair("server", authority.issue_cert("127.0.0.1", "localhost")),
        pair("client", authority.issue_cert("student")),
        pair("expired", expired),
    )
