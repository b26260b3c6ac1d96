"""Schedules that change while a run goes on, as a function of the changes on record."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.config import AdaptiveConfig, EqualConfig, FollowConfig
from megapd.schedule.plan import Decision, LivePlan, Version, in_force, resolved
from megapd.schedule.policies import build_plan

THERE = tuple(range(10, 110, 10))
STEPS = 100


def version(number: int, start: int, *rotations: tuple[int, int], policy: str = "explicit") -> Version:
    return Version(number, start, policy, rotations, grows=policy == "adaptive")


def decision(sequence: int, effective: int, checkpoint: int) -> Decision:
    return Decision(sequence, effective - 2, effective, checkpoint, "saturated", {"gain": 0.0})


FIRST = version(1, 0, (0, 10), (20, 20), (60, 30))


def test_a_version_is_in_force_from_its_start_on_at_its_own_place():
    plan = LivePlan(FIRST, STEPS)
    assert plan.rotations() == [(0, 10), (20, 20), (60, 30)]
    plan.take(version(2, 30, (0, 40), (25, 50), (70, 60)))
    assert plan.rotations() == [(0, 10), (20, 20), (30, 50), (70, 60)]
    assert plan.next_after(29) == (30, 50)
    assert plan.next_after(70) is None
    plan.take(version(3, 50, (0, 50)))  # the same checkpoint goes on
    assert plan.rotations() == [(0, 10), (20, 20), (30, 50)]
    assert (plan.version_at(29).version, plan.version_at(30).version, plan.version_at(50).version) == (1, 2, 3)
    assert (plan.known, plan.version) == (2, 3)
    assert plan.fixed() == list(FIRST.rotations)


def test_the_highest_version_that_has_begun_is_in_force():
    plan = LivePlan(FIRST, STEPS, [version(2, 80, (0, 40)), version(3, 30, (0, 50))])
    assert plan.rotations() == [(0, 10), (20, 20), (30, 50)]
    assert plan.version_at(90).version == 3


def test_an_adaptive_version_goes_on_where_its_decisions_are():
    adaptive = version(1, 0, (0, 10), policy="adaptive")
    plan = LivePlan(adaptive, STEPS)
    plan.take(decision(0, 15, 20))
    plan.take(version(2, 30, (0, 70)))  # pinned meanwhile
    plan.take(decision(1, 35, 30))
    plan.take(version(3, 50, (0, 10), policy="adaptive"))
    plan.take(decision(2, 60, 40))
    assert plan.rotations() == [(0, 10), (15, 20), (30, 70), (50, 30), (60, 40)]
    assert (plan.decided, plan.latest, plan.known) == (3, 60, 5)


def test_what_was_asked_for_cannot_change():
    plan = LivePlan(FIRST, STEPS)
    assert plan.checkpoint_at(30) == 20
    with pytest.raises(RuntimeError, match="version 2 begins at student step 30, but step 30 has been asked for"):
        plan.take(version(2, 30, (0, 50)))
    with pytest.raises(RuntimeError, match="decision 0 begins at student step 12"):
        plan.take(decision(0, 12, 50))
    plan.take(version(2, 31, (0, 50)))
    assert (plan.checkpoint_at(30), plan.checkpoint_at(31)) == (20, 50)
    with pytest.raises(RuntimeError, match="version 2 came after version 2"):
        plan.take(version(2, 40, (0, 60)))
    with pytest.raises(RuntimeError, match="decision 1 came after 0 others"):
        plan.take(decision(1, 40, 60))


def test_decisions_lead_far_enough_and_follow_each_other():
    plan = LivePlan(version(1, 0, (0, 100), policy="adaptive"), STEPS)
    assert plan.checkpoint_at(24) == 100
    with pytest.raises(RuntimeError, match=r"begins at student step 24, but step 24 has been asked for; raise schedule\.lead"):
        plan.take(decision(0, 24, 200))
    plan.take(decision(0, 25, 200))
    assert (plan.checkpoint_at(24), plan.checkpoint_at(25)) == (100, 200)
    with pytest.raises(RuntimeError, match="decision 2 came after 1 others"):
        plan.take(decision(2, 50, 200))
    plan.take(decision(1, 50, 300))
    with pytest.raises(RuntimeError, match="decision 2 begins at student step 50, not after the one before it, at 50"):
        plan.take(decision(2, 50, 100))
    with pytest.raises(AssertionError, match="of a plan for 100 steps"):
        plan.checkpoint_at(100)


@st.composite
def histories(draw):
    changes, sequence, begun = [], 0, 0
    for number in range(2, 2 + draw(st.integers(0, 5))):
        if draw(st.booleans()):
            starts = sorted(draw(st.sets(st.integers(1, STEPS - 1), max_size=4)))
            rotations = [(0, draw(st.sampled_from(THERE))), *((start, draw(st.sampled_from(THERE))) for start in starts)]
            policy = draw(st.sampled_from(["explicit", "adaptive"]))
            changes.append(version(number, draw(st.integers(0, STEPS + 5)), *rotations, policy=policy))
        else:
            begun = draw(st.integers(begun + 1, begun + 30))
            changes.append(decision(sequence, begun, draw(st.sampled_from(THERE))))
            sequence += 1
    return changes


@settings(max_examples=200, deadline=None)
@given(histories())
def test_a_plan_is_what_its_changes_say_for_each_step(changes):
    plan = LivePlan(FIRST, STEPS, changes)
    versions = [FIRST, *(c for c in changes if isinstance(c, Version))]
    decided = [c for c in changes if isinstance(c, Decision)]
    wanted = []
    for step in range(STEPS):
        there = max((v for v in versions if v.start <= step), key=lambda v: v.version)
        rotations = there.rotations
        if there.policy == "adaptive":
            rotations = (rotations[0], *((d.effective, d.checkpoint) for d in decided))
        wanted.append([teacher for start, teacher in rotations if start <= step][-1])
    changed = [(0, wanted[0])] + [(s, wanted[s]) for s in range(1, STEPS) if wanted[s] != wanted[s - 1]]
    assert plan.rotations() == changed
    assert list(zip(plan.starts, plan.teachers, strict=True)) == changed
    for step in range(STEPS):
        assert plan.next_after(step) == next((c for c in changed if c[0] > step), None)
        assert plan.checkpoint_at(step) == wanted[step]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from((100, 200, 300))), max_size=6), st.integers(1, 40))
def test_an_adaptive_plan_is_a_function_of_its_decisions(parts, steps):
    made, start = [], 0
    for number, (length, checkpoint) in enumerate(parts):
        start += length
        made.append(decision(number, start, checkpoint))
    plan = LivePlan(version(1, 0, (0, 100), policy="adaptive"), steps, made)
    wanted = [next((d.checkpoint for d in reversed(made) if d.effective <= s), 100) for s in range(steps)]
    changes = [(0, 100)] + [(s, wanted[s]) for s in range(1, steps) if wanted[s] != wanted[s - 1]]
    assert plan.rotations() == changes
    assert list(zip(plan.starts, plan.teachers, strict=True)) == changes
    assert plan.fixed() == [(0, 100)]
    assert plan.known == len(made)
    for step in range(steps):
        assert plan.next_after(step) == next((c for c in changes if c[0] > step), None)
        assert plan.checkpoint_at(step) == wanted[step]


def test_in_force():
    assert list(in_force([0, 50, 20], 100)) == [(0, 0, 20), (2, 20, 100)]
    assert list(in_force([0, 120], 100)) == [(0, 0, 100)]


def test_schedules_are_resolved_as_they_were_taken_up():
    equal = EqualConfig(checkpoints=4, steps=20)
    plan = build_plan(equal, available=THERE, steps=STEPS)
    assert resolved(2, 7, equal, plan) == Version(2, 7, "equal", tuple(plan.rotations()))
    follow = FollowConfig(refresh=10, last=100, timeout_seconds=5.0)
    assert resolved(1, 0, follow, build_plan(follow, available=(), steps=STEPS)).timeout == 5.0
    adaptive = AdaptiveConfig(teachers=(20, 40), max_dwell=30)
    found = resolved(1, 0, adaptive, build_plan(adaptive, available=THERE, steps=STEPS))
    assert (found.rotations, found.grows) == (((0, 20),), True)
