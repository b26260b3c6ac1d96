"""Students of many teachers and carriers, one after the other under one launch; every signal is held to the schedule."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megapd.batch import Batch
from megapd.config import load
from megapd.signals import Signal
from megapd.teacher.setup import open_trajectory
from megapd.training.loop import train
from megapd.training.run import Run, start


def hold_to_the_schedule(run: Run) -> list[int]:
    """Assert each signal's teacher and batch on its way to the student; the steps whose signals passed."""
    stream, plan = run.stream, run.plan
    assert stream is not None
    assert plan is not None
    assert run.config.teacher is not None
    trajectory = open_trajectory(run.config)
    digests = {step: trajectory.checkpoint(step).digest for step in plan.teachers}
    signals, steps = stream.signals, []

    def checked(step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        answers = iter(signals(step, batches))

        def each() -> Iterator[Signal]:
            for number, (batch, signal) in enumerate(zip(batches, answers, strict=True), start=1):
                assert signal.teacher == digests[plan.checkpoint_at(step)]
                assert signal.samples == batch.digest
                if number == len(batches):
                    steps.append(step)
                yield signal

        return each()

    stream.signals = checked  # type: ignore[method-assign]
    return steps


def main(path: Path) -> None:
    """path: JSON {name: arguments of `megapd train`}; one run each, whose folder holds its metrics."""
    for name, arguments in json.loads(path.read_text()).items():
        run = start(load(None, arguments))
        steps = hold_to_the_schedule(run)
        try:
            finished = train(run)
        finally:
            run.close()
        assert finished
        assert steps == list(range(run.config.training.steps)), f"{name}: {steps}"


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
