"""Plans: from a student step to the checkpoint that teaches it. A Plan is fixed; a LivePlan changes while the run goes on.

    rank 0     ChangeSource.next(step) -> a Change, on the disk with the student step that it begins at
    all ranks  World.gather of it -> LivePlan.take
    each       LivePlan.checkpoint_at(s): a function of the recorded changes alone

A change is a new version of the schedule, or a decision of an adaptive one. It begins so far ahead that no rank has asked for
that step's signals yet. A resumed run takes in what is on record, in the form in which it was resolved then, so that a trajectory
that grew meanwhile changes nothing.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

from megapd.config import ScheduleConfig

Rotations = tuple[tuple[int, int], ...]  # (student step, teacher step), the first at 0


def merged(parts: Iterable[tuple[int, int]]) -> Rotations:
    """Of neighbours with the same teacher step the first alone."""
    return tuple(next(same) for _, same in groupby(parts, key=itemgetter(1)))


@dataclass(frozen=True)
class Plan:
    """A schedule resolved for one run: the map from student step to the teacher's checkpoint.

    policy      the schedule's policy
    steps       student steps of the run
    points      (student step, teacher step) where a checkpoint begins to teach: the first at 0, increasing, neighbours differ
    warnings    what a user may not have meant, one line each

    Of an adaptive schedule it is the first checkpoint for the whole run: what follows is decided as the run goes.
    """

    policy: str
    steps: int
    points: Rotations
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.points[0][0] == 0
        assert self.points[-1][0] < self.steps
        assert all(a[0] < b[0] and a[1] != b[1] for a, b in pairwise(self.points))

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self.points)

    @property
    def teachers(self) -> tuple[int, ...]:
        return tuple(teacher for _, teacher in self.points)

    def checkpoint_at(self, student_step: int) -> int:
        """The teacher step that teaches student step `student_step`, 0 <= student_step < steps. O(log rotations)."""
        assert 0 <= student_step < self.steps, f"student step {student_step} of a plan for {self.steps} steps"
        return self.points[bisect_right(self.points, student_step, key=itemgetter(0)) - 1][1]

    def rotations(self) -> list[tuple[int, int]]:
        return list(self.points)

    def next_after(self, student_step: int) -> tuple[int, int] | None:
        """The first rotation later than `student_step`, None if there is none. O(log rotations)."""
        points = self.points  # a live plan may replace them meanwhile
        place = bisect_right(points, student_step, key=itemgetter(0))
        return points[place] if place < len(points) else None

    def fixed(self) -> list[tuple[int, int]]:
        """The rotations that a resumed run must find again: those of the run's own configuration."""
        return self.rotations()


# ---------------------------------------------------------------------------------------------------------------- changes


@dataclass(frozen=True)
class Report:
    """The student's metric after `step` student steps: held-out accuracy, or the divergence of the last training step."""

    step: int
    value: float


@dataclass(frozen=True)
class Decision:
    """Another checkpoint of an adaptive schedule teaches from a named student step on.

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

    def __str__(self) -> str:
        return f"decision {self.sequence}"

    @property
    def begin(self) -> int:
        return self.effective


@dataclass(frozen=True)
class Version:
    """A version of a run's schedule, resolved over the trajectory as it was when the run took it up.

    version     from 1 on, as the service counts
    start       student step that it begins at; in force is the highest version that has begun
    policy      of the schedule
    rotations   of the whole run, wherever it begins; of one that grows the first alone, decisions tell the rest
    timeout     seconds to wait for a checkpoint that is still to be written; None: all are there
    grows       whether decisions extend it
    """

    version: int
    start: int
    policy: str
    rotations: Rotations
    timeout: float | None = None
    grows: bool = False

    def __str__(self) -> str:
        return f"version {self.version}"

    @property
    def begin(self) -> int:
        return self.start


Change = Version | Decision


def resolved(version: int, start: int, schedule: ScheduleConfig, plan: Plan) -> Version:
    """plan: what the schedule resolved to."""
    return Version(version, start, schedule.policy, tuple(plan.fixed()), schedule.waits, schedule.grows is not None)


def in_force(begins: Sequence[int], steps: int) -> Iterator[tuple[int, int, int]]:
    """(place, start, end) of the versions that begin at `begins`, in order: one is in force at the student steps [start, end), as
    the highest of those that have begun."""
    for place, begin in enumerate(begins):
        end = min([*begins[place + 1 :], steps])
        if begin < end:
            yield place, begin, end


def pieces(rotations: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, teacher step) of rotations, the first at 0, within the student steps [start, end)."""
    teaching = next(teacher for begun, teacher in reversed(rotations) if begun <= start)
    inside = [(start, teaching), *(rotation for rotation in rotations if start < rotation[0] < end)]
    for (begun, teacher), (after, _) in pairwise([*inside, (end, 0)]):
        yield begun, after, teacher


# ----------------------------------------------------------------------------------------------------------- the live plan


class LivePlan(Plan):
    """A plan that versions and decisions change, known so far. May be asked from several threads.

    checkpoint_at of a step that was asked for never changes: `take` refuses what would change it.
    """

    def __init__(self, first: Version, steps: int, changes: Sequence[Change] = ()) -> None:
        """first: of the run's own configuration; changes: those on record, in order."""
        assert first.start == 0
        self._asked = -1  # the latest step that checkpoint_at was asked for
        self._guard = threading.Lock()
        self._versions: list[Version] = [first]
        self._decisions: list[Decision] = []
        super().__init__("live", steps, self._resolve(steps))
        for change in changes:
            self.take(change)

    __eq__ = object.__eq__  # two plans may yet grow apart
    __hash__ = object.__hash__

    def checkpoint_at(self, student_step: int) -> int:
        with self._guard:
            teacher = super().checkpoint_at(student_step)
            self._asked = max(self._asked, student_step)
        return teacher

    def fixed(self) -> list[tuple[int, int]]:
        return list(self._versions[0].rotations)

    @property
    def known(self) -> int:
        """Changes taken in: what a checkpoint of the run names."""
        return len(self._versions) - 1 + len(self._decisions)

    @property
    def version(self) -> int:
        """The newest."""
        return self._versions[-1].version

    @property
    def decided(self) -> int:
        """Decisions taken in."""
        return len(self._decisions)

    @property
    def latest(self) -> int:
        """Student step at which the last decision begins, -1: there is none."""
        return self._decisions[-1].effective if self._decisions else -1

    def version_at(self, student_step: int) -> Version:
        """The version in force."""
        begun = [version for version in self._versions if version.start <= student_step]
        return max(begun, key=lambda version: version.version)

    def grows_after(self, student_step: int) -> bool:
        """Whether a version that decisions extend is in force somewhere from `student_step` on."""
        versions = in_force([version.start for version in self._versions], self.steps)
        return any(self._versions[place].grows and end > student_step for place, _, end in versions)

    def take(self, change: Change) -> None:
        """On every rank, at the same step. RuntimeError where it would begin behind what was asked for, or out of order."""
        with self._guard:
            if change.begin <= self._asked:
                fix = "; raise schedule.lead" if isinstance(change, Decision) else ""
                raise RuntimeError(
                    f"{change} begins at student step {change.begin}, but step {self._asked} has been asked for{fix}"
                )
            if isinstance(change, Version):
                if change.version <= self.version:
                    raise RuntimeError(f"{change} came after version {self.version}")
                self._versions.append(change)
            else:
                if change.sequence != self.decided:
                    raise RuntimeError(f"{change} came after {self.decided} others; the run's ranks do not agree")
                if change.effective <= self.latest:
                    raise RuntimeError(
                        f"{change} begins at student step {change.effective}, not after the one before it, at {self.latest}"
                    )
                self._decisions.append(change)
            object.__setattr__(self, "points", self._resolve(self.steps))  # frozen for all others

    def _resolve(self, steps: int) -> Rotations:
        """The rotations that the run reaches."""
        decided = [(decision.effective, decision.checkpoint) for decision in self._decisions]
        taught: list[tuple[int, int]] = []
        for place, start, end in in_force([version.start for version in self._versions], steps):
            version = self._versions[place]
            rotations = [version.rotations[0], *decided] if version.grows else version.rotations
            taught += [(begun, teacher) for begun, _, teacher in pieces(rotations, start, end)]
        return merged(taught)
