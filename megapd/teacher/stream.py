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

    def teacher(self, step: int) -> Checkpoint:
        """The checkpoint that teaches student step `step`; steps are asked for in order."""

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        """One signal a micro-batch, in order, each checked against the schedule's digest and the batch's."""

    def close(self) -> None: ...


class ColocatedStream:
    """The teacher lives in the student's process and answers on its device.

    The checkpoint of the next rotation is read in the background as soon as the present one teaches.
    """

    def __init__(self, teacher: Teacher, plan: Plan, kind: Kind, wait_seconds: float = 0.0) -> None:
        self._teacher, self._plan, self._kind, self._wait = teacher, plan, kind, wait_seconds

    def teacher(self, step: int) -> Checkpoint:
        checkpoint = self._teacher.rotate(self._plan.checkpoint_at(step), self._wait)
        following = self._plan.next_after(step)
        if following is not None:
            self._teacher.prepare(following[1], self._wait)
        return checkpoint

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        checkpoint = self.teacher(step)
        for batch in batches:
            signal = self._teacher.signal(batch, self._kind)
            signal.check(checkpoint.digest, batch)
            yield signal

    def close(self) -> None:
        self._teacher.close()
