"""A rank of a student whose teachers are noted as they teach: taught-RANK.jsonl in the run's folder, [step, digest] a signal.

Arguments as those of `megapd`; MEGAPD_TEST_PACE, a test's own, is the least seconds of a step, so that a test can act in between.
"""

from __future__ import annotations

import json
import os
import sys
import time

from megapd.batch import Batch
from megapd.cli import main
from megapd.registry import callbacks
from megapd.signals import Signal
from megapd.training import Callback, Run, StepResult, Teaching
from tests.training.watched import watch

PACE = float(os.environ.pop("MEGAPD_TEST_PACE"))


@callbacks.register("witness")
class Witness(Callback):
    def start(self, run: Run) -> None:
        self._taught = run.config.folder / f"taught-{run.world.rank}.jsonl"
        if isinstance(run.teaching, Teaching):
            watch(run, self._write)

    def _write(self, step: int, batch: Batch, signal: Signal) -> None:
        with self._taught.open("a") as file:
            file.write(json.dumps([step, signal.teacher]) + "\n")

    def before_step(self, run: Run, step: int) -> None:
        self._began = time.monotonic()

    def after_step(self, run: Run, result: StepResult) -> None:
        time.sleep(max(0.0, PACE - (time.monotonic() - self._began)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
