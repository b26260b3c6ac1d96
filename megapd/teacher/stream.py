"""Streams: the student's iterator over signals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from megapd.batch import Batch
from megapd.schedule.policies import Plan
from megapd.signal import Kind, Signal
from megapd.teacher.engine import Teacher
from megapd.trajectory import Checkpoint


class Stream(Protocol):
    """Signals of the teacher that the schedule names for a step, whatever carries them."""

    def ready(self, step: int) -> bool:
        """Whether the teacher of `step` is there; False while a teacher that trains meanwhile has yet to write it."""
        ...

    def teacher(self, step: int) -> Checkpoint:
        """The checkpoint that teaches student step `step`; steps are asked for in order."""

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        """One signal a micro-batch, in order, each checked against the schedule's digest and the batch's."""

    def close(self) -> None: ...


class ColocatedStream:
    """The teacher lives in the student's process and answers on its device.

    The checkpoint of the next rotation is read in the background as soon as the present one teaches.
    """

    def __init__(self, teacher: Teacher, plan: Plan, kind: Kind) -> None:
        self._teacher, self._plan, self._kind = teacher, plan, kind

    def ready(self, step: int) -> bool:
        return self._teacher.ready(self._plan.checkpoint_at(step))

    def teacher(self, step: int) -> Checkpoint:
        checkpoint = self._teacher.rotate(self._plan.checkpoint_at(step))
        following = self._plan.next_after(step)
        if following is not None:
            self._teacher.prepare(following[1])
        return checkpoint

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        checkpoint = self.teacher(step)
        for batch in batches:
            signal = self._teacher.signal(batch, self._kind)
            signal.check(checkpoint.digest, batch)
            yield signal

    def close(self) -> None:
        self._teacher.close()
