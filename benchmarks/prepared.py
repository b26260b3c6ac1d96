"""A teacher's server that has its answers ready, and the bare carriers beside it: what benchmarks/stream.py measures against.

It runs in a process of its own, as `megapd teacher` does, with megapd's own server around a replica without a model.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import torch

from megapd.batch import Batch
from megapd.config import load
from megapd.signals import Head, Signal, SignalSpec, pack
from megapd.teacher.server import serve
from megapd.trajectory import Checkpoint, Trajectory

STEP = 1  # of the one checkpoint
TOGETHER = 8  # requests that a server may answer at once: a stream's workers


@dataclass(frozen=True)
class Sizes:
    """Of the teacher that is stood in for. length: tokens a sample."""

    classes: int
    width: int
    length: int


class OneCheckpoint:
    """A trajectory of one checkpoint, without weights."""

    steps = (STEP,)
    incomplete: tuple[int, ...] = ()

    def __init__(self, sizes: Sizes) -> None:
        digest = hashlib.sha256(b"prepared").hexdigest()
        shapes = {"vocab_size": sizes.classes, "classes": sizes.classes, "length": sizes.length}
        self._checkpoint = Checkpoint(STEP, Path("prepared"), digest, "", {"shapes": shapes}, {}, {})

    def refresh(self) -> tuple[int, ...]:
        return self.steps

    def written(self, step: int) -> bool:
        return step == STEP

    def checkpoint(self, step: int) -> Checkpoint:
        assert step == STEP
        return self._checkpoint

    def wait_for(self, step: int, timeout_seconds: float) -> Checkpoint:
        return self.checkpoint(step)


def make_head(sizes: Sizes) -> Head:
    return Head(0.02 * torch.randn(sizes.classes, sizes.width, generator=torch.Generator().manual_seed(1)), None)


def make_signal(spec: SignalSpec, sizes: Sizes, positions: int, teacher: str, head: Head | None = None) -> Signal:
    """A signal of random values as a teacher of the encoding's precision computes it, int8 of fp32 ones yet to be rounded; its
    digest of samples is yet to be set."""
    generator = torch.Generator().manual_seed(0)
    logprobs = log_rest = None
    if spec.kind in ("dense", "hidden"):
        values = torch.randn(positions, sizes.classes if spec.kind == "dense" else sizes.width, generator=generator)
    elif spec.kind == "argmax":
        values = torch.randint(sizes.classes, (positions,), generator=generator)
    else:
        values = torch.randint(sizes.classes, (positions, spec.k), generator=generator)
    if spec.kind == "topk":
        logprobs = torch.randn(positions, spec.k + 1, generator=generator).log_softmax(-1)
        logprobs, log_rest = logprobs[:, :-1].contiguous(), logprobs[:, -1].contiguous()
    head = (head or make_head(sizes)) if spec.kind == "hidden" else None
    signal = Signal(spec, teacher, "", values, head, logprobs, log_rest)
    return signal if spec.encoding == "int8" else pack(signal)


def cut(signal: Signal, batch: Batch) -> Signal:
    """The answer for `batch`: the first positions of a prepared signal, views."""
    rows = slice(batch.labelled)
    return replace(signal.map(lambda tensor: tensor[rows]), samples=batch.digest)


class PreparedReplica:
    """What megapd's server asks: views of tensors that are made once a kind."""

    def __init__(self, trajectory: Any, sizes: Sizes) -> None:
        self.trajectory, self.classes = trajectory, sizes.classes
        self._sizes = sizes
        self._digest = trajectory.checkpoint(STEP).digest
        self.held: tuple[str, ...] = (self._digest,)
        self._signals: dict[str, Signal] = {}
        self._head = make_head(sizes)

    def prepare(self, step: int) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def signal(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        found = self._signals.get(spec.parameters)
        if found is None or found.values.shape[0] < batch.labelled:
            found = make_signal(spec, self._sizes, TOGETHER * batch.labelled, self._digest, self._head)
            self._signals[spec.parameters] = found
        return cut(found, batch)

    def head(self, step: int) -> Head:
        return self._head

    def idle(self) -> None: ...


# ---------------------------------------------------------------------------------------------------- the bare carriers


class RawFlight(flight.FlightServerBase):
    """Answers every call with one constant record batch of as many bytes as the call names."""

    def __init__(self, tls: tuple[bytes, bytes] | None) -> None:
        scheme = "grpc+tls" if tls else "grpc"
        super().__init__(f"{scheme}://127.0.0.1:0", tls_certificates=[tls] if tls else None)
        self._records: dict[int, pa.RecordBatch] = {}

    def do_get(self, context: Any, ticket: flight.Ticket) -> flight.RecordBatchStream:
        record = self._record(int(ticket.ticket))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(record.schema, [record]))

    def do_exchange(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        record = self._record(int(descriptor.command))
        writer.begin(record.schema)
        writer.write_batch(record)

    def _record(self, size: int) -> pa.RecordBatch:
        if size not in self._records:
            data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
            self._records[size] = pa.RecordBatch.from_arrays([pa.array(data)], names=["data"])
        return self._records[size]


def fill(connection: Connection, memory: SharedMemory) -> None:
    """The teacher's end of the ring: copies constant bytes into the place that it is told."""
    assert memory.buf is not None
    whole = np.frombuffer(memory.buf, dtype=np.uint8)
    source = np.random.default_rng(0).integers(0, 256, len(whole), dtype=np.uint8)
    while True:
        try:
            start, size = connection.recv()
        except EOFError:
            return
        np.copyto(whole[start : start + size], source[:size])
        connection.send(start)


# ------------------------------------------------------------------------------------------------------- the process


class PreparedServer:
    """The process, and its ports: `plain` and, with a certificate, `tls` of megapd's server; `raw` and `raw_tls` of Arrow's."""

    def __init__(self, sizes: Sizes, trajectory: Path | None = None, tls: tuple[Path, Path] | None = None, ring: int = 0) -> None:
        """trajectory: folder of the checkpoint that is stood in for; None: OneCheckpoint. tls: certificate and key, PEM.
        ring: bytes of the bare ring in shared memory."""
        context = multiprocessing.get_context("spawn")
        self.ring, theirs = context.Pipe()
        self._control, control = context.Pipe()
        self.memory = SharedMemory(create=True, size=ring) if ring else None
        name = None if self.memory is None else self.memory.name
        arguments = (sizes, trajectory, tls, name, theirs, control)
        self._process = context.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        control.close()
        self.ports: dict[str, int] = self._control.recv()

    def cpu_seconds(self) -> float:
        """Of the process since its start."""
        self._control.send("cpu")
        return float(self._control.recv())

    def close(self) -> None:
        self._control.send("close")
        self._process.join(30)
        self.ring.close()
        if self.memory is not None:
            self.memory.close()
            self.memory.unlink()


def _main(
    sizes: Sizes,
    trajectory: Path | None,
    tls: tuple[Path, Path] | None,
    memory: str | None,
    ring: Connection,
    control: Connection,
) -> None:
    torch.set_num_threads(1)  # it shares the host with the student
    replica = PreparedReplica(OneCheckpoint(sizes) if trajectory is None else Trajectory(trajectory), sizes)
    stop = threading.Event()
    certificate = [] if tls is None else [f"--teacher.server.certificate={tls[0]}", f"--teacher.server.key={tls[1]}"]
    threads, ports = [], {}
    for name, extra in {"plain": [], **({"tls": certificate} if certificate else {})}.items():
        started, port = threading.Event(), [0]
        threads.append(threading.Thread(target=_serve, args=(replica, extra, stop, started, port)))
        threads[-1].start()
        started.wait()
        ports[name] = port[0]
    raw = [RawFlight(None), *([] if tls is None else [RawFlight((tls[0].read_bytes(), tls[1].read_bytes()))])]
    ports |= dict(zip(("raw", "raw_tls"), (server.port for server in raw), strict=False))
    if memory is not None:
        place = SharedMemory(memory)
        threading.Thread(target=fill, args=(ring, place), daemon=True).start()
    control.send(ports)
    while control.recv() == "cpu":
        control.send(time.process_time())
    stop.set()
    for server in raw:
        server.shutdown()
    for thread in threads:
        thread.join()


def _serve(replica: PreparedReplica, extra: list[str], stop: threading.Event, started: threading.Event, port: list[int]) -> None:
    def ready(found: int) -> None:
        port[0] = found
        started.set()

    fixed = ["--teacher.trajectory=unused", "--teacher.server.port=0", "--schedule.policy=one_shot"]
    serve(load(None, [*fixed, *extra]), replica, ready=ready, stop=stop)
