"""Schedules as pure functions: which of the teacher's checkpoints teaches a student's step.

Student steps count from 0: step s is the one that takes the student from s to s + 1 steps done. A checkpoint is named by the
steps its teacher had done. With R = refresh, N = checkpoints, T = steps of the configuration, L the last checkpoint's step
(arXiv 2410.05464, and the authors' code for `matched`):

    one_shot    L, or the checkpoint named, for the whole run
    equal       the checkpoint nearest to L * (i + 1) / N for s in [iT, (i + 1)T); L from NT on: (N, T)-progressive
    matched     min(max(1, i + 1 - lag) * R * speed, L) for s in [iR, (i + 1)R): lag 0 is the authors' grammar trainer, 1 their
                parity script
    explicit    the checkpoint of the range that s lies in
    follow      as `matched`, for a teacher that is still training and will end at L = schedule.last
    geometric   the checkpoint nearest in ratio to F * (L / F)^(i / (N - 1)) for s in [iT, (i + 1)T), F the first checkpoint or
                the one named; L from (N - 1)T on, and alone for N = 1. With total = P in place of T: [iP // N, (i + 1)P // N)
    transition  N - 1 checkpoints of the teacher's phase transition, T steps each, then L (see transition.py)
    adaptive    N checkpoints in turn, each until the student saturates: decided as the run goes (see adaptive.py)

What a schedule asks for must be there: a missing checkpoint is an error, never skipped. Only the run's own steps count: when
training.steps ends before a schedule does, the rest is not used, need not exist, and the plan carries a warning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import log
from typing import Any

from megapd.config import (
    AdaptiveConfig,
    EqualConfig,
    ExplicitConfig,
    FollowConfig,
    GeometricConfig,
    MatchedConfig,
    OneShotConfig,
    ScheduleConfig,
    TransitionConfig,
)
from megapd.errors import UserError
from megapd.registry import imported
from megapd.schedule.plan import Plan, merged
from megapd.schedule.transition import Metrics, all_metrics, find_transition, nearest_increasing

MetricsOf = Callable[[int], Mapping[str, Any]]  # teacher step -> what its checkpoint's meta.json holds as metrics
Pieces = list[tuple[int, int]]  # (student step, teacher step), the first at 0, all below the run's steps; neighbours may be equal
Distances = Callable[[Sequence[int], int], Callable[[int, int], int]]  # (steps, count) -> of target i and element j
Resolved = tuple[Pieces, list[str]]  # and warnings, one line each


def build_plan(
    schedule: ScheduleConfig, *, available: Sequence[int] | None, steps: int, metrics_of: MetricsOf | None = None
) -> Plan:
    """Resolve a schedule over the teacher steps `available` for a run of `steps` student steps.

    A schedule that waits needs nothing to be available yet, and takes None; what is given to it is checked. `metrics_of` is
    called for one that needs metrics alone, once for each checkpoint; None: the trajectory stores none. One that grows gives its
    first checkpoint for the whole run, decisions tell the rest. Raises UserError, naming the setting, where it asks for what the
    trajectory does not hold.
    """
    assert steps >= 1
    there = tuple(sorted(set(available or ())))
    if schedule.waits is None and (not there or there[-1] == 0):
        holds = "only step 0, the random weights" if there else "no checkpoint"
        raise UserError(f"teacher.trajectory: it holds {holds}; train the teacher further, or set its trajectory.every")
    metrics: list[Metrics] = []
    if schedule.needs_metrics:
        if metrics_of is None:
            raise UserError(
                f"schedule.policy: {schedule.policy} reads the metrics stored with each checkpoint, and this trajectory stores "
                f"none; name its checkpoints with schedule.policy explicit"
            )
        metrics.append(all_metrics(there, metrics_of))
    resolved: Resolved = imported(schedule.builder)(schedule, there, steps, *metrics)
    pieces, warnings = resolved
    assert schedule.waits is not None or {teacher for _, teacher in pieces} <= set(there), f"{schedule.policy} names others"
    return Plan(schedule.policy, steps, merged(pieces), tuple(warnings))


def one_shot(schedule: OneShotConfig, there: tuple[int, ...], steps: int) -> Resolved:
    if schedule.checkpoint is None:
        return [(0, there[-1])], []
    _require(schedule.checkpoint, there, "schedule.checkpoint")
    return [(0, schedule.checkpoint)], []


def explicit(schedule: ExplicitConfig, there: tuple[int, ...], steps: int) -> Resolved:
    pieces = []
    for number, part in enumerate(schedule.ranges):
        if part.start < steps:
            _require(part.checkpoint, there, f"schedule.ranges.{number}.checkpoint")
            pieces.append((part.start, part.checkpoint))
    unused = len(schedule.ranges) - len(pieces)
    if not unused:
        return pieces, []
    first = schedule.ranges[len(pieces)].start
    return pieces, [
        f"schedule.ranges: {unused} of them, from student step {first} on, never teach: the run ends at training.steps {steps}"
    ]


def equal(schedule: EqualConfig, there: tuple[int, ...], steps: int) -> Resolved:
    count = schedule.checkpoints
    chosen, warnings = _spread(_differences, "distances", _trained(there, count), count)
    return _parts(chosen, [i * schedule.steps for i in range(count)], steps, "schedule.steps", warnings)


def geometric(schedule: GeometricConfig, there: tuple[int, ...], steps: int) -> Resolved:
    count = schedule.checkpoints
    if schedule.first is not None:
        _require(schedule.first, there, "schedule.first")
    trained = tuple(step for step in _trained(there, count) if step >= (schedule.first or 1))
    if count > len(trained):
        raise UserError(
            f"schedule.first: {len(trained)} checkpoints from step {trained[0]} on, but schedule.checkpoints asks for {count}; "
            f"lower one of them"
        )
    chosen, warnings = _spread(_ratios, "ratios", trained, count)
    if schedule.steps is not None:
        return _parts(chosen, [i * schedule.steps for i in range(count)], steps, "schedule.steps", warnings)
    assert schedule.total is not None
    return _parts(chosen, [i * schedule.total // count for i in range(count)], steps, "schedule.total", warnings)


def transition(schedule: TransitionConfig, there: tuple[int, ...], steps: int, metrics: Metrics) -> Resolved:
    found = find_transition(schedule, metrics)
    warnings = [f"schedule.policy transition: {warning}" for warning in found.warnings]
    chosen = [*found.picks, found.final]
    return _parts(chosen, [i * schedule.steps for i in range(len(chosen))], steps, "schedule.steps", warnings)


def adaptive(schedule: AdaptiveConfig, there: tuple[int, ...], steps: int) -> Resolved:
    """The first of its checkpoints; decisions tell the rest."""
    return [(0, candidates(schedule, there)[0])], []


def candidates(schedule: AdaptiveConfig, there: Sequence[int]) -> tuple[int, ...]:
    """The checkpoints that an adaptive schedule goes through, increasing teacher steps; UserError where one is missing."""
    for step in schedule.teachers:
        _require(step, tuple(there), "schedule.teachers")
    if schedule.checkpoints is None:
        return schedule.teachers
    spaced = equally_spaced if schedule.spacing == "equal" else geometrically_spaced
    return tuple(spaced(_trained(there, schedule.checkpoints), schedule.checkpoints))


def _trained(there: Sequence[int], count: int) -> tuple[int, ...]:
    """The checkpoints after step 0, whose random weights teach nothing; UserError if they are fewer than `count`."""
    trained = tuple(step for step in there if step > 0)
    if count > len(trained):
        raise UserError(
            f"schedule.checkpoints: {count} asked for, but the trajectory holds {len(trained)} after step 0; "
            f"lower it, or write the teacher's trajectory more often"
        )
    return trained


def _spread(distances: Distances, what: str, trained: Sequence[int], count: int) -> tuple[list[int], list[str]]:
    """The checkpoints chosen, and a warning if they are not each the nearest."""
    chosen, distance = _spaced(distances, trained, count), distances(trained, count)
    nearest = [trained[min(range(len(trained)), key=lambda j: (distance(i, j), j))] for i in range(count)]
    if chosen == nearest:
        return chosen, []
    return chosen, [
        f"schedule.checkpoints: the trajectory is too uneven for {count} equal {what}, "
        f"several of which end nearest to one checkpoint; using {', '.join(map(str, chosen))}"
    ]


def _parts(chosen: Sequence[int], starts: Sequence[int], steps: int, setting: str, warnings: list[str]) -> Resolved:
    """The checkpoints from their starts on, as far as the run goes, with a warning if the last never teaches."""
    pieces = [(start, teacher) for start, teacher in zip(starts, chosen, strict=True) if start < steps]
    if len(pieces) < len(chosen):
        warnings.append(
            f"{setting}: only {len(pieces)} of the {len(chosen)} checkpoints teach, up to step {pieces[-1][1]}: the run ends at "
            f"training.steps {steps}, but the final checkpoint, step {chosen[-1]}, begins at {starts[-1]}"
        )
    return pieces, warnings


def equally_spaced(steps: Sequence[int], count: int) -> list[int]:
    """`count` distinct elements of the increasing positive `steps`, as near to last * i / count, i = 1..count, as they can be.

    That is the nearest element to each target where those are distinct (of two equally near, the earlier), and else the
    increasing choice with the smallest sum of distances. The last element is always chosen. O(count * len(steps)).
    """
    return _spaced(_differences, steps, count)


def geometrically_spaced(steps: Sequence[int], count: int) -> list[int]:
    """`count` distinct elements of the increasing positive `steps`, as near in ratio to first * (last / first)^(i / (count - 1)),
    i = 0..count - 1, as they can be; of one, the last. Chosen as by `equally_spaced`; first and last are among them."""
    return _spaced(_ratios, steps, count)


def _spaced(distances: Distances, steps: Sequence[int], count: int) -> list[int]:
    assert 1 <= count <= len(steps)
    assert steps[0] > 0
    return [steps[j] for j in nearest_increasing(distances(steps, count), count, len(steps))]


def _differences(steps: Sequence[int], count: int) -> Callable[[int, int], int]:
    """|element j - target i|, times `count`, to stay whole."""
    return lambda i, j: abs(steps[j] * count - steps[-1] * (i + 1))


def _ratios(steps: Sequence[int], count: int) -> Callable[[int, int], int]:
    """|ln| of element j over target i, in units of 1e-9: whole, so that sums are exact and equal ones tie on every machine."""
    first, whole = log(steps[0]), log(steps[-1] / steps[0])
    return lambda i, j: round(1e9 * abs(log(steps[j]) - (first + (i / (count - 1) if count > 1 else 1.0) * whole)))


def matched(schedule: MatchedConfig, there: tuple[int, ...], steps: int) -> Resolved:
    return _lockstep(schedule, there, there[-1], steps)


def follow(schedule: FollowConfig, there: tuple[int, ...], steps: int) -> Resolved:
    return _lockstep(schedule, there, schedule.last, steps)


def _lockstep(schedule: MatchedConfig | FollowConfig, there: tuple[int, ...], last: int, steps: int) -> Resolved:
    """(iR, min(max(1, i + 1 - lag) * R * speed, last)) until the last is reached or the run ends; exact in the decimal digits of
    `speed`."""
    pace = schedule.refresh * Fraction(repr(schedule.speed))
    pieces: Pieces = []
    for start in range(0, steps, schedule.refresh):
        wanted = min(max(1, len(pieces) + 1 - schedule.lag) * pace, Fraction(last))
        if wanted.denominator != 1:
            raise UserError(
                f"schedule.speed: student step {start} would need the teacher's step {float(wanted):g}, which is not whole; "
                f"choose schedule.refresh * schedule.speed whole, not {float(pace):g}"
            )
        pieces.append((start, int(wanted)))
        if wanted == last:
            break
    for _, teacher in pieces:
        # A teacher writes in order, so what lies before its newest checkpoint and is not there will never come.
        if there and teacher < there[-1]:
            _require(teacher, there, "schedule.refresh, schedule.speed")
    reached = pieces[-1][1]
    if reached >= last:
        return pieces, []
    return pieces, [
        f"schedule.speed: the teacher's last checkpoint, step {last}, never teaches: "
        f"the run ends at training.steps {steps}, taught by step {reached}"
    ]


def _require(step: int, there: tuple[int, ...], setting: str) -> None:
    place = bisect_left(there, step)
    if there[place : place + 1] != (step,):
        around = [str(s) for s in there[max(0, place - 1) : place + 1]]
        beyond = " (beyond its end)" if step > there[-1] else ""
        raise UserError(
            f"{setting}: it needs the teacher's checkpoint of step {step}, which the trajectory does not hold{beyond}; "
            f"the nearest {'is' if len(around) == 1 else 'are'} {' and '.join(around)}"
        )
