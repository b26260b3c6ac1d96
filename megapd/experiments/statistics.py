"""What several seeds say: medians of runs that may not have arrived, and differences between methods with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95

Pairs = Mapping[int, Sequence[float]]  # teacher seed -> one difference a student seed


class Interval(NamedTuple):
    """A mean of differences and where it lies, by the bootstrap, with probability LEVEL."""

    mean: float
    low: float
    high: float


class Arrivals(NamedTuple):
    """Of steps to a threshold, some of which were never made: how many arrived, of how many; the median, inf where fewer than
    half did; the least and the most, inf where one never did."""

    arrived: int
    of: int
    median: float
    least: float
    most: float


def arrivals(steps: Sequence[int | None]) -> Arrivals:
    """None: never within the run, which counts as later than all others, not as its last step."""
    values = sorted(math.inf if step is None else float(step) for step in steps)
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else 0.5 * (values[middle - 1] + values[middle])
    return Arrivals(sum(map(math.isfinite, values)), len(values), median, values[0], values[-1])


def paired(differences: Pairs, resamples: int = RESAMPLES) -> Interval:
    """The mean over teachers and students, and its percentile interval.

    Teachers are drawn again with replacement, then the students of each: students of one teacher are no independent trials. With
    one teacher the interval is of its students alone, and says nothing of other teachers.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in differences.values() if len(values)]
    random = np.random.default_rng(0)
    drawn = np.empty(resamples)
    for number in range(resamples):
        chosen = random.integers(0, len(groups), len(groups)) if len(groups) > 1 else [0]
        drawn[number] = np.concatenate([random.choice(groups[group], len(groups[group])) for group in chosen]).mean()
    low, high = np.percentile(drawn, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Interval(float(np.concatenate(groups).mean()), float(low), float(high))


def first_of(own: Sequence[int | None], other: Sequence[int | None]) -> tuple[int, int, int]:
    """Pair by pair, of steps to a threshold: own earlier, both alike, other earlier. Never is later than any step, and two that
    never arrived are alike."""
    signs = [_compare(a, b) for a, b in zip(own, other, strict=True)]
    return signs.count(-1), signs.count(0), signs.count(1)


def _compare(a: int | None, b: int | None) -> int:
    left, right = (math.inf if step is None else float(step) for step in (a, b))
    return (left > right) - (left < right)
