"""The transition is where the paper sees it, and stays there under noise, spikes, other spacings and missing values."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapd.config import TransitionConfig
from megapd.errors import UserError
from megapd.schedule.policies import build_plan
from megapd.schedule.transition import Found, all_metrics, find_transition

quick = settings(max_examples=100, deadline=None, derandomize=True)

# Losses that the paper gives (arXiv 2410.05464): validation loss of BERT on Wikipedia and books, in steps; training loss of BERT
# on the grammar cfg3b.
WIKIPEDIA = {2000: 6.7, 4000: 6.4, 8000: 4.3, 16_000: 2.9, 120_000: 2.15}
GRAMMAR = {200: 1.04, 400: 1.03, 600: 1.02, 1000: 0.52, 2000: 0.18, 8000: 0.045}


def metrics(values, key="eval/loss"):
    return {step: {key: value} for step, value in values.items()}


def find(values, key="eval/loss", **changes) -> Found:
    return find_transition(TransitionConfig(**{"steps": 1, **changes}), metrics(values, key))


def sigmoid(steps, middle, width, top=0.7, bottom=0.01, power=0.02):
    """A drop from `top` to `bottom` around `middle`, `width` its scale in ln(step), on a slow power of the step."""
    low, high = math.log(middle) - width, math.log(middle) + width
    return {
        s: (top - bottom) / (1 + math.exp((math.log(s) - (low + high) / 2) / width)) + bottom + power * (s / middle) ** -0.2
        for s in steps
    }


# ------------------------------------------------------------------------------------------------------------ the paper


def test_wikipedia_and_books():
    found = find(WIKIPEDIA)
    assert (found.first, found.last) == (4000, 16_000)  # "transition 4k-16k"
    assert found.picks == (8000,)  # where M_robust of 3-grams peaks
    assert found.final == 120_000
    assert found.warnings == ()


def test_the_grammar():
    found = find(GRAMMAR, "train/loss")
    assert (found.first, found.last) == (600, 2000)
    assert found.picks == (1000,)  # the best of the (2, T) students
    assert found.curve.key == "train/loss"


def test_the_descent_from_random_weights_is_no_transition():
    # It falls more a step than ever after, and a badly scaled start more per ln(step) too.
    early = {100: 9.9, 500: 8.4, 1000: 7.2}
    assert find(early | WIKIPEDIA).picks == (8000,)
    steep = find({25: 14.0, 50: 10.5, 100: 7.4, 500: 7.0, 1000: 6.9} | WIKIPEDIA)
    assert steep.picks == (8000,)
    assert any("descent from random weights" in warning for warning in steep.warnings)


def test_a_power_law_has_its_drop_where_it_begins():
    # After the transition nothing is left to find: what noise makes of the tail is not taken for one.
    generator = random.Random(0)
    found = find({s: 0.5 * (s / 1000) ** -1.3 * generator.uniform(0.97, 1.03) for s in range(1000, 20_001, 500)})
    assert found.first == 1000
    assert any("begins at the first checkpoint" in warning for warning in found.warnings)


# ------------------------------------------------------------------------------------------------------------- any curve


@quick
@given(
    st.floats(0.25, 0.75),
    st.floats(0.02, 0.12),
    st.sampled_from([60, 100, 200]),
    st.sampled_from([1, 50, 100_000]),
    st.floats(0, 0.02),
    st.integers(0, 999),
)
def test_the_middle_of_a_noisy_drop(place, width, count, every, noise, seed):
    generator = random.Random(seed)
    steps = [every * i for i in range(1, count + 1)]
    middle = steps[-1] * place
    values = {s: v + generator.uniform(-noise, noise) for s, v in sigmoid(steps, middle, width).items()}
    found = find(values)
    (pick,) = found.picks
    spacing = math.log((middle + every) / (middle - every))
    # The sigmoid goes through its middle at `middle`, and from a quarter to three quarters within 1.1 widths.
    assert abs(math.log(pick / middle)) < width + spacing + 0.01
    assert found.first < pick <= found.last
    assert 0.2 < (values[pick] - 0.03) / 0.68 < 0.8 or spacing > width


def test_the_unit_of_the_steps_does_not_matter():
    for scale in (1, 7, 1000):
        found = find({scale * s: v for s, v in WIKIPEDIA.items()})
        assert found.picks == (8000 * scale,)


def test_a_spike_is_no_drop():
    values = sigmoid(range(100, 6001, 100), 2000, 0.08)
    before = find(values).picks
    for step in (4000, 5900):
        assert find(values | {step: 3.0}).picks == before


def test_three_shot_takes_equal_parts_of_the_drop():
    values = dict(zip(range(100, 1200, 100), [1, 1, 1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.1, 0.1, 0.1], strict=True))
    assert find(values).picks == (600,)
    found = find(values, checkpoints=3)
    (early, late) = found.picks
    top, bottom = values[found.first], values[found.last]
    assert values[early] == min(values.values(), key=lambda v: abs(v - (top - (top - bottom) / 3)))
    assert values[late] == min(values.values(), key=lambda v: abs(v - (top - 2 * (top - bottom) / 3)))
    with pytest.raises(UserError, match=r"^schedule\.checkpoints: .* but 9 are asked for"):
        find(values, checkpoints=10)


def test_a_drop_between_two_neighbours():
    found = find({100: 0.7, 200: 0.7, 300: 0.69, 400: 0.01, 500: 0.01})
    assert found.picks == (400,)
    assert any("between two neighbours, steps 300 and 400" in warning for warning in found.warnings)


def test_a_teacher_that_stops_in_the_drop():
    found = find({100: 0.7, 200: 0.69, 300: 0.68, 400: 0.5, 500: 0.3})
    assert found.picks == (400,)
    assert any("goes on at the last checkpoint" in warning for warning in found.warnings)
    with pytest.raises(UserError, match=r"^schedule\.checkpoints: .* 0 checkpoints lie before the trajectory's last"):
        find({100: 0.7, 200: 0.69, 300: 0.1})


# ------------------------------------------------------------------------------------------------- missing values, flat ones


def test_no_metrics():
    for there in ({}, {"eval/loss": None}, {"eval/loss": math.nan}, {"eval/accuracy": 0.5}, {"eval/loss": "0.3"}):
        with pytest.raises(UserError, match=r"0 of its checkpoints carry a value of eval/loss .* evaluation\.every"):
            find_transition(TransitionConfig(steps=1), dict.fromkeys(range(1, 9), there))


def test_flat():
    with pytest.raises(UserError, match="eval/loss is flat"):
        find({step: 0.7 - 0.001 * math.sin(step) for step in range(1, 30)})
    with pytest.raises(UserError, match="is flat"):
        find({step: 0.5 + step for step in range(1, 30)})  # one that rises


def test_a_stale_value_counts_once():
    # Held-out loss every 400 steps, trajectory every 100: between evaluations a checkpoint repeats the last one's value.
    smooth = sigmoid(range(100, 6001, 100), 2000, 0.1)
    stale = {s: smooth[max(400, s // 400 * 400)] for s in smooth}
    found = find(stale)
    assert all(step % 400 == 0 or step == 100 for step in found.curve.steps)
    assert found.picks == (2000,)
    # Where the training loss is finer, it is taken.
    both = {s: {"eval/loss": stale[s], "train/loss": smooth[s]} for s in smooth}
    assert find_transition(TransitionConfig(steps=1), both).curve.key == "train/loss"
    both = {s: {"eval/loss": smooth[s], "train/loss": smooth[s]} for s in smooth}
    assert find_transition(TransitionConfig(steps=1), both).curve.key == "eval/loss"


def test_checkpoints_without_a_value_are_left_aside():
    values = metrics(WIKIPEDIA | {5000: math.inf})
    values |= {6000: {}, 130_000: {}}
    found = find_transition(TransitionConfig(steps=1), values)
    assert found.picks == (8000,)
    assert found.final == 130_000


# ------------------------------------------------------------------------------------------------------ curriculum metrics


# Degree-1 correlation of the paper's parity teacher peaks at ~0.095 at 10.2M samples; others ~0.002.
DEGREE_1 = {9_700_000: 0.004, 10_000_000: 0.03, 10_200_000: 0.095, 10_500_000: 0.02, 10_800_000: 0.003, 20_000_000: 0.002}


@pytest.mark.parametrize(("metric", "key"), [("degree_1", "curriculum/degree_1"), ("m_robust_3", "curriculum/m_robust_3")])
def test_the_peak_of_a_curriculum_metric(metric, key):
    assert find(DEGREE_1, key, metric=metric).picks == (10_200_000,)
    found = find(DEGREE_1, key)
    assert found.picks == (10_200_000,)
    assert (found.first, found.last) == (10_200_000, 10_200_000)
    assert find(DEGREE_1, key, checkpoints=4).picks == (10_000_000, 10_200_000, 10_500_000)


def test_a_curriculum_metric_goes_before_the_loss_where_it_peaks():
    both = {
        s: {"eval/loss": v, "curriculum/m_robust_3": w}
        for (s, v), w in zip(WIKIPEDIA.items(), [0.1, 0.3, 0.2, 0.1, 0], strict=True)
    }
    assert find_transition(TransitionConfig(steps=1), both).picks == (4000,)
    assert find_transition(TransitionConfig(steps=1, metric="loss"), both).picks == (8000,)
    for key, flat in (("m_robust_3", [0.2, 0.21, 0.2, 0.19, 0.2]), ("support", [0.01, 0.02, 0.03, 0.04, 0.05])):
        values = {s: {"eval/loss": v, f"curriculum/{key}": w} for (s, v), w in zip(WIKIPEDIA.items(), flat, strict=True)}
        assert find_transition(TransitionConfig(steps=1), values).picks == (8000,)
        with pytest.raises(UserError, match=r"curriculum/(m_robust_3 is flat, it rises|support peaks at step 120000)"):
            find_transition(TransitionConfig(steps=1, metric=key), values)
    with pytest.raises(UserError, match="curriculum/degree_1"):
        find_transition(TransitionConfig(steps=1, metric="degree_1"), both)


def test_a_rise_that_stays():
    """Of M_robust where it does not fall again: the checkpoint nearest to the middle of the rise."""
    values = [0.017, 0.02, 0.018, 0.06, 0.163, 0.25, 0.285, 0.28, 0.29]
    both = {100 * (i + 10): {"eval/loss": 2.7 - 0.01 * i, "curriculum/m_robust_3": v} for i, v in enumerate(values)}
    for metric in ("auto", "m_robust_3"):
        found = find_transition(TransitionConfig(steps=1, metric=metric), both)
        assert (found.first, found.last, found.picks) == (1200, 1600, (1400,))
        assert "curriculum/m_robust_3 rises from 0.018 at step 1200 to 0.285 at step 1600" in found.why
        assert found.value(1400) == 0.163
        assert max(found.curve.slopes()) > 0


def test_the_support_goes_before_other_metrics():
    steps = (450, 525, 600, 675, 1500)
    support, first = (3.5, 28.0, 23.0, 7.6, 1.2), (4.0, 1.0, 5.0, 1.0, 1.0)
    values = {
        s: {"curriculum/support": a, "curriculum/degree_1": b, "eval/loss": 0.7 - s * 1e-5}
        for s, a, b in zip(steps, support, first, strict=True)
    }
    assert find_transition(TransitionConfig(steps=1), values).picks == (525,)
    assert find_transition(TransitionConfig(steps=1, metric="degree_1"), values).picks == (600,)


# ------------------------------------------------------------------------------------------------------------ the schedule


def test_two_shot_around_the_transition():
    values = metrics(WIKIPEDIA)
    plan = build_plan(TransitionConfig(steps=30), available=[0, *WIKIPEDIA], steps=100, metrics_of=values.__getitem__)
    assert plan.policy == "transition"
    assert plan.rotations() == [(0, 8000), (30, 120_000)]
    assert plan.warnings == ()
    plan = build_plan(
        TransitionConfig(steps=30, checkpoints=3), available=[0, *WIKIPEDIA], steps=40, metrics_of=values.__getitem__
    )
    assert plan.rotations() == [(0, 8000), (30, 16_000)]
    assert "step 120000, begins at 60" in plan.warnings[0]


def test_a_trajectory_that_stores_no_metrics():
    with pytest.raises(UserError, match=r"^schedule\.policy: transition reads the metrics .* explicit"):
        build_plan(TransitionConfig(steps=30), available=[1, 2, 3], steps=100)


def test_step_0_is_not_read():
    def metrics_of(step):
        assert step > 0
        return {"eval/loss": WIKIPEDIA[step]}

    assert list(all_metrics([0, *WIKIPEDIA], metrics_of)) == list(WIKIPEDIA)
