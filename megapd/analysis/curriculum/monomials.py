"""How far a model of parity has found the support: correlations of monomials with its answer (arXiv 2410.05464, section 3).

Of a set S of coordinates, |mean over samples of prod_{i in S} x_i * (p(x) - mean p)|, p the probability of class 1 (of more than
two classes, of their upper half, which the root of a hierarchical parity decides). Sets within the support against others of the
same size.
"""

from __future__ import annotations

from itertools import combinations
from math import pi, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from megapd.analysis.curriculum.metric import Metric, Model
from megapd.registry import metrics
from megapd.rng import Stream, bits, permute
from megapd.tasks import Task

CHUNK = 4096
MOST_DEGREE = 5
OTHERS = 100


@metrics.register("monomials")
class Monomials(Metric):
    """degree_K, the mean over all sets of K coordinates of the support; degree_K_out over 100 others; floor, what an absent
    correlation shows; support, the largest ratio of the two over the degrees below the support's own."""

    convention = "p is centred; an absent correlation shows as `floor`, sqrt(2 / pi) sd(p) / sqrt(samples), on the average"
    samples = 20_000

    @classmethod
    def lacks(cls, task: Task) -> str:
        return "" if hasattr(task, "supports") else "a hidden support: it is for parity"

    def __init__(self, task: Task, samples: int) -> None:
        self._task, self._samples = task, samples
        support = sorted(int(i) for i in task.supports[0])  # type: ignore[attr-defined]
        self._own = {degree: list(combinations(support, degree)) for degree in range(1, min(MOST_DEGREE, len(support)) + 1)}
        self._others = {degree: _others(task.length, support, degree) for degree in self._own}
        self._degree = len(support)
        self.settings = {"samples": self._samples, "others": OTHERS, "version": 1}

    def measure(self, model: Model) -> dict[str, float]:
        signs, upper = [], []
        for start in range(0, self._samples, CHUNK):
            batch = self._task.heldout(range(start, min(start + CHUNK, self._samples)))
            signs.append(2.0 * batch.ids.double() - 1.0)
            probabilities = model(batch, mode="logits").double().softmax(-1)
            upper.append(probabilities[:, probabilities.shape[1] // 2 :].sum(-1))
        x, p = torch.cat(signs), torch.cat(upper)
        centred = p - p.mean()
        floor = sqrt(2.0 / pi) * centred.square().mean().sqrt().item() / sqrt(self._samples)
        found, ratios = {"floor": floor}, [0.0]
        for degree, own in self._own.items():
            inside, outside = (_correlations(x, centred, sets) for sets in (own, self._others[degree]))
            found[f"degree_{degree}"], found[f"degree_{degree}_out"] = inside, outside
            if degree < self._degree and (base := max(outside, floor)) > 0:
                ratios.append(inside / base)
        return {**found, "support": max(ratios)}


def _correlations(x: torch.Tensor, centred: torch.Tensor, sets: list[tuple[int, ...]]) -> float:
    """The mean of the sets' correlations."""
    if not sets:
        return 0.0
    values = [(x[:, list(each)].prod(-1) * centred).mean().abs() for each in sets]
    return float(torch.stack(values).mean())


def _others(dimension: int, support: list[int], degree: int) -> list[tuple[int, ...]]:
    """OTHERS random sets of coordinates that are not all of the support; fewer where there are fewer."""
    found: dict[tuple[int, ...], None] = {}
    inside = set(support)
    for number in range(20 * OTHERS):
        key = bits(0, Stream.MONOMIALS, number, degree)
        chosen: NDArray[np.int64] = permute(np.arange(min(degree, dimension)), dimension, key)
        each = tuple(sorted(chosen.tolist()))
        if not set(each) <= inside:
            found[each] = None
        if len(found) == OTHERS:
            break
    return list(found)
