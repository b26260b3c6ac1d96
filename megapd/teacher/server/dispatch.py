"""The queue of a teacher replica and the one thread that answers it: small requests together, rotations seldom, none starved."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch

from megapd.batch import Batch
from megapd.signals import Head, Signal, SignalSpec, encode_head
from megapd.teacher.server.metrics import Metrics
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import Request
from megapd.trajectory import Checkpoints

log = logging.getLogger(__name__)

IDLE_SECONDS = 10.0  # a replica that nothing is asked of hears from its engine thread this often
POLL_SECONDS = 0.2  # the engine thread looks whether it should end this often
PATIENCE_SECONDS = 2.0  # a request for another checkpoint waits this long, then the teacher rotates; and it rotates no more often
HEADS = 2  # that stay encoded on the host: of the present teacher and the next
RATE_HALF_LIFE = 20.0  # forward passes


class Replica(Protocol):
    """One copy of the teacher: megapd.teacher.engine.replica, or a test's."""

    @property
    def trajectory(self) -> Checkpoints: ...

    @property
    def held(self) -> tuple[str, ...]:
        """Digests of the checkpoints in memory; from any thread."""

    @property
    def classes(self) -> int:
        """Of the head, once a checkpoint was held."""

    def prepare(self, step: int) -> Future[Any]:
        """Stage and verify a checkpoint in the background; from any thread."""

    def signal(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        """On the host, packed or not. The engine thread alone, as what follows. Rotates first if the checkpoint is not held."""

    def head(self, step: int) -> Head: ...

    def idle(self) -> None: ...


class Answer(NamedTuple):
    """What the engine thread hands back. classes: of the teacher's head."""

    signal: Signal
    classes: int


EncodedHead = tuple[pa.Schema, list[pa.RecordBatch]]


@dataclass(eq=False)
class Job:
    """A request in the queue. request: None where the head is asked for. gone: whether nobody waits for the answer any more.
    staged: when its checkpoint is ready to be rotated to; None: it is in memory. answer: an Answer, or the head's EncodedHead."""

    step: int
    teacher: str
    request: Request | None
    gone: Callable[[], bool]
    staged: Future[Any] | None = None
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)

    @property
    def tokens(self) -> int:
        return 0 if self.request is None else self.request.batch.tokens

    @property
    def key(self) -> tuple[object, ...]:
        """Jobs of equal keys can be answered together."""
        if self.request is None:
            return self.teacher, "head"
        batch = self.request.batch
        return self.teacher, self.request.spec.parameters, batch.ids.shape[1], batch.segments is None, batch.lengths is None

    @property
    def ready(self) -> bool:
        return self.staged is None or self.staged.done()

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Dispatcher:
    """`submit` from any thread; `run` on the engine thread."""

    def __init__(self, replica: Replica, metrics: Metrics, *, limit: int, token_budget: int) -> None:
        """limit: jobs that wait at most. token_budget: jobs are put together up to so many tokens; a larger one goes alone."""
        self.replica, self.metrics, self.limit = replica, metrics, limit
        self.draining = False
        self.tokens_per_second = 0.0
        self._budget = token_budget
        self._waiting: list[Job] = []  # in the order of their arrival
        self._changed = threading.Condition()
        self._teacher = ""  # answered last
        self._rotated = float("-inf")
        self._heads: dict[str, EncodedHead] = {}
        self._called = time.monotonic()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    def check_open(self) -> None:
        """Refused, kind draining or busy, where `submit` would refuse too."""
        if self.draining:
            raise Refused("draining", "this teacher is about to end; ask another replica")
        if len(self._waiting) >= self.limit:
            raise Refused("busy", f"the teacher's queue of {self.limit} requests is full; come again")

    def submit(self, job: Job) -> None:
        """Put a job into the queue; its future tells the rest. Refused, kind busy or draining, if there is no place for it."""
        if job.teacher not in self.replica.held:
            job.staged = self.replica.prepare(job.step)
        with self._changed:
            self.check_open()
            self._waiting.append(job)
            self._note()
        if job.staged is not None:
            job.staged.add_done_callback(self._wake)

    def forget(self, job: Job) -> None:
        """Its client has gone."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._note()

    def run(self, stop: threading.Event, drain_seconds: float) -> None:
        """Answer jobs until `stop`, then those in the queue, for at most drain_seconds; what is left is refused."""
        try:
            while not stop.is_set():
                self.turn(POLL_SECONDS)
            self.drain()
            end = time.monotonic() + drain_seconds
            while self._waiting and time.monotonic() < end:
                self.turn(min(POLL_SECONDS, drain_seconds))
        finally:
            self.drain()
            with self._changed:
                left, self._waiting = self._waiting, []
                self._note()
            for job in left:
                job.fail(Refused("draining", "this teacher ended before the answer was made; ask another replica"))

    def drain(self) -> None:
        """From now on nothing new is taken."""
        self.draining = True
        self.metrics.draining.set(1)

    def turn(self, seconds: float) -> None:
        """Answer what can be answered together, waiting for it up to `seconds`."""
        jobs = self._take(seconds)
        if jobs:
            self._answer(jobs)
            self._called = time.monotonic()
        elif time.monotonic() - self._called > IDLE_SECONDS:
            self.replica.idle()
            self._called = time.monotonic()

    # -------------------------------------------------------------------------------------------------------- choice

    def _wake(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _note(self) -> None:
        self.metrics.queue.set(len(self._waiting))
        self._changed.notify_all()

    def _take(self, seconds: float) -> list[Job]:
        with self._changed:
            if not any(job.ready for job in self._waiting):
                self._changed.wait(seconds)
            ready = [job for job in self._waiting if job.ready]
            if not ready:
                return []
            chosen = self._together(self._first(ready, time.monotonic()), ready)
            self._waiting = [job for job in self._waiting if job not in chosen]
            self._note()
        now = time.monotonic()
        for job in chosen:
            self.metrics.seconds.labels("queue").observe(now - job.arrived)
            if job.gone():
                job.fail(Refused("failed", "nobody waits for the answer any more"))
        return [job for job in chosen if not job.answer.done()]  # where staging failed, the replica tells why, and forgets it

    def _first(self, ready: list[Job], now: float) -> Job:
        """The oldest for the present checkpoint, else for one in memory, else of all; but whoever waits longer than the patience
        goes first once the present checkpoint had its time, so that with n checkpoints asked for nobody waits longer than n
        times the patience and their forward passes."""
        oldest = ready[0]
        if now - oldest.arrived > PATIENCE_SECONDS and now - self._rotated > PATIENCE_SECONDS:
            return oldest
        held = self.replica.held
        present = (job for job in ready if job.teacher == self._teacher)
        resident = (job for job in ready if job.teacher in held)
        return next(present, None) or next(resident, oldest)

    def _together(self, first: Job, ready: list[Job]) -> list[Job]:
        chosen, tokens = [first], first.tokens
        for job in ready:
            if job is not first and job.key == first.key and tokens + job.tokens <= self._budget:
                chosen.append(job)
                tokens += job.tokens
        return chosen

    # ------------------------------------------------------------------------------------------------------- answers

    def _answer(self, jobs: list[Job]) -> None:
        """Errors are told to whoever asked. Only a broken accelerator, which fails whatever comes next, ends the server."""
        for group in (jobs, *([job] for job in jobs)):
            left = [job for job in group if not job.answer.done()]
            if not left:
                continue
            try:
                self._forward(left) if left[0].request else self._head(left)
            except torch.AcceleratorError as error:
                for job in jobs:
                    job.fail(Refused("draining", f"the teacher's device failed: {error}"))
                raise
            except Exception as error:
                if len(left) > 1:  # one of them may be at fault: each alone
                    log.warning("%d requests failed together, each is tried alone: %s", len(left), error)
                elif isinstance(error, Refused):
                    left[0].fail(error)
                else:
                    log.exception("teacher step %d: a request failed", left[0].step)
                    left[0].fail(Refused("failed", f"the teacher failed: {error}"))

    def _forward(self, jobs: list[Job]) -> None:
        requests = [job.request for job in jobs if job.request is not None]
        # One question of several ranks, or repeated while its first answer is on its way, is answered once.
        unique = list({request.id: request for request in requests}.values())
        first = unique[0]
        batch = first.batch if len(unique) == 1 else Batch.concatenate([request.batch for request in unique])
        start = time.monotonic()
        signal = self.replica.signal(first.step, batch, first.spec)
        self._rotated_to(first.teacher)
        if signal.teacher != first.teacher:
            text = f"teacher step {first.step}: the request names digest {first.teacher}, but {signal.teacher} answered"
            raise Refused("wrong_teacher", text)
        if signal.values.shape[0] != batch.labelled:
            raise RuntimeError(f"the teacher answered {signal.values.shape[0]} of {batch.labelled} positions")
        parts = split(signal, [request.batch for request in unique])
        answers = {request.id: Answer(part, self.replica.classes) for request, part in zip(unique, parts, strict=True)}
        for job, request in zip(jobs, requests, strict=True):
            job.answer.set_result(answers[request.id])
        seconds = time.monotonic() - start
        self.metrics.tokens.inc(batch.tokens)
        self.metrics.batch.observe(batch.samples)
        self.metrics.seconds.labels("forward").observe(seconds)
        rate, share = batch.tokens / max(seconds, 1e-9), 0.5 ** (1.0 / RATE_HALF_LIFE)
        self.tokens_per_second = rate if not self.tokens_per_second else share * self.tokens_per_second + (1.0 - share) * rate

    def _head(self, jobs: list[Job]) -> None:
        job = jobs[0]
        if job.teacher not in self._heads:
            head = self.replica.head(job.step)
            self._rotated_to(job.teacher)
            # A copy: the replica's own changes in place at the next rotation, while this one may still be on its way.
            weight = head.weight.detach().to("cpu", copy=True)
            bias = None if head.bias is None else head.bias.detach().to("cpu", copy=True)
            schema, batches = encode_head(Head(weight, bias), job.teacher)
            self._heads[job.teacher] = schema, list(batches)
            while len(self._heads) > HEADS:
                self._heads.pop(next(iter(self._heads)))
        for waiting in jobs:
            waiting.answer.set_result(self._heads[job.teacher])

    def _rotated_to(self, teacher: str) -> None:
        if teacher != self._teacher:
            self._teacher, self._rotated = teacher, time.monotonic()
            self.metrics.rotations.inc()
        self.metrics.resident.set(len(self.replica.held))


def split(signal: Signal, batches: Sequence[Batch]) -> list[Signal]:
    """The parts of a signal of concatenated batches, views."""
    parts, first = [], 0
    for batch in batches:
        rows = slice(first, first := first + batch.labelled)
        parts.append(replace(signal.map(itemgetter(rows)), samples=batch.digest))
    return parts
