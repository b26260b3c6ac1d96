"""How much context a masked model uses: M_robust and M_close of n-grams (arXiv 2410.05464, section 4).

p_{x\\A}(i) is the model's distribution at position i with the tokens of A masked, n-gram(i) the window of n tokens around i, TV
half the L1 distance:

    M_robust(i, n) = TV(p_{x\\{i}}, p_{x\\n-gram(i)})      the n-gram is removed: low where longer context suffices
    M_close(i, n)  = TV(p_{x\\{i}}, p_{n-gram(i)\\{i}})     nothing else is left: low where the n-gram suffices

The paper's figures are of the full L1 norm, twice these.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapd.analysis.curriculum.metric import Metric, Model
from megapd.registry import metrics
from megapd.tasks import Task, to_batch
from megapd.tasks.objectives import Rows

WINDOWS = {2: (-1, 0), 3: (-1, 1), 4: (-2, 1), 5: (-2, 2)}  # first and last offset from i; cut off at the row's ends
SPACING = 30  # the paper's positions: 30, 60, ..; of shorter rows their middle
ROWS = 64  # a forward pass


@metrics.register("context")
class Context(Metric):
    """M_robust and M_close, windows 2 to 5: medians, means, deviations and percentiles over all (sample, position) together."""

    convention = (
        "TV with its 1/2, the paper's figures are twice these; masked tokens stay visible to attention, as in training; special "
        "tokens are never masked"
    )

    @classmethod
    def lacks(cls, task: Task) -> str:
        return "" if getattr(task, "mask_token", None) is not None else "a mask token: it is for masked prediction"

    def __init__(self, task: Task, samples: int) -> None:
        rows: Rows = task.heldout_rows(range(samples))  # type: ignore[attr-defined]
        self._rows, self._mask, special = rows, task.mask_token, task.special  # type: ignore[attr-defined]
        counted = (ids[:length] for ids, length in zip(rows.ids, rows.lengths.tolist(), strict=True))
        self._free = [np.flatnonzero(~special[ids]) for ids in counted]  # places of each row that may be masked
        self.settings = {"samples": samples, "spacing": SPACING, "windows": sorted(WINDOWS), "version": 1}

    def measure(self, model: Model) -> dict[str, float]:
        robust: dict[int, list[Tensor]] = {window: [] for window in WINDOWS}
        close: dict[int, list[Tensor]] = {window: [] for window in WINDOWS}
        for rows, places in self._chunks():
            alone = self._probabilities(model, rows, [np.array([place]) for place in places])
            for window, (first, last) in WINDOWS.items():
                inside = [self._window(row, place, first, last) for row, place in zip(rows, places, strict=True)]
                outside = [
                    np.append(np.setdiff1d(self._free[row], near), place)
                    for row, place, near in zip(rows, places, inside, strict=True)
                ]
                robust[window].append(_distance(alone, self._probabilities(model, rows, inside, places)))
                close[window].append(_distance(alone, self._probabilities(model, rows, outside, places)))
        found: dict[str, float] = {}
        for name, values in (("m_robust", robust), ("m_close", close)):
            for window, parts in values.items():
                found |= _summary(f"{name}_{window}", torch.cat(parts).numpy())
        return found

    def _window(self, row: int, place: int, first: int, last: int) -> NDArray[np.int64]:
        free = self._free[row]
        return free[(free >= place + first) & (free <= place + last)]

    def _chunks(self) -> Iterator[tuple[list[int], list[int]]]:
        pairs = [(row, int(place)) for row, free in enumerate(self._free) for place in _positions(free)]
        for start in range(0, len(pairs), ROWS):
            part = pairs[start : start + ROWS]
            yield [row for row, _ in part], [place for _, place in part]

    def _probabilities(
        self, model: Model, rows: list[int], masked: list[NDArray[np.int64]], places: list[int] | None = None
    ) -> Tensor:
        """[B, V] at `places`, by default those masked, of rows with those places masked."""
        ids = self._rows.ids[rows].copy()
        for number, hidden in enumerate(masked):
            ids[number, hidden] = self._mask
        asked = np.array([int(hidden[0]) for hidden in masked] if places is None else places)
        positions = np.arange(len(rows)) * ids.shape[1] + asked
        segments = None if self._rows.segments is None else self._rows.segments[rows]
        lengths = self._rows.lengths[rows] if self._rows.padded else None
        batch = to_batch(ids, segments, positions, np.zeros_like(positions), np.arange(len(rows)), lengths)
        return model(batch, mode="logits").double().softmax(-1)


def _positions(free: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of the places of a row that may be masked: each SPACING-th, or of a short row the middle one."""
    if len(free) < 2 * SPACING:
        return free[len(free) // 2 :][:1]
    return free[SPACING - 1 :: SPACING]


def _distance(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum(-1)


def _summary(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    quarters = np.percentile(values, (25, 75, 90))
    told = {"": np.median(values), "_mean": values.mean(), "_sd": values.std()}
    told |= dict(zip(("_p25", "_p75", "_p90"), quarters, strict=True))
    return {name + suffix: float(value) for suffix, value in told.items()}
