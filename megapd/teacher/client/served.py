"""ServedStream: signals from teacher replicas over TCP or through shared memory, asked for steps ahead."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.flight as flight
import torch

from megapd.batch import Batch
from megapd.config import TeacherConfig
from megapd.errors import SignalDamaged, TeacherLost
from megapd.schedule.plan import Plan
from megapd.signals import Head, Signal, SignalSpec, decode, decode_head
from megapd.teacher.client.announce import Announcer
from megapd.teacher.client.replicas import Endpoints, Remote, Replicas
from megapd.teacher.wire.calls import encode_head_question
from megapd.teacher.wire.messages import HEAD, SIGNAL, answer_length, fill, read_stream, stream_bytes
from megapd.teacher.wire.refusals import Refused, refusal
from megapd.teacher.wire.requests import encode_request, with_memory
from megapd.teacher.wire.shared_memory import Slots
from megapd.trajectory import Checkpoint, Checkpoints

WORKERS = 8  # requests under way at once; a call takes little of the host while it waits
WRITTEN_SECONDS = 0.2  # between looks for a checkpoint that is still to be written
_NO_HEAD = Head(torch.empty(0, 0), None)  # while a record is checked


@dataclass
class _Asked:
    """A step that was asked for. deadline: monotonic, None until `signals` waits for it. dropped: nobody will."""

    step: int
    batches: Sequence[Batch]
    answers: list[Future[_Arrived]] = field(default_factory=list)
    deadline: float | None = None
    dropped: bool = False

    def drop(self) -> None:
        self.dropped = True
        self.deadline = 0.0
        for answer in self.answers:
            answer.cancel()


class _Arrived(NamedTuple):
    """A signal on the student's device. there: of an accelerator, after which it is."""

    signal: Signal
    there: torch.cuda.Event | None


class ServedStream:
    """Signals of a served teacher; see stream.Stream, whose contract it keeps.

    Requests go out on worker threads in the order in which they are made, round about the replicas, and are repeated elsewhere
    until `signals` has waited for teacher.deadline_seconds. What arrives is checked there too, against the schedule's digest and
    the batch's, and copied to the device. `counts`: requests, retries, damaged, refused, wrong_teacher, lost.
    """

    def __init__(
        self,
        config: TeacherConfig,
        plan: Plan,
        spec: SignalSpec,
        trajectory: Checkpoints,
        *,
        device: torch.device,
        shared_memory: bool,
        endpoints: Endpoints,
    ) -> None:
        """trajectory: resolves steps to digests. endpoints: closed with the stream. UserError as Replicas."""
        self.spec = spec
        self._plan, self._trajectory, self._device = plan, trajectory, device
        self._deadline_seconds = config.deadline_seconds
        self._replicas = Replicas(config, endpoints)
        self._shared_memory = shared_memory
        self._slots = Slots(shared_memory)
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="teacher-client")
        self._workers.submit(lambda: pa.array([0]).to_numpy())  # imports pandas, up to 1 s, beside what the student does first
        self._announcer = Announcer(self._replicas, trajectory)
        self._asked: dict[int, _Asked] = {}
        self._checkpoints: dict[int, Checkpoint] = {}
        self._heads: dict[str, tuple[threading.Lock, list[Head]]] = {}
        self._calls: set[Any] = set()
        self._lock = threading.Lock()
        self._local = threading.local()
        self._lost = 0

    @property
    def counts(self) -> dict[str, int]:
        return {**self._replicas.counts, "lost": self._lost}

    def ready(self, step: int) -> bool:
        teacher_step = self._plan.checkpoint_at(step)
        return teacher_step in self._checkpoints or self._trajectory.written(teacher_step)

    def teacher(self, step: int) -> Checkpoint:
        self._announce(step)
        return self._checkpoint(self._plan.checkpoint_at(step))

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        if not self._asked:
            self._announce(step)  # the first of all: no step teaches yet
        self._asked[step] = self._submit(step, batches)

    def signals(self, step: int, batches: Sequence[Batch]) -> list[Signal]:
        digests = [batch.digest for batch in batches]
        asked = self._asked.pop(step, None)
        if asked is None or [batch.digest for batch in asked.batches] != digests:
            if asked is not None:
                asked.drop()
            asked = self._submit(step, batches)
        for earlier in [other for other in self._asked if other < step]:
            self._asked.pop(earlier).drop()
        asked.deadline = time.monotonic() + self._deadline_seconds
        self._announce(step)
        try:
            arrived = self._wait(asked)
            checkpoint = self._checkpoint(self._plan.checkpoint_at(step))
            for signal, batch in zip(arrived, batches, strict=True):
                signal.check(checkpoint.digest, batch)
        except TeacherLost:
            self._lost += 1
            raise
        finally:
            asked.drop()
            self._forget_heads(step)
        return arrived

    def close(self) -> None:
        """Ends the requests under way; what was handed out stays valid."""
        self._replicas.close()
        for asked in self._asked.values():
            asked.drop()
        self._announcer.close()
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._slots.close()

    # ----------------------------------------------------------------------------------------------------- requests

    def _submit(self, step: int, batches: Sequence[Batch]) -> _Asked:
        asked = _Asked(step, batches)
        asked.answers = [self._workers.submit(self._fetch, asked, batch) for batch in batches]
        return asked

    def _wait(self, asked: _Asked) -> list[Signal]:
        """The answers on the device, in order, once all are there."""
        assert asked.deadline is not None
        arrived = []
        for answer in asked.answers:
            try:
                # A worker ends by itself at the deadline, unless it is in a call that began before the deadline was known.
                arrived.append(answer.result(max(0.0, asked.deadline + 0.5 - time.monotonic())))
            except FutureTimeout as error:
                if answer.done():
                    raise
                late = f"no signal within teacher.deadline_seconds {self._deadline_seconds:g}"
                raise TeacherLost(f"step {asked.step}: {late}; {self._replicas.describe()}") from error
            except TeacherLost as error:
                raise TeacherLost(f"{error} (teacher.deadline_seconds {self._deadline_seconds:g})") from error
        for found in arrived:
            if found.there is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(found.there)
                for tensor in (found.signal.values, found.signal.logprobs, found.signal.log_rest):
                    if tensor is not None:
                        tensor.record_stream(current)
        return [found.signal for found in arrived]

    def _fetch(self, asked: _Asked, batch: Batch) -> _Arrived:
        """One micro-batch's signal; on a worker."""
        checkpoint = self._resolve(asked)
        question = encode_request(checkpoint.step, checkpoint.digest, self.spec, batch)

        def do(remote: Remote, seconds: float) -> Signal:
            record = self._exchange(remote, question, seconds)
            try:
                return decode(record, self.spec, checkpoint.digest, batch, _NO_HEAD)
            except ValueError as error:  # of Arrow, for one: column names that are no UTF-8
                raise SignalDamaged(f"signal: {error}") from error

        signal = self._replicas.ask(f"step {asked.step}", do, lambda: asked.deadline)
        if self.spec.definition.with_head:
            signal = replace(signal, head=self._head(checkpoint, asked))
        return self._to_device(signal)

    def _resolve(self, asked: _Asked) -> Checkpoint:
        """The checkpoint that teaches the step, as soon as it is written."""
        teacher_step = self._plan.checkpoint_at(asked.step)
        while teacher_step not in self._checkpoints and not self._trajectory.written(teacher_step):
            if self._replicas.closed.wait(WRITTEN_SECONDS) or asked.dropped:
                raise CancelledError
            if asked.deadline is not None and time.monotonic() > asked.deadline:
                raise TeacherLost(f"step {asked.step}: the teacher's checkpoint of step {teacher_step} is not written")
        return self._checkpoint(teacher_step)

    def _checkpoint(self, teacher_step: int) -> Checkpoint:
        if teacher_step not in self._checkpoints:
            self._checkpoints[teacher_step] = self._trajectory.checkpoint(teacher_step)
        return self._checkpoints[teacher_step]

    def _exchange(self, remote: Remote, question: pa.RecordBatch, seconds: float) -> pa.RecordBatch:
        slot = self._slots.take()
        while True:
            asked = with_memory(question, slot.memory) if self._shared_memory else question
            try:
                with self._answer(remote, SIGNAL + stream_bytes(asked), seconds) as (length, pieces):
                    if length > slot.size and not self._shared_memory:
                        slot.grow(length)
                    fill(slot.writable(0 if self._shared_memory else length), pieces)
            except Refused as error:
                # The teacher has spoken, so it does not write into the slot any more.
                if error.kind != "small" or error.needed <= slot.size:
                    self._slots.give(slot)
                    raise
                slot.grow(error.needed)
            except BaseException:
                if self._shared_memory:
                    slot.close()  # a teacher that was given up may still write: into memory that nobody reads
                else:
                    self._slots.give(slot)
                raise
            else:
                return self._slots.read(slot, length)

    @contextlib.contextmanager
    def _answer(self, remote: Remote, command: bytes, seconds: float) -> Iterator[tuple[int, Iterator[pa.Buffer]]]:
        """(length of the answer, its pieces). Raises Refused, SignalDamaged, or Flight's errors."""
        try:
            descriptor = flight.FlightDescriptor.for_command(command)
            writer, reader = remote.client.do_exchange(descriptor, remote.options(seconds))
            with self._lock:
                self._calls.add(reader)  # for `close` to cancel, which may have looked before
            try:
                if self._replicas.closed.is_set():
                    reader.cancel()
                with writer:
                    writer.done_writing()
                    messages = (chunk.app_metadata or pa.py_buffer(b"") for chunk in reader)
                    length, first = answer_length(next(messages, pa.py_buffer(b"")))
                    yield length, itertools.chain([first], messages)
            finally:
                with self._lock:
                    self._calls.discard(reader)
        except (flight.FlightError, pa.ArrowException) as error:
            raise (refusal(error) or error) from error

    # -------------------------------------------------------------------------------------------------- heads, device

    def _head(self, checkpoint: Checkpoint, asked: _Asked) -> Head:
        """The checkpoint's head on the device, fetched by the first worker that needs it."""
        with self._lock:
            lock, found = self._heads.setdefault(checkpoint.digest, (threading.Lock(), []))
        with lock:
            if not found:
                what = f"step {asked.step}: the head of teacher step {checkpoint.step}"

                def do(remote: Remote, seconds: float) -> Head:
                    question = HEAD + encode_head_question(checkpoint.step, checkpoint.digest)
                    with self._answer(remote, question, seconds) as (length, pieces):
                        buffer = pa.allocate_buffer(length)
                        fill(memoryview(buffer).cast("B"), pieces)
                    return decode_head(*read_stream(buffer), checkpoint.digest)

                found.append(self._replicas.ask(what, do, lambda: asked.deadline).to(self._device))
            return found[0]

    def _forget_heads(self, step: int) -> None:
        """Of teachers that neither this step nor one that is asked for has."""
        steps = {self._plan.checkpoint_at(asked) for asked in (step, *self._asked)}
        needed = {self._checkpoints[teacher].digest for teacher in steps if teacher in self._checkpoints}
        with self._lock:
            for digest in self._heads.keys() - needed:
                if not self._heads[digest][0].locked():
                    del self._heads[digest]

    def _to_device(self, signal: Signal) -> _Arrived:
        if self._device.type != "cuda":
            return _Arrived(signal, None)
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._local.stream):
            copied = signal.map(lambda tensor: tensor.pin_memory().to(self._device, non_blocking=True))
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record()
        return _Arrived(copied, there)

    def _announce(self, step: int) -> None:
        """The replicas stage the checkpoint of the next rotation, as soon as the present one teaches."""
        following = self._plan.next_after(step)
        if following is not None:
            self._announcer.announce(*following)
