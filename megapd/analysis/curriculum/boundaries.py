"""Where in the tree of a sentence a model is right: accuracy at the last tokens of each level's symbols."""

from __future__ import annotations

import numpy as np

from megapd.analysis.curriculum.metric import Metric, Model
from megapd.registry import metrics
from megapd.tasks import Task
from megapd.tasks.grammar import GrammarTask

ROWS = 64


class TreeMetric(Metric):
    """A metric of the trees of a grammar's sentences."""

    @classmethod
    def lacks(cls, task: Task) -> str:
        return "" if isinstance(task, GrammarTask) else "trees: it is for task.kind grammar"

    def __init__(self, task: Task, samples: int) -> None:
        assert isinstance(task, GrammarTask)
        self._task, self._samples = task, samples
        self.settings = {"samples": self._samples, "version": 1}


@metrics.register("boundaries")
class Boundaries(TreeMetric):
    """boundary_L: accuracy at held-out predicted tokens that end a symbol of level L and none above; boundary_0: none at all."""

    convention = "each token counts for the highest level that ends with it"
    samples = 512

    def measure(self, model: Model) -> dict[str, float]:
        depth = self._task.grammar.depth
        right, asked = np.zeros(depth + 1), np.zeros(depth + 1)
        for start in range(0, self._samples, ROWS):
            rows = range(start, min(start + ROWS, self._samples))
            batch = self._task.heldout(rows)
            correct = (model(batch, mode="logits").argmax(-1) == batch.labels).numpy()
            grown = self._task.heldout_sentences(np.array(rows), trees=True)
            assert grown.ends is not None
            highest = (grown.ends * np.arange(1, depth + 1)[:, None, None]).max(axis=0)
            places = batch.places + self._task.predicts_at
            levels = highest[np.repeat(np.arange(len(rows)), batch.counts), places]
            right += np.bincount(levels, correct, minlength=depth + 1)
            asked += np.bincount(levels, minlength=depth + 1)
        return {f"boundary_{level}": float(right[level] / asked[level]) for level in range(depth + 1) if asked[level]}
