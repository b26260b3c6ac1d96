"""Where a teacher's phase transition lies, from the metrics stored with its checkpoints.

The best single intermediate checkpoint is the middle of the sharp drop of the teacher's loss, which is where the degree-1
correlation (parity) or the median M_robust of 3-grams (language) peaks (arXiv 2410.05464, sections 3 to 5). Three readings:

    peak of a curriculum metric   the checkpoint of its largest value
    rise of M_robust              where it does not fall again: as the drop of the loss, upside down
    drop of the loss              the checkpoint whose loss is nearest to the middle, in loss, of the steepest drop

Which of parity's correlations shows the transition differs: `support` takes the largest ratio of those inside the support to
those outside over all degrees below the support's own, which a model that is right shows too. At (50, 5) it is at most 1.6 before
the transition, 24 to 26 in it and 1.1 after, where degree 1 lies between 0.7 and 7.2; at (40, 4) 28 in it, where degree 1 reaches
4.8 (benchmarks/curriculum.py). M_robust of small models on small grammars rises in the transition and stays there.

Steepness is -d loss / d ln(step), of the loss itself:
  - over the logarithm of the step, because from random weights a loss falls fastest per step long before anything is learnt:
    the paper's BERT on Wikipedia and books loses more a step before its first checkpoint (6.7 at 2k) than ever after, but most
    per doubling between 4k and 8k (6.4 to 4.3), where its 3-gram M_robust peaks; and so that the answer does not depend on the
    unit of the steps;
  - of the loss and not of its logarithm, which falls fastest after the transition, as a solved task's loss goes to zero.

What is noise is told from a drop by its size: only what falls by a quarter of the whole fall counts, and only where the loss is
lower than ever before, so that neither a batch's noise between close checkpoints nor a spike makes a drop. The drop then
extends to both sides as long as neighbours fall at least a third as steeply. From the losses that the paper gives, these rules
find its transitions: 4k to 16k for Wikipedia and books, 0.6k to 2k for the grammar, middles at 8k and 1k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from megapd.config import TransitionConfig
from megapd.errors import UserError

# What a checkpoint's metrics are read under. The curriculum metrics are recorded by analysis, averaged over what the paper
# averages over: degree_1, |correlation| of a support bit with the probability of class 1; m_robust_3, the median total variation.
LOSSES = ("eval/loss", "train/loss")
PEAKS = {"support": "curriculum/support", "degree_1": "curriculum/degree_1", "m_robust_3": "curriculum/m_robust_3"}
RISES = ("m_robust_3",)  # if it does not fall again

CORE = 0.25  # share of the whole fall that the steepest part must have
SHOULDER = 1 / 3  # of the core's slope, that its neighbours need to belong to the drop
FLAT = 0.1  # a loss that falls by less than this share of its first value has no transition: a batch's noise is of that size
PEAK = 2.0  # a peak is at least this many times the smallest value
GRADUAL = 8.0  # the paper's transitions take a factor of 1.05 (parity) to 4 (Wikipedia) in steps

Metrics = Mapping[int, Mapping[str, Any]]  # teacher step -> Checkpoint.metrics


@dataclass(frozen=True)
class Curve:
    """One metric over the checkpoints that carry a new value of it: their steps, increasing and positive, and the values.

    rises: its transition is a rise, and so a drop of its negative
    """

    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    rises: bool = False

    @property
    def heights(self) -> tuple[float, ...]:
        """What drops."""
        return tuple(-value for value in self.values) if self.rises else self.values

    def slopes(self) -> list[float]:
        """Fall, or rise, per unit of ln(step) from each checkpoint to the next, one fewer than there are."""
        points = zip(self.steps, self.heights, strict=True)
        return [(value - later) / math.log(after / step) for (step, value), (after, later) in pairwise(points)]


@dataclass(frozen=True)
class Found:
    """A transition and the checkpoints chosen in it.

    curve         the metric it was found in
    first, last   teacher steps between which it lies
    picks         teacher steps chosen, increasing
    final         teacher step of the trajectory's last checkpoint, which teaches after them
    why           one sentence with the numbers
    warnings      what a user should look at, one line each
    """

    curve: Curve
    first: int
    last: int
    picks: tuple[int, ...]
    final: int
    why: str
    warnings: tuple[str, ...] = ()

    def value(self, step: int) -> float:
        return self.curve.values[self.curve.steps.index(step)]


def find_transition(schedule: TransitionConfig, metrics: Metrics) -> Found:
    """The schedule.checkpoints - 1 checkpoints to teach before the last one. Pure; O(n^2) in the number of checkpoints.

    metrics: of every checkpoint of the trajectory. Raises UserError where they are missing or show no transition.
    """
    assert metrics
    final = max(metrics)
    if schedule.metric == "auto":
        for name, key in PEAKS.items():
            curve = _curve(metrics, key)
            if len(curve.steps) < 3 or not _has_peak(curve):
                continue
            if name in RISES and not _falls_again(curve):
                return _inside_drop(replace(curve, rises=True), schedule.checkpoints - 1, final)
            if curve.steps[curve.values.index(max(curve.values))] != final:
                return _around_peak(curve, schedule.checkpoints - 1, final)
    elif schedule.metric != "loss":
        curve = _curve(metrics, PEAKS[schedule.metric])
        _require(curve, "measure it with `megapd analyse`, or choose schedule.metric loss")
        if schedule.metric in RISES and not _falls_again(curve):
            return _inside_drop(replace(curve, rises=True), schedule.checkpoints - 1, final)
        if not _has_peak(curve):
            low, high = min(curve.values), max(curve.values)
            raise UserError(
                f"schedule.metric: {curve.key} has no peak, it lies between {low:.4g} and {high:.4g}; choose schedule.metric loss"
            )
        return _around_peak(curve, schedule.checkpoints - 1, final)
    # Of equally many values, the held-out loss: it has less noise.
    curve = max((_curve(metrics, key) for key in LOSSES), key=lambda curve: len(curve.steps))
    _require(curve, "set the teacher's evaluation.every to its trajectory.every, or choose schedule.policy explicit")
    return _inside_drop(curve, schedule.checkpoints - 1, final)


def _curve(metrics: Metrics, key: str) -> Curve:
    """The checkpoints with a finite value that differs from the one before: a checkpoint carries the latest value that its run
    had, and an equal one was measured at an earlier checkpoint's time. Step 0, random weights, is no part of it."""
    steps: list[int] = []
    values: list[float] = []
    for step in sorted(metrics):
        value = metrics[step].get(key)
        if step == 0 or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        if not values or float(value) != values[-1]:
            steps.append(step)
            values.append(float(value))
    return Curve(key, tuple(steps), tuple(values))


def _require(curve: Curve, fix: str) -> None:
    if len(curve.steps) < 3:
        raise UserError(
            f"teacher.trajectory: {len(curve.steps)} of its checkpoints carry a value of {curve.key} of their own, but "
            f"finding the transition needs 3; {fix}"
        )


# ------------------------------------------------------------------------------------------------------------ the loss


def _inside_drop(curve: Curve, count: int, final: int) -> Found:
    warnings = []
    drops, drop = ("rises", "rise") if curve.rises else ("drops", "drop")
    first, last, slope = _drop(curve, 0)
    if first == 0:
        # The first descent, from random weights, comes before any plateau. A transition follows one.
        later = _after_plateau(curve, last, SHOULDER * slope)
        if later is None:
            warnings.append(
                f"the {drop} begins at the first checkpoint, step {curve.steps[0]}: the transition "
                f"may lie before it; "
                f"write the teacher's first checkpoints earlier"
            )
        else:
            warnings.append(
                f"an earlier drop, from {curve.values[0]:.4g} at step {curve.steps[0]} to {curve.values[last]:.4g} at step "
                f"{curve.steps[last]}, follows no plateau and was taken for the descent from random weights"
            )
            first, last = later
    inside = [place for place in range(first + 1, last + 1) if curve.steps[place] != final]
    top, bottom = curve.values[first], curve.values[last]
    span = f"from {top:.4g} at step {curve.steps[first]} to {bottom:.4g} at step {curve.steps[last]}"
    if len(inside) < count:
        raise UserError(
            f"schedule.checkpoints: {curve.key} {drops} {span}, where {len(inside)} checkpoints lie before the trajectory's "
            f"last, but {count} are asked for; lower it, train the teacher further, or write its trajectory more often"
        )
    levels = [top + (bottom - top) * number / (count + 1) for number in range(1, count + 1)]
    chosen = nearest_increasing(lambda i, j: abs(curve.values[inside[j]] - levels[i]), count, len(inside))
    picks = tuple(curve.steps[inside[place]] for place in chosen)
    if last == first + 1:
        warnings.append(
            f"the whole {drop} lies between two neighbours, steps {curve.steps[first]} and {curve.steps[last]}: none is in its "
            f"middle; write the teacher's trajectory more often there (trajectory.steps)"
        )
    if last == len(curve.steps) - 1:
        warnings.append(f"the {drop} still goes on at the last checkpoint, step {curve.steps[last]}; train the teacher further")
    if curve.steps[last] > GRADUAL * curve.steps[first]:
        warnings.append(
            f"the {drop} takes a factor of {curve.steps[last] / curve.steps[first]:.3g} in steps: a gradual descent more than a "
            f"transition"
        )
    steepest = max(curve.slopes()[first:last])
    middle = ("its middle is " if count == 1 else "its parts end at ") + ", ".join(f"{level:.4g}" for level in levels)
    named = ", ".join(f"{step} ({value:.4g})" for step, value in zip(curve.steps, curve.values, strict=True) if step in picks)
    why = (
        f"{curve.key} {drops} {span}, at most by {steepest:.4g} per unit of ln(step); "
        f"{middle}, nearest to which {'is' if count == 1 else 'are'} step {named}"
    )
    return Found(curve, curve.steps[first], curve.steps[last], picks, final, why, tuple(warnings))


def _drop(curve: Curve, start: int) -> tuple[int, int, float]:
    """The steepest drop from place `start` on, as the places of its two ends and the slope of its steepest part; UserError if the
    loss is flat there."""
    lowest = np.minimum.accumulate(np.asarray(curve.heights[start:]))
    when = np.log(np.asarray(curve.steps[start:], dtype=np.float64))
    whole = float(lowest[0] - lowest[-1])
    if whole < FLAT * abs(float(lowest[0])):
        raise UserError(
            f"teacher.trajectory: {curve.key} is flat, it {'rises' if curve.rises else 'falls'} from {abs(lowest[0]):.4g} to "
            f"{abs(lowest[-1]):.4g} at most, by less than "
            f"{FLAT:.0%}: the teacher shows no transition; train it further, or choose another schedule.policy"
        )
    best, first, last = -math.inf, 0, 0
    for i in range(lowest.size - 1):
        falls = lowest[i] - lowest[i + 1 :]
        slopes = np.where(falls >= CORE * whole, falls / (when[i + 1 :] - when[i]), -math.inf)
        j = int(np.argmax(slopes))
        if slopes[j] > best:
            best, first, last = float(slopes[j]), i, i + 1 + j
    slopes = (lowest[:-1] - lowest[1:]) / np.diff(when)
    while first > 0 and slopes[first - 1] >= SHOULDER * best:
        first -= 1
    while last < lowest.size - 1 and slopes[last] >= SHOULDER * best:
        last += 1
    return start + first, start + last, best


def _after_plateau(curve: Curve, start: int, slope: float) -> tuple[int, int] | None:
    """The first drop from place `start` on that does not begin where the search begins and has `slope` at least, None if there
    is none.

    Where a loss goes on falling as a power of the step, the steepest part is always the first, and what noise makes of the rest
    is less steep.
    """
    while len(curve.steps) - start >= 3:
        try:
            first, last, steepest = _drop(curve, start)
        except UserError:
            return None  # flat
        if steepest < slope:
            return None
        if first > start:
            return first, last
        start = last
    return None


# --------------------------------------------------------------------------------------------------- a curriculum metric


def _has_peak(curve: Curve) -> bool:
    low, high = min(curve.values), max(curve.values)
    return high > 0 and high >= PEAK * low


def _falls_again(curve: Curve) -> bool:
    """Whether it falls to half of its top after it."""
    top = max(curve.values)
    return min(curve.values[curve.values.index(top) :]) <= top / 2


def _around_peak(curve: Curve, count: int, final: int) -> Found:
    top = max(curve.values)
    place = curve.values.index(top)
    first, last = place, place
    while first > 0 and curve.values[first - 1] >= top / 2:
        first -= 1
    while last < len(curve.values) - 1 and curve.values[last + 1] >= top / 2:
        last += 1
    peak, warnings = curve.steps[place], []
    others = [step for step in curve.steps if step != final]
    if peak == final or len(others) < count:
        raise UserError(
            f"schedule.checkpoints: {curve.key} peaks at step {peak}, {len(others)} checkpoints lie before the trajectory's "
            f"last, and {count} around the peak are asked for; lower it, train the teacher further, or write its trajectory "
            f"more often"
        )
    if place in (0, len(curve.steps) - 1):
        end = "first" if place == 0 else "last"
        warnings.append(f"{curve.key} peaks at the {end} checkpoint that carries it, step {peak}: the true peak may lie beyond")
    near = sorted(others, key=lambda step: (abs(math.log(step / peak)), step))[:count]
    picks = tuple(sorted(near))
    span = f"from step {curve.steps[first]} to {curve.steps[last]}"
    why = f"{curve.key} peaks at step {peak} with {top:.4g}, and is at least half that {span}"
    return Found(curve, curve.steps[first], curve.steps[last], picks, final, why, tuple(warnings))


# ------------------------------------------------------------------------------------------------------------- choosing


def nearest_increasing(distance: Callable[[int, int], float], count: int, total: int) -> list[int]:
    """Increasing places p_0 < ... < p_(count-1) below `total` with the smallest sum of distance(i, p_i); of equal sums the first
    in lexicographic order. O(count * total)."""
    assert 1 <= count <= total
    # best[i][j]: the smallest sum for targets i.. and places j...
    best: list[list[float]] = [[math.inf] * (total + 1) for _ in range(count)] + [[0] * (total + 1)]

    def take(i: int, j: int) -> float:
        return best[i + 1][j + 1] + distance(i, j)

    for i in reversed(range(count)):
        for j in reversed(range(total)):
            best[i][j] = min(best[i][j + 1], take(i, j))
    chosen, j = [], 0
    for i in range(count):
        while take(i, j) != best[i][j]:
            j += 1
        chosen.append(j)
        j += 1
    return chosen


def all_metrics(steps: Sequence[int], metrics_of: Callable[[int], Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Teacher step -> metrics of each checkpoint, step 0 left out."""
    return {step: metrics_of(step) for step in steps if step > 0}
