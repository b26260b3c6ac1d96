"""Every policy against its definition, step by step."""

import itertools
import math
import re
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.config import (
    AdaptiveConfig,
    EqualConfig,
    ExplicitConfig,
    FollowConfig,
    GeometricConfig,
    MatchedConfig,
    OneShotConfig,
    RangeConfig,
    TransitionConfig,
)
from megapd.errors import UserError
from megapd.schedule.plan import Plan
from megapd.schedule.policies import build_plan, equally_spaced, geometrically_spaced

quick = settings(max_examples=150, deadline=None, derandomize=True)


def taught(plan: Plan) -> list[int]:
    return [plan.checkpoint_at(step) for step in range(plan.steps)]


def plan_of(schedule, available, steps) -> Plan:
    """The plan, with what holds for all: rotations and next_after say the same as checkpoint_at."""
    plan = build_plan(schedule, available=available, steps=steps)
    by_step = taught(plan)
    changes = [(0, by_step[0])] + [(s, b) for s, (a, b) in enumerate(itertools.pairwise(by_step), start=1) if a != b]
    assert plan.rotations() == changes
    assert plan.steps == steps
    for step in range(steps):
        assert plan.next_after(step) == next((c for c in changes if c[0] > step), None)
    return plan


# ------------------------------------------------------------------------------------------------------- one_shot


def test_one_shot():
    assert taught(plan_of(OneShotConfig(), [0, 10, 30, 20], 5)) == [30] * 5
    plan = plan_of(OneShotConfig(checkpoint=20), [0, 10, 30, 20], 5)
    assert plan.rotations() == [(0, 20)]
    assert plan.next_after(0) is None
    assert plan.warnings == ()
    assert taught(plan_of(OneShotConfig(checkpoint=0), [0, 10], 2)) == [0, 0]  # asked for by name: random weights it is


def test_one_shot_of_a_missing_checkpoint():
    with pytest.raises(UserError, match=r"^schedule\.checkpoint: .*step 15.*nearest are 10 and 20$"):
        build_plan(OneShotConfig(checkpoint=15), available=[10, 20, 30], steps=5)
    with pytest.raises(UserError, match=r"beyond its end.*nearest is 30$"):
        build_plan(OneShotConfig(checkpoint=31), available=[10, 20, 30], steps=5)


# ---------------------------------------------------------------------------------------------------------- equal


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 80), st.booleans())
def test_equal_over_an_even_trajectory_is_the_papers(count, times, every, steps, with_zero):
    # N * times checkpoints `every` apart: the equally spaced N are the multiples of times * every.
    available = [every * i for i in range(0 if with_zero else 1, count * times + 1)]
    each = 1 + steps % 7
    plan = plan_of(EqualConfig(checkpoints=count, steps=each), available, steps)
    assert taught(plan) == [min(s // each + 1, count) * times * every for s in range(steps)]
    assert bool(plan.warnings) == (steps <= (count - 1) * each)


@quick
@given(st.sets(st.integers(1, 60), min_size=1, max_size=8), st.data())
def test_equal_over_any_trajectory_is_the_nearest_choice(available, data):
    available = sorted(available)
    count = data.draw(st.integers(1, len(available)))
    chosen = equally_spaced(available, count)
    last = available[-1]

    def distance(choice):
        return sum(abs(step * count - last * i) for i, step in enumerate(choice, start=1))

    # The choices come in lexicographic order, so min() returns the earliest of the best.
    assert tuple(chosen) == min(itertools.combinations(available, count), key=distance)
    assert chosen[-1] == last
    nearest = [min(available, key=lambda step: (abs(step * count - last * i), step)) for i in range(1, count + 1)]
    plan = plan_of(EqualConfig(checkpoints=count, steps=1), [0, *available], count)
    assert taught(plan) == chosen
    assert (chosen == nearest) == (plan.warnings == ())
    if len(set(nearest)) == count:
        assert chosen == nearest


def test_two_shot():
    # (2, T)-progressive: one intermediate checkpoint, then the final one.
    assert plan_of(EqualConfig(checkpoints=2, steps=3), [1, 2, 3, 4], 10).rotations() == [(0, 2), (3, 4)]


def test_equal_that_the_run_does_not_finish_warns():
    plan = plan_of(EqualConfig(checkpoints=4, steps=10), [100, 200, 300, 400], 25)
    assert plan.rotations() == [(0, 100), (10, 200), (20, 300)]
    (warning,) = plan.warnings
    assert "only 3 of the 4 checkpoints teach" in warning
    assert "training.steps 25" in warning
    assert "step 400, begins at 30" in warning
    assert plan_of(EqualConfig(checkpoints=4, steps=10), [100, 200, 300, 400], 31).warnings == ()


def test_equal_with_more_checkpoints_than_there_are():
    with pytest.raises(UserError, match=r"^schedule\.checkpoints: 4 asked for, but the trajectory holds 3 after step 0"):
        build_plan(EqualConfig(checkpoints=4, steps=10), available=[0, 100, 200, 300], steps=50)


def test_a_long_trajectory_is_quick():
    assert equally_spaced(range(1, 2001), 500) == list(range(4, 2001, 4))


# -------------------------------------------------------------------------------------------------------- matched


@quick
@given(st.integers(1, 9), st.sampled_from([1.0, 2.0, 0.5, 1.5, 0.1, 0.7]), st.integers(1, 12), st.integers(1, 90))
def test_matched_is_the_authors_rule(tenths, speed, periods, steps):
    refresh = 10 * tenths  # so that refresh * speed is whole
    pace = int(Decimal(repr(speed)) * refresh)
    last = pace * periods
    expected = [min((s // refresh + 1) * pace, last) for s in range(steps)]
    plan = plan_of(MatchedConfig(refresh=refresh, speed=speed), [0, *range(pace, last + 1, pace)], steps)
    assert taught(plan) == expected
    assert bool(plan.warnings) == (expected[-1] < last)
    follow = plan_of(FollowConfig(refresh=refresh, speed=speed, last=last), None, steps)
    assert taught(follow) == expected
    assert follow.rotations() == plan.rotations()
    assert follow.warnings == plan.warnings


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_matched_with_a_lag_is_behind(lag):
    """With one interval it is the authors' parity script: [iR, (i+1)R) by iR, the first interval by R."""
    there, steps = range(10, 101, 10), 95
    expected = [10 * max(1, s // 10 + 1 - lag) for s in range(steps)]
    plan = plan_of(MatchedConfig(refresh=10, lag=lag), [0, *there], steps)
    assert taught(plan) == expected
    assert taught(plan_of(FollowConfig(refresh=10, last=100, lag=lag), None, steps)) == expected
    assert taught(plan_of(MatchedConfig(refresh=10, lag=lag), [0, 10, 20, 30], steps))[-1] == 30


def test_matched_is_capped_at_a_last_checkpoint_off_the_grid():
    plan = plan_of(MatchedConfig(refresh=10), [10, 20, 25], 60)
    assert plan.rotations() == [(0, 10), (10, 20), (20, 25)]


def test_matched_needs_only_the_checkpoints_of_its_own_steps():
    plan = plan_of(MatchedConfig(refresh=10), [10, 20, 45], 20)
    assert plan.rotations() == [(0, 10), (10, 20)]
    (warning,) = plan.warnings
    assert "step 45, never teaches" in warning


def test_matched_over_a_gap():
    with pytest.raises(UserError, match=r"^schedule\.refresh, schedule\.speed: .*step 30, .*nearest are 20 and 40$"):
        build_plan(MatchedConfig(refresh=10), available=[10, 20, 40, 50], steps=50)


def test_a_speed_that_asks_for_half_a_step():
    with pytest.raises(UserError, match=r"^schedule\.speed: student step 0 would need the teacher's step 2\.5"):
        build_plan(MatchedConfig(refresh=5, speed=0.5), available=[5, 10], steps=50)
    # Above the cap the fraction does not matter.
    assert taught(build_plan(MatchedConfig(refresh=5, speed=2.5), available=[0, 5], steps=3)) == [5, 5, 5]


# --------------------------------------------------------------------------------------------------------- follow


def test_follow_needs_nothing_yet_but_refuses_what_can_never_come():
    follow = FollowConfig(refresh=10, last=50)
    expected = [(0, 10), (10, 20), (20, 30), (30, 40), (40, 50)]
    for available in (None, (), [0], [10, 20], [0, 10, 20, 30, 40, 50]):
        assert plan_of(follow, available, 70).rotations() == expected
    with pytest.raises(UserError, match=r"schedule\.refresh.*step 10.*nearest are 0 and 15"):
        build_plan(follow, available=[0, 15], steps=70)
    assert plan_of(follow, None, 15).rotations() == expected[:2]
    assert "step 50, never teaches" in plan_of(follow, None, 15).warnings[0]


# ------------------------------------------------------------------------------------------------------- explicit


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 60))
def test_explicit_is_the_range_a_step_lies_in(parts, steps):
    starts = [0, *itertools.accumulate(length for length, _ in parts[:-1])]
    ranges = tuple(RangeConfig(start=start, checkpoint=10 * teacher) for start, (_, teacher) in zip(starts, parts, strict=True))
    plan = plan_of(ExplicitConfig(ranges=ranges), [10, 20, 30, 40], steps)
    assert taught(plan) == [[r.checkpoint for r in ranges if r.start <= s][-1] for s in range(steps)]
    assert bool(plan.warnings) == (starts[-1] >= steps)


def test_explicit_with_a_missing_checkpoint():
    ranges = (RangeConfig(start=0, checkpoint=10), RangeConfig(start=5, checkpoint=11))
    with pytest.raises(UserError, match=r"^schedule\.ranges\.1\.checkpoint: .*step 11"):
        build_plan(ExplicitConfig(ranges=ranges), available=[10, 20], steps=9)
    plan = plan_of(ExplicitConfig(ranges=ranges), [10, 20], 5)  # the second range never teaches in 5 steps
    assert plan.rotations() == [(0, 10)]
    assert "1 of them, from student step 5 on, never teach" in plan.warnings[0]


# ------------------------------------------------------------------------------------------------------ geometric


@quick
@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 50), st.integers(1, 60))
def test_geometric_over_powers_is_exact(count, ratio, first, steps):
    # Every checkpoint first * ratio ** i is there, among others: the targets are checkpoints.
    wanted = [first * ratio**i for i in range(count)]
    available = sorted({0, *wanted, *range(first, wanted[-1], max(1, wanted[-1] // 40))})
    each = 1 + steps % 9
    plan = plan_of(GeometricConfig(checkpoints=count, steps=each), available, steps)
    assert taught(plan) == [wanted[min(s // each, count - 1)] for s in range(steps)]
    assert bool(plan.warnings) == (steps <= (count - 1) * each)


@quick
@given(st.sets(st.integers(1, 200), min_size=1, max_size=8), st.data())
def test_geometric_over_any_trajectory_is_the_nearest_choice(available, data):
    available = sorted(available)
    count = data.draw(st.integers(1, len(available)))
    chosen = geometrically_spaced(available, count)
    first, last = available[0], available[-1]
    targets = [first * (last / first) ** (i / (count - 1)) for i in range(count)] if count > 1 else [last]

    def distance(choice):
        return sum(abs(math.log(step / target)) for step, target in zip(choice, targets, strict=True))

    assert distance(chosen) == pytest.approx(min(map(distance, itertools.combinations(available, count))), abs=1e-7)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == last
    assert chosen[0] == first or count == 1
    assert taught(plan_of(GeometricConfig(checkpoints=count, steps=1), [0, *available], count)) == chosen


@quick
@given(st.integers(1, 7), st.integers(0, 30))
def test_geometric_shares_a_total(count, more):
    total = count + more
    available = [2**i for i in range(count)]
    plan = plan_of(GeometricConfig(checkpoints=count, total=total), available, total + 5)
    lengths = [len(list(part)) for _, part in itertools.groupby(taught(plan))]
    assert [step for step, _ in itertools.groupby(taught(plan))] == available
    assert sum(lengths[:-1]) + lengths[-1] - 5 == total
    shares = [*lengths[:-1], lengths[-1] - 5]
    assert max(shares) - min(shares) <= 1


def test_geometric_from_a_named_checkpoint():
    available = [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert plan_of(GeometricConfig(checkpoints=4, steps=5), available, 50).rotations() == [(0, 10), (5, 20), (10, 40), (15, 80)]
    assert plan_of(GeometricConfig(checkpoints=3, first=20, steps=5), available, 50).rotations() == [(0, 20), (5, 40), (10, 80)]
    with pytest.raises(UserError, match=r"^schedule\.first: .*step 15.*nearest are 10 and 20"):
        build_plan(GeometricConfig(checkpoints=3, first=15, steps=5), available=available, steps=9)
    with pytest.raises(UserError, match=r"^schedule\.first: 2 checkpoints from step 70 on"):
        build_plan(GeometricConfig(checkpoints=3, first=70, steps=5), available=available, steps=9)
    with pytest.raises(UserError, match=r"^schedule\.checkpoints: 9 asked for, but the trajectory holds 8"):
        build_plan(GeometricConfig(checkpoints=9, steps=5), available=available, steps=9)


def test_geometric_over_an_uneven_trajectory_says_what_it_takes():
    plan = plan_of(GeometricConfig(checkpoints=3, steps=1), [1, 90, 95, 100], 3)
    assert taught(plan) == [1, 90, 100]
    assert plan.warnings == ()
    plan = plan_of(GeometricConfig(checkpoints=4, steps=1), [1, 90, 95, 100], 4)
    assert taught(plan) == [1, 90, 95, 100]
    assert "4 equal ratios" in plan.warnings[0]


def test_geometric_needs_one_length():
    for lengths in ({}, {"steps": 5, "total": 20}):
        with pytest.raises(ValueError, match="steps: give either"):
            GeometricConfig(checkpoints=2, **lengths)
    with pytest.raises(ValueError, match="total: 2 student steps are too few for 3"):
        GeometricConfig(checkpoints=3, total=2)


# ------------------------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize(
    "schedule",
    [
        OneShotConfig(),
        EqualConfig(checkpoints=1, steps=1),
        MatchedConfig(refresh=1),
        ExplicitConfig(ranges=(RangeConfig(start=0, checkpoint=1),)),
        GeometricConfig(checkpoints=1, steps=1),
        TransitionConfig(steps=1),
        AdaptiveConfig(checkpoints=1),
    ],
)
@pytest.mark.parametrize(("available", "holds"), [([], "no checkpoint"), (None, "no checkpoint"), ([0], "only step 0")])
def test_an_empty_trajectory(schedule, available, holds):
    with pytest.raises(UserError, match=re.escape(f"teacher.trajectory: it holds {holds}")):
        build_plan(schedule, available=available, steps=3)


def test_steps_outside_the_run_are_no_question():
    plan = build_plan(OneShotConfig(), available=[5], steps=3)
    for step in (-1, 3):
        with pytest.raises(AssertionError, match="of a plan for 3 steps"):
            plan.checkpoint_at(step)


def test_a_plan_is_a_value():
    plans = [build_plan(MatchedConfig(refresh=2), available=[2, 4], steps=4) for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])


def test_a_policy_says_what_it_needs():
    follow, adaptive = FollowConfig(refresh=5, last=60, timeout_seconds=7.0), AdaptiveConfig(checkpoints=2)
    transition, plain = TransitionConfig(steps=3), OneShotConfig()
    assert [s.waits for s in (follow, adaptive, transition, plain)] == [7.0, None, None, None]
    assert [s.grows for s in (follow, adaptive, transition, plain)] == [None, adaptive, None, None]
    assert [s.needs_metrics for s in (follow, adaptive, transition, plain)] == [False, False, True, False]
