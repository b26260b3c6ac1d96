"""Medians of runs that may never arrive, and intervals of paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megapd.experiments.statistics import arrivals, first_of, paired


def test_a_run_that_never_arrives_is_later_than_all():
    assert arrivals([30, None, 10]) == (2, 3, 30.0, 10.0, math.inf)
    assert arrivals([30, None, 10, None]) == (2, 4, math.inf, 10.0, math.inf)
    assert arrivals([30, 20, 10, None]) == (3, 4, 25.0, 10.0, math.inf)
    assert arrivals([None]) == (0, 1, math.inf, math.inf, math.inf)


def test_who_is_first():
    assert first_of([10, 20, None, None, 5], [20, 20, None, 7, None]) == (2, 2, 1)


def test_differences_by_one_teacher_are_bootstrapped_over_students():
    values = list(np.random.default_rng(1).normal(0.2, 1.0, 40))
    found = paired({0: values})
    error = np.std(values) / 40**0.5
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert paired({0: values}) == found  # nothing random is left to chance


def test_students_of_one_teacher_are_no_independent_trials():
    """Five teachers whose students all say the same: the interval is that of five numbers, not of a hundred."""
    means = [0.0, 0.1, 0.2, 0.3, 0.4]
    found = paired({number: [mean] * 20 for number, mean in enumerate(means)})
    assert found.mean == pytest.approx(0.2)
    assert 0.2 < found.high - found.low < 0.35
    naive = paired({0: [mean for mean in means for _ in range(20)]})
    assert naive.high - naive.low < 0.08


def test_an_interval_covers():
    """Of 60 made-up experiments of 4 teachers, the true difference lies inside in most. The percentile bootstrap of so few groups
    is narrow: three quarters, not 95 %, are asked for."""
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(60):
        found = paired({t: list(random.normal(random.normal(0.5, 1.0), 1.0, 6)) for t in range(4)}, resamples=1000)
        inside += found.low <= 0.5 <= found.high
    assert inside >= 45
