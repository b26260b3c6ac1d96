"""The teacher: checkpoints of a trajectory held in memory, one or a few at a time, swapped in place at a rotation.

A rotation has three phases. prepare: a thread reads this rank's parts of the next checkpoint into (pinned) host memory and
verifies its files' sha256, which the ranks divide among them. commit: `rotate` agrees with the other ranks that all are ready and
copies the parts over a holder's weights. retire: the holder that was used longest ago is the one that is overwritten; with
`resident` above 1 an older checkpoint can still be asked for until then.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.models import build_teacher, canary, check_architecture, read_parts
from megapd.signals import Answer, Head, Signal, SignalSpec, TeacherOutput, pack
from megapd.teacher.engine.holders import HOLDERS, Holder, WholeHolder
from megapd.teacher.engine.options import TeacherOptions
from megapd.teacher.engine.staging import Staged, Staging, finite, not_finite, stage
from megapd.teacher.limits import Demands
from megapd.trajectory import Checkpoint, Checkpoints
from megapd.world import World

# Of the largest hidden state: rounding in another order, a few units in the last place a layer.
SELF_TEST_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 2e-2}


class Teacher:
    """Answers batches with signals of the checkpoint it holds.

    With options.sharding other than whole, all ranks of `world` call `rotate`, `signal` and `head` together.
    """

    def __init__(self, trajectory: Checkpoints, world: World, options: TeacherOptions, demands: Demands | None = None) -> None:
        self.trajectory, self.world, self.options = trajectory, world, options
        self.sharded = options.sharded(world)
        self.held: Checkpoint | None = None
        self._demands = demands if demands is not None else Demands()
        self._slots: OrderedDict[int, tuple[Checkpoint, Holder]] = OrderedDict()  # by teacher step, the last used at the end
        self._spare: list[Holder] = []
        self._staging = Staging(trajectory, world, options, self._demands)

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests of the checkpoints in memory, the last used at the end."""
        return tuple(checkpoint.digest for checkpoint, _ in list(self._slots.values()))

    @property
    def classes(self) -> int:
        """Of the head of the checkpoint that is held."""
        return self._holder.classes

    def prepare(self, step: int) -> Future[Staged]:
        """Start reading the checkpoint of teacher step `step`, as soon as it is written. From any thread."""
        return self._staging.prepare(step)

    def ready(self, step: int) -> bool:
        """Whether `rotate(step)` would not wait; begins to prepare it if nothing has."""
        if not self._staging.opened.is_set():  # what this rank is to read is not known before the first `rotate`
            return self.trajectory.written(step)
        return step in self._slots or self.prepare(step).done()

    def open(self, step: int) -> None:
        """Build the model that the checkpoint of `step` describes, so that `prepare` can read. Sharded, on all ranks together."""
        if not self._staging.opened.is_set():
            wait = self.options.wait_seconds
            checkpoint = self.trajectory.checkpoint(step) if wait is None else self.trajectory.wait_for(step, wait)
            self._demands.check(checkpoint)
            self._spare.append(self._build(checkpoint))
            self._staging.open(self._spare[0])

    def rotate(self, step: int) -> Checkpoint:
        """Hold the checkpoint of teacher step `step` from now on.

        Raises UserError if it is missing, damaged, or of another vocabulary or architecture; CheckpointTimeout if it was not
        written within wait_seconds from now, however long ago it was prepared. Sharded, every rank raises if one does.
        """
        self.open(step)
        if step not in self._slots:
            checkpoint, tensors, tested = self._staging.take(step)
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
        if self.options.sharding == "tensor" and self.sharded and not common:  # each rank's batch in turn, run by all of them
            answers = [self._answer(other.to(self.world.device), spec) for other in self.world.gather(batch.to("cpu"))]
            found = answers[self.world.rank]
        else:
            found = self._answer(batch, spec)
        head = self.head() if spec.definition.with_head else None
        doubt = self._doubt if spec.hides_nan else None
        named = (spec, self.held.digest, batch.digest)
        signal = Signal(*named, found.values, head, found.logprobs, found.log_rest, doubt=doubt)
        return signal if self.world.device.type == "cpu" else pack(signal)

    @torch.no_grad()
    def head(self) -> Head:
        """The head of the checkpoint that is held, whole on every rank; gathered once a rotation where it is sharded."""
        assert self.held is not None, "rotate() comes before head()"
        with self._holder.head() as (head, shard):
            if not self.sharded:
                return head
            if self._gathered is None or self._gathered[0] != self.held.digest:
                # Without a shard ZeRO gathered it, for the time of this block alone.
                self._gathered = (self.held.digest, head.map(Tensor.clone if shard is None else shard.whole))
            return self._gathered[1]

    def close(self) -> None:
        self._staging.close()

    _holder: Holder
    _doubt: Tensor | None = None  # see Signal.doubt, of the last answers
    _tested = False
    _gathered: tuple[str, Head] | None = None  # (teacher's digest, its whole head)

    def _answer(self, batch: Batch, spec: SignalSpec) -> Answer:
        hidden = self._holder.hidden(batch)
        if spec.hides_nan:
            self._doubt = (hidden * 0.0).sum()
        if spec.definition.with_head:
            return Answer(hidden)  # without the head, which ranks may have to gather
        with self._holder.head() as (head, shard):
            return spec.answer(batch, TeacherOutput(hidden, head, shard, self.options.chunk_bytes))

    def _build(self, checkpoint: Checkpoint) -> Holder:
        kind = self.options.sharding if self.world.size > 1 or self.options.sharding == "zero" else "whole"
        model = build_teacher(checkpoint, self.options.chunk_bytes)
        return HOLDERS[kind](model, self.world, self.options.dtype)

    def _test(self, holder: Holder, checkpoint: Checkpoint) -> None:
        """A small forward pass before the checkpoint teaches: finite, and where it is sharded, once, as the whole model gives it.

        Raises UserError, on every rank if on one.
        """
        batch = canary(checkpoint).to(self.world.device)
        hidden = holder.hidden(batch)
        passed = self.world.sum(int(not finite(hidden)))[0] == 0 if self.sharded else finite(hidden)
        if not passed:
            raise not_finite(checkpoint)
        if self._tested:
            return
        self._tested = True
        check_architecture(holder.model, batch)
        if self.sharded:
            self._compare(checkpoint, batch, hidden)

    def _compare(self, checkpoint: Checkpoint, batch: Batch, hidden: Tensor) -> None:
        """With the whole model's hidden states, which rank 0 computes."""
        gap = torch.zeros(1, dtype=torch.float64)
        if self.world.rank == 0:
            whole = WholeHolder(build_teacher(checkpoint, self.options.chunk_bytes), self.world, self.options.dtype)
            tensors = read_parts(self.trajectory, checkpoint, whole.model, whole.parts)
            whole.load(stage(tensors, self.world.device, self.options.dtype, on_device=False))
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
