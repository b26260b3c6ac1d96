"""Streams: the student's iterator over signals, whatever carries them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from megapd.batch import Batch
from megapd.schedule.plan import Plan
from megapd.signals import Signal, SignalSpec, as_sent
from megapd.teacher.engine import Teacher
from megapd.trajectory import Checkpoint


class Stream(Protocol):
    """Signals of the teacher that the schedule names for a step, whatever carries them."""

    spec: SignalSpec

    def ready(self, step: int) -> bool:
        """Whether the teacher of `step` is there; False while a teacher that trains meanwhile has yet to write it."""
        ...

    def teacher(self, step: int) -> Checkpoint:
        """The checkpoint that teaches student step `step`; steps are asked for in order."""

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        """Ask for the signals of a step to come. Called once a step, in order, from the thread that builds batches, which are on
        the host; returns at once. What goes wrong is told by `signals`."""

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterable[Signal]:
        """One signal a micro-batch, in order, on the batches' device, each checked against the schedule's digest and the batch's.

        Whether or not the step was requested. Raises TeacherLost where they do not come in time, SignalMismatch where the
        teacher is another one for good: by the call itself, so that ranks can agree before any of them goes on.
        """

    def close(self) -> None: ...


class ColocatedStream:
    """The teacher lives in the student's process and answers on its device.

    The checkpoint of the next rotation is read in the background from the second step of the present one on, so that the step
    that rotates has no reader beside it.
    """

    def __init__(self, teacher: Teacher, plan: Plan, spec: SignalSpec) -> None:
        self.spec = spec
        self._teacher, self._plan = teacher, plan
        self._rotated = -1  # the student step of the last rotation

    def ready(self, step: int) -> bool:
        return self._teacher.ready(self._plan.checkpoint_at(step))

    def teacher(self, step: int) -> Checkpoint:
        before = self._teacher.held
        checkpoint = self._teacher.rotate(self._plan.checkpoint_at(step))
        if checkpoint is not before:
            self._rotated = step
        following = self._plan.next_after(step)
        if following is not None and (step > self._rotated or following[0] == step + 1):
            self._teacher.prepare(following[1])
        return checkpoint

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        """Nothing to do: the device that would answer ahead is the student's own."""

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        checkpoint = self.teacher(step)
        return (self._checked(batch, checkpoint) for batch in batches)

    def close(self) -> None:
        self._teacher.close()

    def _checked(self, batch: Batch, checkpoint: Checkpoint) -> Signal:
        signal = as_sent(self._teacher.signal(batch, self.spec))
        signal.check(checkpoint.digest, batch)
        return signal
