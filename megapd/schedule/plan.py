"""Plan, and plans that grow: step -> checkpoint."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """A schedule resolved for one run: the map from student step to the teacher's checkpoint.

    policy      the schedule's policy
    steps       student steps of the run
    starts      increasing student steps, the first 0: where a checkpoint begins to teach
    teachers    teacher step of each, the same length; neighbours differ
    warnings    what a user may not have meant, one line each
    """

    policy: str
    steps: int
    starts: tuple[int, ...]
    teachers: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.starts) == len(self.teachers)
        assert self.starts[0] == 0
        assert self.starts[-1] < self.steps
        assert all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        assert all(a != b for a, b in zip(self.teachers, self.teachers[1:], strict=False))

    def checkpoint_at(self, student_step: int) -> int:
        """The teacher step that teaches student step `student_step`, 0 <= student_step < steps. O(log rotations)."""
        assert 0 <= student_step < self.steps, f"student step {student_step} of a plan for {self.steps} steps"
        return self.teachers[bisect_right(self.starts, student_step) - 1]

    def rotations(self) -> list[tuple[int, int]]:
        """(student step, teacher step) wherever another checkpoint begins to teach; the first is at student step 0."""
        return list(zip(self.starts, self.teachers, strict=True))

    def next_after(self, student_step: int) -> tuple[int, int] | None:
        """The first rotation later than `student_step`, None if there is none. O(log rotations)."""
        place = bisect_right(self.starts, student_step)
        return (self.starts[place], self.teachers[place]) if place < len(self.starts) else None

    def fixed(self) -> list[tuple[int, int]]:
        """The rotations that a resumed run must find again; of a plan that grows by decisions, the first alone."""
        return self.rotations()


@dataclass(frozen=True)
class Report:
    """The student's metric after `step` student steps: held-out accuracy, or the divergence of the last training step."""

    step: int
    value: float


@dataclass(frozen=True)
class Decision:
    """Another checkpoint teaches from a named student step on.

    sequence    0 for a run's first decision, then one more each
    step        student steps done at the report that it rests on
    effective   the first student step that the checkpoint teaches
    checkpoint  teacher step
    reason      saturated, max_dwell, or what a person gave
    evidence    the numbers it rests on
    """

    sequence: int
    step: int
    effective: int
    checkpoint: int
    reason: str
    evidence: Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------- the plan


class GrowingPlan(Plan):
    """A plan that changes while the run goes on: what AdaptivePlan and live.LivePlan have in common.

    `starts`, `teachers`, `rotations` and `next_after` say what is known so far. checkpoint_at of a step that was asked for never
    changes: subclasses refuse what would change it. May be asked from several threads.
    """

    def __init__(self, steps: int) -> None:
        # No field of Plan is set: this class computes each.
        assert steps >= 1
        self._steps = steps
        self._points: tuple[tuple[int, int], ...] = ()  # the rotations that the run reaches; neighbours differ
        self._asked = -1  # the latest step that checkpoint_at was asked for
        self._guard = threading.Lock()

    warnings = ()
    __eq__ = object.__eq__  # two plans may yet grow apart
    __hash__ = object.__hash__

    @property
    def steps(self) -> int:
        return self._steps

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self._points)

    @property
    def teachers(self) -> tuple[int, ...]:
        return tuple(teacher for _, teacher in self._points)

    def checkpoint_at(self, student_step: int) -> int:
        assert 0 <= student_step < self._steps, f"student step {student_step} of a plan for {self._steps} steps"
        with self._guard:
            self._asked = max(self._asked, student_step)
            points = self._points
        return points[bisect_right(points, student_step, key=lambda point: point[0]) - 1][1]

    def rotations(self) -> list[tuple[int, int]]:
        return list(self._points)

    def next_after(self, student_step: int) -> tuple[int, int] | None:
        points = self._points
        place = bisect_right(points, student_step, key=lambda point: point[0])
        return points[place] if place < len(points) else None


class AdaptivePlan(GrowingPlan):
    """A plan that decisions extend: with k of them, k + 1 rotations."""

    def __init__(self, candidates: Sequence[int], steps: int, decisions: Sequence[Decision] = ()) -> None:
        assert candidates
        super().__init__(steps)
        self._candidates = tuple(candidates)
        self._points = ((0, self._candidates[0]),)
        self._known = 0  # decisions taken in
        self._latest = 0  # student step at which the last of them takes effect
        for decision in decisions:
            self.take(decision)

    policy = "adaptive"

    def __repr__(self) -> str:
        return f"AdaptivePlan(candidates={self._candidates}, steps={self._steps}, rotations={self.rotations()})"

    @property
    def candidates(self) -> tuple[int, ...]:
        return self._candidates

    @property
    def known(self) -> int:
        """Decisions taken in: what a checkpoint of the run names."""
        return self._known

    def fixed(self) -> list[tuple[int, int]]:
        return [self._points[0]]

    def take(self, decision: Decision) -> None:
        """On every rank, at the same step. RuntimeError if its effect would lie behind what was asked for."""
        with self._guard:
            if decision.sequence != self._known:
                raise RuntimeError(f"decision {decision.sequence} came after {self._known} others; the run's ranks do not agree")
            settled = max(self._asked, self._latest)
            if decision.effective <= settled:
                raise RuntimeError(
                    f"decision {decision.sequence} takes effect at student step {decision.effective}, but step {settled} has "
                    f"been asked for; raise schedule.lead"
                )
            self._known, self._latest = self._known + 1, decision.effective
            if decision.effective < self._steps and decision.checkpoint != self._points[-1][1]:
                self._points += ((decision.effective, decision.checkpoint),)
