"""The teacher: checkpoints of a trajectory held in memory, one or a few at a time, swapped in place at a rotation.

A rotation has three phases. prepare: a thread reads this rank's parts of the next checkpoint into (pinned) host memory and
verifies its files' sha256, which the ranks divide among them. commit: `rotate` agrees with the other ranks that all are ready and
copies the parts over a holder's weights. retire: the holder that was used longest ago is the one that is overwritten; with
`resident` above 1 an older checkpoint can still be asked for until then.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.models.from_checkpoint import build_teacher, canary, check_architecture, checkpoint_shape, read_parts
from megapd.signals import DTYPES, Answer, Head, Signal, SignalSpec, TeacherOutput, pack
from megapd.teacher.engine.holders import HOLDERS, Holder, WholeHolder, stage
from megapd.trajectory import Checkpoint, Checkpoints, check_files
from megapd.world import World

log = logging.getLogger(__name__)


POLL_SECONDS = 0.2


# Of the largest hidden state: rounding in another order, a few units in the last place a layer.
SELF_TEST_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2}


READER_NICENESS = 10  # about a tenth of the share of a thread that computes


STAGED = 4  # checkpoints prepared and not yet used that are kept at most, beside those that fit into holders


@dataclass(frozen=True)
class Demands:
    """What the student's task demands of a teacher; None: nothing, where clients check (a server).

    vocabulary        digest that a checkpoint must have
    same_vocabulary   a checkpoint that has none is trusted
    length            tokens a sample
    """

    vocabulary: str | None = None
    same_vocabulary: bool = False
    length: int | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        """UserError unless the checkpoint can teach the task."""
        if self.vocabulary is not None and not (self.same_vocabulary and not checkpoint.vocabulary):
            if not checkpoint.vocabulary:
                raise UserError(
                    f"teacher.same_vocabulary: {checkpoint.path} does not say which tokenizer it was trained with; "
                    "if its ids mean what the task's do, set this to true"
                )
            if checkpoint.vocabulary != self.vocabulary:
                raise UserError(
                    f"teacher.trajectory: {checkpoint.path} has vocabulary {checkpoint.vocabulary[:12]}, but the student's "
                    f"task has {self.vocabulary[:12]}; teacher and student need the same tokenizer or task parameters"
                )
        length = checkpoint_shape(checkpoint).length
        if self.length is not None and length is not None and length < self.length:
            raise UserError(
                f"teacher.trajectory: the teacher was trained on {length} tokens a sample, "
                f"the student's task has {self.length}; shorten corpus.block_length, or choose another teacher"
            )


@dataclass(frozen=True)
class TeacherOptions:
    """How a teacher is held; see TeacherConfig.

    chunk_bytes   most bytes of logits alive at once; None: the kernels' default
    wait_seconds  how long `rotate` waits for a checkpoint that is still to be written; None: it must be there
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sharding: Literal["whole", "zero", "tensor"] = "whole"
    resident: int = 1
    chunk_bytes: int | None = None
    wait_seconds: float | None = None


class Staged(NamedTuple):
    """A checkpoint whose files were verified, this rank's weights of it, and whether a test batch has passed them."""

    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    tested: bool


class Teacher:
    """Answers batches with signals of the checkpoint it holds.

    With options.sharding other than whole, all ranks of `world` call `rotate`, `signal` and `head` together.
    """

    def __init__(self, trajectory: Checkpoints, world: World, options: TeacherOptions, demands: Demands | None = None) -> None:
        self.trajectory, self.world, self.options = trajectory, world, options
        self.held: Checkpoint | None = None
        self._demands = demands if demands is not None else Demands()
        self._slots: OrderedDict[int, tuple[Checkpoint, Holder]] = OrderedDict()  # by teacher step, the last used at the end
        self._spare: list[Holder] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-reader", initializer=_give_way)
        self._ahead: OrderedDict[int, Future[Staged]] = OrderedDict()
        self._told: set[tuple[int, str]] = set()
        self._lock = threading.Lock()  # of _ahead: a server prepares from its request threads
        self._built, self._closed = threading.Event(), threading.Event()

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the checkpoints in memory, the last used at the end."""
        return tuple(checkpoint.digest for checkpoint, _ in list(self._slots.values()))

    @property
    def sharded(self) -> bool:
        return self.options.sharding != "whole" and self.world.size > 1

    @property
    def classes(self) -> int:
        """Of the head of the checkpoint that is held."""
        return self._holder.classes

    def prepare(self, step: int) -> Future[Staged]:
        """Start reading the checkpoint of teacher step `step`, as soon as it is written. From any thread."""
        with self._lock:
            future = self._ahead.get(step)
            if future is None or _failed(future):  # what failed may have been mended
                future = self._reader.submit(self._read, step)
                future.add_done_callback(lambda done: self._report(step, done))
                self._ahead[step] = future
                while len(self._ahead) > STAGED + self.options.resident:
                    self._ahead.popitem(last=False)[1].cancel()
            return future

    def holds(self, step: int) -> bool:
        return step in self._slots

    def ready(self, step: int) -> bool:
        """Whether `rotate(step)` would not wait; begins to prepare it if nothing has."""
        if not self._built.is_set():  # what this rank is to read is not known before the first `rotate`
            return self.trajectory.written(step)
        return step in self._slots or self.prepare(step).done()

    def open(self, step: int) -> None:
        """Build the model that the checkpoint of `step` describes, so that `prepare` can read. Sharded, on all ranks together."""
        if not self._built.is_set():
            wait = self.options.wait_seconds
            checkpoint = self.trajectory.checkpoint(step) if wait is None else self.trajectory.wait_for(step, wait)
            self._demands.check(checkpoint)
            self._first = self._build(checkpoint)
            self._spare.append(self._first)
            self._built.set()

    def rotate(self, step: int) -> Checkpoint:
        """Hold the checkpoint of teacher step `step` from now on.

        Raises UserError if it is missing, damaged, or of another vocabulary or architecture; CheckpointTimeout if it was not
        written within wait_seconds from now, however long ago it was prepared. Sharded, every rank raises if one does.
        """
        self.open(step)
        if step not in self._slots:
            checkpoint, tensors, tested = self._prepared(step)
            holder = self._free_holder(checkpoint)
            holder.load(tensors)
            if not (tested and self._tested):
                self._test(holder, checkpoint)
            self._slots[step] = (checkpoint, holder)
        self._slots.move_to_end(step)
        self.held, self._holder = self._slots[step]
        return self.held

    @torch.no_grad()
    def signal(self, batch: Batch, spec: SignalSpec, *, common: bool = False) -> Signal:
        """The signal for the labelled positions of `batch`; `as_sent` of it is what a student is to learn from.

        On an accelerator it is packed there, so that it leaves it in few bytes; on the host it is as it was computed, to be
        rounded by the thread that encodes it, beside the next forward pass.

        common: the ranks of a sharded teacher were given the same batch, and each gets its signal; else each has its own.
        """
        assert self.held is not None, "rotate() comes before signal()"
        found = self._answer_each(batch, spec) if self._one_batch and not common else self._answer(batch, spec)
        head = self.head() if spec.definition.with_head else None
        signal = Signal(spec, self.held.digest, batch.digest, found.values, head, found.logprobs, found.log_rest)
        return signal if self.world.device.type == "cpu" else pack(signal)

    @torch.no_grad()
    def head(self) -> Head:
        """The head of the checkpoint that is held, whole on every rank; gathered once a rotation where it is sharded."""
        assert self.held is not None, "rotate() comes before head()"
        with self._holder.head() as (head, shard):
            if not self.sharded:
                return head
            if self._gathered[0] != self.held.digest:
                if shard is None:  # gathered by ZeRO for the time of this block alone
                    whole = Head(head.weight.clone(), None if head.bias is None else head.bias.clone())
                else:
                    whole = Head(shard.whole(head.weight), None if head.bias is None else shard.whole(head.bias))
                self._gathered = (self.held.digest, whole)
        whole_head = self._gathered[1]
        assert whole_head is not None
        return whole_head

    def close(self) -> None:
        self._closed.set()
        self._reader.shutdown(wait=False, cancel_futures=True)

    _first: Holder
    _holder: Holder
    _tested = False
    _gathered: tuple[str | None, Head | None] = (None, None)  # (teacher's digest, its whole head)

    @property
    def _one_batch(self) -> bool:
        """Whether all ranks have to run the same batch at once."""
        return self.options.sharding == "tensor" and self.world.size > 1

    def _answer(self, batch: Batch, spec: SignalSpec) -> Answer:
        hidden = self._holder.hidden(batch)
        if spec.definition.with_head:
            return Answer(hidden)  # without the head, which ranks may have to gather
        with self._holder.head() as (head, shard):
            return spec.answer(batch, TeacherOutput(hidden, head, shard, self.options.chunk_bytes))

    def _answer_each(self, batch: Batch, spec: SignalSpec) -> Answer:
        """Each rank's batch in turn, run by all of them."""
        batches = self.world.gather(batch.to("cpu"))
        answers = [self._answer(other.to(self.world.device), spec) for other in batches]
        return answers[self.world.rank]

    def _prepared(self, step: int) -> Staged:
        future = self.prepare(step)
        failure: Exception | None = None
        try:
            if self.options.wait_seconds is not None:
                self.trajectory.wait_for(step, self.options.wait_seconds)
            result = future.result()
        except Exception as error:  # raised below, when the other ranks know
            failure = error
        with self._lock:
            self._ahead.pop(step, None)
        if self.sharded and self.world.sum(int(failure is not None))[0] and failure is None:
            raise UserError(f"teacher.trajectory: another rank could not read the checkpoint of step {step}; see its message")
        if failure is not None:
            raise failure
        return result

    def _read(self, step: int) -> Staged:
        while not self._built.wait(POLL_SECONDS):
            if self._closed.is_set():
                raise CancelledError
        while self.options.wait_seconds is not None and not self.trajectory.written(step):
            # No deadline here: a refresh may take hours, and `rotate` counts its own wait. The event lets the process end.
            if self._closed.wait(POLL_SECONDS):
                raise CancelledError
        checkpoint = self.trajectory.checkpoint(step)
        self._demands.check(checkpoint)
        share, of = (self.world.rank, self.world.size) if self.sharded else (0, 1)
        check_files(checkpoint, share, of)
        tensors = read_parts(self.trajectory, checkpoint, self._first.model, self._first.parts)
        dtype = DTYPES[self.options.precision]
        staged = stage(tensors, self.world.device, dtype, on_device=self.options.resident > 1)
        hidden = self._first.trial(staged, canary(checkpoint).to(self.world.device))
        if hidden is not None and not _finite(hidden):
            raise _not_finite(checkpoint)
        return Staged(checkpoint, staged, hidden is not None)

    def _build(self, checkpoint: Checkpoint) -> Holder:
        kind = self.options.sharding if self.world.size > 1 or self.options.sharding == "zero" else "whole"
        model = build_teacher(checkpoint, self.options.chunk_bytes)
        return HOLDERS[kind](model, self.world, DTYPES[self.options.precision])

    def _report(self, step: int, done: Future[Staged]) -> None:
        """A checkpoint that cannot be read is told when it is read, which is before a step needs it; each message once."""
        error = None if done.cancelled() else done.exception()
        if error is not None and not isinstance(error, CancelledError) and (step, str(error)) not in self._told:
            self._told.add((step, str(error)))
            log.error("teacher: the checkpoint of step %d, which is to teach later, cannot be used: %s", step, error)

    def _test(self, holder: Holder, checkpoint: Checkpoint) -> None:
        """A small forward pass before the checkpoint teaches: finite, and where it is sharded, once, as the whole model gives it.

        Raises UserError, on every rank if on one.
        """
        batch = canary(checkpoint).to(self.world.device)
        hidden = holder.hidden(batch)
        finite = self.world.sum(int(not _finite(hidden)))[0] == 0 if self.sharded else _finite(hidden)
        if not finite:
            raise _not_finite(checkpoint)
        if self._tested:
            return
        self._tested = True
        check_architecture(holder.model, batch)
        if not self.sharded:
            return
        gap = torch.zeros(1, dtype=torch.float64)
        if self.world.rank == 0:
            whole = WholeHolder(build_teacher(checkpoint, self.options.chunk_bytes), self.world, DTYPES[self.options.precision])
            tensors = read_parts(self.trajectory, checkpoint, whole.model, whole.parts)
            whole.load(stage(tensors, self.world.device, DTYPES[self.options.precision], on_device=False))
            expected = whole.hidden(batch).double()
            gap[0] = float((hidden.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        dist.broadcast(gap, 0, group=self.world.control)
        if not float(gap) <= SELF_TEST_TOLERANCE[self.options.precision]:
            raise UserError(
                f"teacher.sharding: {self.options.sharding} gives other hidden states than the whole model (relative difference "
                f"{float(gap):.1e}) for {checkpoint.path}; choose another sharding"
            )

    def _free_holder(self, checkpoint: Checkpoint) -> Holder:
        if self._spare:
            return self._spare.pop()
        if len(self._slots) < self.options.resident:
            return self._build(checkpoint)
        return self._slots.popitem(last=False)[1][1]


def _give_way() -> None:
    """A low priority for this thread, where the system has one a thread: on a CPU, reading ahead slows the steps beside it (100
    MB read, hashed and copied by the side of a student on two cores: 1.3 times the step). Not the lowest, which may starve."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICENESS)


def _failed(future: Future[Staged]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _not_finite(checkpoint: Checkpoint) -> UserError:
    return UserError(f"{checkpoint.path}: its hidden states are not finite on a test batch; schedule another checkpoint")
