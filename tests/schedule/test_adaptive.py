"""The rule of adaptive schedules, against its definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.config import AdaptiveConfig
from megapd.errors import UserError
from megapd.schedule.adaptive import check_lead, decide, reported_kind
from megapd.schedule.plan import Report
from megapd.schedule.policies import build_plan, candidates

quick = settings(max_examples=150, deadline=None, derandomize=True)

CANDIDATES = (100, 200, 300)


def adaptive(**changes) -> AdaptiveConfig:
    return AdaptiveConfig(**{"teachers": CANDIDATES, "window": 3, "lead": 4} | changes)


def decisions_of(setting, values, every=10):
    """The decisions of a run that reports `values`, one each `every` steps."""
    reports, made = [], []
    for number, value in enumerate(values, start=1):
        reports.append(Report(number * every, value))
        decision = decide(setting, setting.teachers, reports, made, number * every)
        if decision is not None:
            made.append(decision)
    return made


# ---------------------------------------------------------------------------------------------------------------- decide


def test_the_papers_rule_on_its_own_course():
    # At chance, then learning, then saturated: not on the first plateau, where nothing was gained since the run began.
    values = [0.5] * 20 + [0.55, 0.65, 0.75, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
    (made,) = decisions_of(AdaptiveConfig(teachers=CANDIDATES), values)
    assert made.reason == "saturated"
    assert (made.sequence, made.checkpoint) == (0, 200)
    # 0.8 gained less than 0.01 over the mean of five values first when all five are above 0.79.
    assert made.step == 10 * (values.index(0.8) + 1 + 5)
    assert made.effective == made.step + 10
    assert made.evidence == {
        "metric": "accuracy",
        "value": 0.8,
        "from": 100,
        "dwell": made.step,
        "gains": [pytest.approx(0.0)],
        "progress": pytest.approx(0.3),
    }


def test_a_plateau_without_progress_ends_at_max_dwell():
    assert decisions_of(adaptive(), [0.5] * 50) == []
    made = decisions_of(adaptive(max_dwell=100), [0.5] * 50)
    assert [(d.step, d.effective, d.checkpoint, d.reason) for d in made] == [
        (100, 104, 200, "max_dwell"),
        # The dwell of the second began at 104; its first report at or beyond 204 is that of 210.
        (210, 214, 300, "max_dwell"),
    ]
    assert [d.step for d in decisions_of(adaptive(progress=0), [0.5] * 50)] == [40, 80]


def test_min_dwell_and_patience():
    values = [0.5, 0.7, 0.8] + [0.8] * 40
    assert decisions_of(adaptive(), values)[0].step == 60  # 0.8 against (0.8, 0.8, 0.8)
    assert decisions_of(adaptive(min_dwell=95), values)[0].step == 100
    assert decisions_of(adaptive(patience=3), values)[0].step == 80
    assert decisions_of(adaptive(gain=0.2), values)[0].step == 40  # 0.8 against the mean of 0.5, 0.7 and 0.8 gains 0.13
    # One report that gains begins the count anew.
    assert decisions_of(adaptive(patience=2), [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.9, *[0.9] * 9])[0].step == 110


def test_a_divergence_improves_downwards_and_is_measured_against_one_teacher():
    # Another checkpoint raises the divergence; progress counts from there.
    first = [1.0, 0.5, 0.2, 0.2, 0.2, 0.2]
    second = [1.5, 0.9, 0.9, 0.9, 0.9, 0.9]
    made = decisions_of(adaptive(metric="divergence"), first + second)
    assert [(d.step, d.checkpoint) for d in made] == [(60, 200), (110, 300)]
    assert made[1].evidence["progress"] == pytest.approx(0.6)
    # The accuracy's progress counts from the advance.
    upwards = [0.5, 0.7, 0.8, 0.8, 0.8, 0.8, 0.805, 0.805, 0.805, 0.805, 0.805, 0.83, 0.83, 0.83, 0.83]
    made = decisions_of(adaptive(), upwards)
    assert [d.step for d in made] == [60, 140]
    assert made[1].evidence["progress"] == pytest.approx(0.03)


def test_nothing_follows_the_last():
    assert len(decisions_of(adaptive(max_dwell=10), [0.5] * 100)) == len(CANDIDATES) - 1
    assert decisions_of(AdaptiveConfig(teachers=(7,), max_dwell=10), [0.5] * 100) == []


def test_a_late_report_takes_effect_later():
    made = decide(adaptive(max_dwell=10), CANDIDATES, [Report(10, 0.5)], [], now=95)
    assert (made.step, made.effective) == (10, 99)


@quick
@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 60), st.data())
def test_any_course(values, window, patience, min_dwell, data):
    max_dwell = data.draw(st.one_of(st.none(), st.integers(min_dwell, 200)))
    setting = adaptive(window=window, patience=patience, min_dwell=min_dwell, max_dwell=max_dwell)
    made = decisions_of(setting, values)
    starts = [0, *(d.effective for d in made)]
    for number, found in enumerate(made):
        assert found.sequence == number
        assert found.checkpoint == CANDIDATES[number + 1]
        assert found.effective == found.step + setting.lead
        assert min_dwell <= found.step - starts[number]
        if found.reason == "saturated":
            dwell = [values[i] for i in range(len(values)) if starts[number] < 10 * (i + 1) <= found.step]
            for back in range(patience):
                end = len(dwell) - 1 - back
                assert dwell[end] - sum(dwell[end - window : end]) / window < setting.gain + 1e-12
        else:
            assert found.step - starts[number] >= max_dwell
    if max_dwell is not None and len(values) * 10 >= 3 * (max_dwell + 20):
        assert len(made) == 2


# ------------------------------------------------------------------------------------------------------------ its settings


def test_the_lead_is_checked():
    check_lead(adaptive(lead=3), 2)
    with pytest.raises(UserError, match=r"^schedule\.lead: 2 student steps, but signals are asked for 2 steps ahead"):
        check_lead(adaptive(lead=2), 2)
    assert (reported_kind(adaptive()), reported_kind(adaptive(metric="divergence"))) == ("eval", "train")


def test_candidates():
    there = [0, 10, 20, 40, 80]
    assert candidates(AdaptiveConfig(teachers=(0, 20)), there) == (0, 20)
    assert candidates(AdaptiveConfig(checkpoints=2), there) == (40, 80)
    assert candidates(AdaptiveConfig(checkpoints=4, spacing="geometric"), there) == (10, 20, 40, 80)
    plan = build_plan(AdaptiveConfig(checkpoints=2), available=there, steps=9)
    assert (plan.policy, plan.rotations(), plan.warnings) == ("adaptive", [(0, 40)], ())
    with pytest.raises(UserError, match=r"^schedule\.teachers: .*step 30"):
        build_plan(AdaptiveConfig(teachers=(10, 30)), available=there, steps=9)
    for changes, message in (
        ({}, "checkpoints: give either"),
        ({"checkpoints": 2, "teachers": (1,)}, "checkpoints: give either"),
        ({"teachers": (2, 2)}, "teachers: the steps must increase"),
        ({"checkpoints": 2, "min_dwell": 9, "max_dwell": 8}, "max_dwell: 8 is below min_dwell 9"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveConfig(**changes)
