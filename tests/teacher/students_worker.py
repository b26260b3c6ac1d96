"""Students of many teachers and carriers, one after the other under one launch; every signal is held to the schedule."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megapd.batch import Batch
from megapd.config import load
from megapd.signals import Signal
from megapd.teacher.locate import open_trajectory
from megapd.training import Callback, Run, StepResult, train
from tests.training.watched import watch


class HeldToTheSchedule(Callback):
    """Asserts each signal's teacher and batch on its way to the student. steps: those whose signals all passed."""

    def start(self, run: Run) -> None:
        self.steps: list[int] = []
        self._seen: list[int] = []
        self._plan, trajectory = watch(run, self._check).plan, open_trajectory(run.config)
        self._digests = {step: trajectory.checkpoint(step).digest for step in self._plan.teachers}

    def _check(self, step: int, batch: Batch, signal: Signal) -> None:
        assert signal.teacher == self._digests[self._plan.checkpoint_at(step)]
        assert signal.samples == batch.digest
        self._seen.append(step)

    def after_step(self, run: Run, result: StepResult) -> None:
        step = result.step - 1
        if self._seen == [step] * run.engine.tiling.accumulation:
            self.steps.append(step)
        self._seen.clear()


def main(path: Path) -> None:
    """path: JSON {name: arguments of `megapd train`}; one run each, whose folder holds its metrics."""
    for name, arguments in json.loads(path.read_text()).items():
        config, held = load(None, arguments), HeldToTheSchedule()
        assert train(config, [held]).finished
        assert held.steps == list(range(config.training.steps)), f"{name}: {held.steps}"


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
