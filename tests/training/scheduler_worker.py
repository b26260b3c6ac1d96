"""A rank of a student whose teachers are written down as they teach: taught-RANK.jsonl in the run's folder, [step, digests].

Arguments as those of `megapd`; MEGAPD_TEST_PACE, a test's own, is the least seconds of a step, so that a test can act in between.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence

from megapd.batch import Batch
from megapd.cli import main
from megapd.signals import Signal
from megapd.training import loop
from megapd.training.fallback import Taken, take_signals
from megapd.training.run import Run

PACE = float(os.environ.pop("MEGAPD_TEST_PACE"))


def written(run: Run, step: int, batches: Sequence[Batch]) -> Taken:
    taken = take_signals(run, step, batches)
    if run.stream is None:  # the teacher's own training
        time.sleep(PACE)
        return taken
    start = time.monotonic()

    def each() -> Iterator[Signal | None]:
        digests = []
        for _, signal in zip(batches, taken.signals, strict=False):
            assert signal is not None
            digests.append(signal.teacher)
            if len(digests) == len(batches):
                with (run.config.folder / f"taught-{run.world.rank}.jsonl").open("a") as file:
                    file.write(json.dumps([step, sorted(set(digests))]) + "\n")
            yield signal
        time.sleep(max(0.0, PACE - (time.monotonic() - start)))

    return Taken(each(), taken.source)


if __name__ == "__main__":
    loop.take_signals = written
    sys.exit(main(sys.argv[1:]))
