"""The served teacher: one replica behind Arrow Flight, answering students over TCP or into their shared memory.

    do_exchange  a question in, signals or, for students that receive hidden states, the output layer out (wire/messages.py)
    do_action    trajectory, prepare, health, capacity

Everything else is refused. Nothing is unpickled, no call names a file, and no answer depends on what was asked before.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from megapd.errors import UserError
from megapd.models import Shape, checkpoint_shape
from megapd.signals import encode, not_finite
from megapd.teacher.server.dispatch import Answer, Dispatcher, Job, Replica
from megapd.teacher.server.metrics import Metrics
from megapd.teacher.wire.calls import encode_catalogue, parse_head_question, parse_json, parse_teacher
from megapd.teacher.wire.messages import HEAD, KIND_BYTES, SIGNAL, Parts, pieces, stream_parts
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import Request, check_request, decode_request
from megapd.teacher.wire.shared_memory import Mappings, write
from megapd.trajectory import Checkpoint
from megapd.trajectory.reader import nearest_steps

log = logging.getLogger(__name__)

GONE_SECONDS = 0.5  # a handler looks whether its client is still there this often
SWEEP_SECONDS = 10.0  # between looks for clients' memory that nobody else has any more
LONGEST_WAIT = 30.0  # seconds that `prepare` may wait for staging


class _Token(flight.ServerMiddlewareFactory):  # type: ignore[misc] # pyarrow has no types
    """Refuses calls without the bearer token, before anything of them is read."""

    def __init__(self, expected: bytes, metrics: Metrics) -> None:
        super().__init__()
        self._expected, self._metrics = expected, metrics

    def start_call(self, info: Any, headers: dict[str, list[str | bytes]]) -> None:
        given = headers.get("authorization", [])
        found = given[0] if len(given) == 1 else b""
        found = found.encode("utf-8", "surrogateescape") if isinstance(found, str) else found
        if not hmac.compare_digest(found, self._expected):  # takes the same time wherever they differ
            self._metrics.requests.labels("any", "token").inc()
            text = "the bearer token is missing or another; student and teacher need one teacher.token"
            raise Refused("token", text).as_flight()


class TeacherFlight(flight.FlightServerBase):  # type: ignore[misc] # pyarrow has no types
    """The Flight service of one replica. Answers from its construction on, as far as `dispatcher` runs; `shutdown` ends it."""

    def __init__(
        self,
        location: str,
        dispatcher: Dispatcher,
        *,
        token: bytes | None = None,
        tls: tuple[bytes, bytes] | None = None,
        client_authority: bytes | None = None,
    ) -> None:
        """location: grpc://HOST:PORT, grpc+tls:// with TLS. token: the authorization header. tls: PEM of certificate, key.
        client_authority: PEM, mutual TLS."""
        self._dispatcher, self._metrics = dispatcher, dispatcher.metrics
        self._replica: Replica = dispatcher.replica
        self._checkpoints: dict[int, Checkpoint] = {}
        self._shapes: dict[str, Shape] = {}  # by digest
        self._mappings = Mappings()
        self._swept = time.monotonic()
        super().__init__(
            location,
            tls_certificates=[tls] if tls else None,
            verify_client=client_authority is not None,
            root_certificates=client_authority,
            middleware=None if token is None else {"token": _Token(token, self._metrics)},
        )

    # --------------------------------------------------------------------------------------------------------- calls

    def do_exchange(self, context: Any, descriptor: flight.FlightDescriptor, reader: Any, writer: Any) -> None:
        is_command = descriptor.descriptor_type == flight.DescriptorType.CMD
        command = descriptor.command if is_command else b""
        kind, question = command[:KIND_BYTES], pa.py_buffer(command).slice(min(KIND_BYTES, len(command)))
        answers = {SIGNAL: self._signal, HEAD: self._head}
        with self._told(kind.decode().strip() if kind in answers else "unknown", context.is_cancelled):
            if kind not in answers:
                text = "descriptor: a command begins with signal or head"
                raise Refused("invalid", f"{text}; student and teacher may run different versions of megapd")
            parts, length = answers[kind](question, context.is_cancelled)
            self._metrics.bytes.inc(length)
            for message in pieces(parts, length):
                writer.write_metadata(message)

    def _signal(self, question: pa.Buffer, gone: Callable[[], bool]) -> tuple[Parts, int]:
        """(what is sent, the answer's bytes, sent or written into the client's memory)."""
        self._dispatcher.check_open()
        request = decode_request(question)
        checkpoint = self._checkpoint(request.step, request.teacher)
        if request.teacher not in self._shapes:
            self._shapes[request.teacher] = checkpoint_shape(checkpoint)
        check_request(request, self._shapes[request.teacher])
        # Opened before the forward pass, which would be in vain where the memory cannot be reached.
        memory = None if request.memory is None else self._mappings.open(request.memory)
        job = Job(request.step, request.teacher, request, gone)
        record = self.respond(request, self._wait(job))
        self._sweep()
        return stream_parts(record.schema, [record]) if memory is None else ([], write(record, memory))

    def _head(self, question: pa.Buffer, gone: Callable[[], bool]) -> tuple[Parts, int]:
        step, teacher = parse_head_question(question.to_pybytes())
        self._checkpoint(step, teacher)
        return stream_parts(*self._wait(Job(step, teacher, None, gone)))

    def do_action(self, context: Any, action: flight.Action) -> list[bytes]:
        answers: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "trajectory": self._trajectory,
            "prepare": self._prepare,
            "health": self._health,
            "capacity": self._capacity,
        }
        with self._told(action.type if action.type in answers else "unknown", context.is_cancelled):
            if action.type not in answers:
                raise Refused("invalid", f"action: there are {', '.join(answers)}")
            return [answers[action.type](parse_json(action.body.to_pybytes()))]

    def _no(self, *_: Any) -> Any:
        self._metrics.requests.labels("unknown", "invalid").inc()
        raise Refused("invalid", "a teacher knows do_exchange and do_action alone").as_flight()

    list_actions = list_flights = get_flight_info = get_schema = do_get = do_put = _no

    def respond(self, request: Request, answer: Answer) -> pa.RecordBatch:
        """The record batch that goes back. On the handler's thread, so that the engine's goes on with the next forward pass."""
        if not answer.signal.finite():
            raise Refused("not_finite", not_finite(request.step))
        return encode(answer.signal, request.batch, answer.classes)

    # ------------------------------------------------------------------------------------------------------- actions

    def _trajectory(self, body: dict[str, Any]) -> bytes:
        """The steps there are, and the description of those in `steps`; without it, of all."""
        trajectory = self._replica.trajectory
        wanted = body.get("steps")
        whole = isinstance(wanted, list) and all(type(step) is int and 0 <= step < 1 << 50 for step in wanted)
        if wanted is not None and not whole:
            raise Refused("invalid", "trajectory: steps is a list of whole numbers")
        steps = trajectory.steps if wanted else trajectory.refresh()
        wanted = steps if wanted is None else wanted
        there = [step for step in sorted(set(wanted)) if step in self._checkpoints or trajectory.written(step)]
        return encode_catalogue(sorted({*steps, *there}), [self._known(step) for step in there])

    def _prepare(self, body: dict[str, Any]) -> bytes:
        """{"ready": whether it is verified and staged}; wait: seconds to wait for that."""
        step, teacher = parse_teacher(body.get("step"), body.get("teacher"))
        wait = body.get("wait", 0.0)
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0.0 <= wait <= LONGEST_WAIT:
            raise Refused("invalid", f"prepare: wait is a number of seconds, {LONGEST_WAIT:g} at most")
        self._checkpoint(step, teacher)
        ready = teacher in self._replica.held
        if not ready:
            staged = self._replica.prepare(step)
            ready = bool(futures.wait([staged], wait).done)
            if ready:
                staged.result()
        return json.dumps({"ready": ready}).encode()

    def _health(self, _: dict[str, Any]) -> bytes:
        return json.dumps({"draining": self._dispatcher.draining}).encode()

    def _capacity(self, _: dict[str, Any]) -> bytes:
        figures = {name: getattr(self._dispatcher, name) for name in ("queued", "limit", "tokens_per_second", "draining")}
        return json.dumps({**figures, "resident": list(self._replica.held)}).encode()

    def _known(self, step: int) -> Checkpoint:
        if step not in self._checkpoints:
            trajectory = self._replica.trajectory
            if not trajectory.written(step):
                nearest = ", ".join(map(str, nearest_steps(trajectory.steps, step))) or "none"
                raise Refused("absent", f"no checkpoint of teacher step {step} here; the nearest: {nearest}")
            self._checkpoints[step] = trajectory.checkpoint(step)
        return self._checkpoints[step]

    def _checkpoint(self, step: int, teacher: str) -> Checkpoint:
        found = self._known(step)
        if found.digest != teacher:
            text = f"teacher step {step} here has digest {found.digest}, but the student's schedule names {teacher}"
            raise Refused("wrong_teacher", f"{text}; teacher.trajectory and the server's are different runs")
        return found

    def _wait(self, job: Job) -> Any:
        """What the engine thread makes of the job. Raises Refused where it cannot, or nobody waits for it any more."""
        self._dispatcher.submit(job)
        while not futures.wait([job.answer], GONE_SECONDS).done:
            if job.gone():
                self._dispatcher.forget(job)
                raise Refused("failed", "nobody waits for the answer any more")
        return job.answer.result()

    @contextlib.contextmanager
    def _told(self, call: str, gone: Callable[[], bool]) -> Iterator[None]:
        """Counts a call's outcome, and turns what goes wrong into the Flight error that tells the client so."""
        outcome: str = "ok"
        try:
            yield
        except Exception as error:
            refused = error if isinstance(error, Refused) else Refused("failed", f"the teacher failed: {error}")
            if isinstance(error, UserError):
                log.error("%s: %s", call, error)
                refused = Refused("failed", str(error))
            elif refused is not error and not gone():
                log.exception("%s: a call failed", call)
            outcome = refused.kind
            raise refused.as_flight() from error
        finally:
            self._metrics.requests.labels(call, "dropped" if gone() else outcome).inc()

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._mappings.sweep()
