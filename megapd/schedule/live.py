"""Schedules that change while a run goes on: new versions of the schedule, and decisions of an adaptive one.

    rank 0     ChangeSource.next(step) -> a Change, on the disk with the student step that it begins at
    all ranks  World.gather of it -> LivePlan.take
    each       LivePlan.checkpoint_at(s): a function of the recorded changes alone

A change begins so far ahead that no rank has asked for that step's signals yet. A resumed run takes in what is on record, in the
form in which it was resolved then, so that a trajectory that grew meanwhile changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megapd.config import ScheduleConfig
from megapd.schedule.plan import Decision, GrowingPlan, Plan

Rotations = tuple[tuple[int, int], ...]  # (student step, teacher step), the first at 0


@dataclass(frozen=True)
class Version:
    """A version of a run's schedule, resolved over the trajectory as it was when the run took it up.

    version     from 1 on, as the service counts
    start       student step that it begins at; in force is the highest version that has begun
    policy      of the schedule
    rotations   of the whole run, wherever it begins; of an adaptive schedule the first alone, decisions tell the rest
    timeout     seconds to wait for a checkpoint that is still to be written, of follow; None: all are there
    """

    version: int
    start: int
    policy: str
    rotations: Rotations
    timeout: float | None = None


Change = Version | Decision


def resolved(version: int, start: int, schedule: ScheduleConfig, plan: Plan) -> Version:
    """plan: what the schedule resolved to."""
    return Version(version, start, schedule.policy, tuple(plan.fixed()), schedule.waits)


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


class LivePlan(GrowingPlan):
    """A plan that versions and decisions change."""

    def __init__(self, first: Version, steps: int, changes: Sequence[Change] = ()) -> None:
        """first: of the run's own configuration; changes: those on record, in order."""
        assert first.start == 0
        super().__init__(steps)
        self._versions: list[Version] = [first]
        self._decisions: list[Decision] = []
        self._changes = 0
        self._resolve()
        for change in changes:
            self.take(change)

    policy = "live"

    def __repr__(self) -> str:
        return f"LivePlan(versions={[v.version for v in self._versions]}, steps={self._steps}, rotations={self.rotations()})"

    @property
    def known(self) -> int:
        """Changes taken in: what a checkpoint of the run names."""
        return self._changes

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

    def fixed(self) -> list[tuple[int, int]]:
        """Those of the run's own configuration, which a resumed run must find again."""
        return list(self._versions[0].rotations)

    def version_at(self, student_step: int) -> Version:
        """The version in force."""
        begun = [version for version in self._versions if version.start <= student_step]
        return max(begun, key=lambda version: version.version)

    def policies(self, student_step: int) -> set[str]:
        """Of the versions that are in force somewhere from `student_step` on."""
        versions = in_force([version.start for version in self._versions], self._steps)
        return {self._versions[place].policy for place, _, end in versions if end > student_step}

    def take(self, change: Change) -> None:
        """On every rank, at the same step. RuntimeError where it would begin behind what was asked for, or out of order."""
        with self._guard:
            begin = change.start if isinstance(change, Version) else change.effective
            what = f"version {change.version}" if isinstance(change, Version) else f"decision {change.sequence}"
            if begin <= self._asked:
                raise RuntimeError(f"{what} begins at student step {begin}, but step {self._asked} has been asked for")
            if isinstance(change, Version):
                if change.version <= self._versions[-1].version:
                    raise RuntimeError(f"{what} came after version {self._versions[-1].version}")
                self._versions.append(change)
            else:
                if change.sequence != len(self._decisions):
                    raise RuntimeError(f"{what} came after {len(self._decisions)} others")
                self._decisions.append(change)
            self._changes += 1
            self._resolve()

    def _resolve(self) -> None:
        points: list[tuple[int, int]] = []
        decided = [(decision.effective, decision.checkpoint) for decision in self._decisions]
        for place, start, end in in_force([version.start for version in self._versions], self._steps):
            version = self._versions[place]
            rotations = [version.rotations[0], *decided] if version.policy == "adaptive" else version.rotations
            for begun, _, teacher in pieces(rotations, start, end):
                if not points or points[-1][1] != teacher:
                    points.append((begun, teacher))
        self._points = tuple(points)
