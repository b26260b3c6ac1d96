"""Two ranks that train one student after the other, as the test asks: a launch costs many seconds and a student a few.

Folder: argument 1. The test writes run-N.json, {arguments: of `megapd train`, pauses: steps}; each rank answers with
result-N-RANK.json. At a pause the student waits, before it takes the signals of that step, for the file go-N-STEP.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from megapd.cli import main as megapd
from megapd.registry import callbacks
from megapd.training import Callback, Run, StepResult, Teaching

RANK = int(os.environ["RANK"])


@callbacks.register("witness")
class Witness(Callback):
    """Waits at a run's pauses, and notes where its signals came from. Of the run that `train` has set up."""

    folder: Path
    number: int
    pauses: list[int]
    sources: list[tuple[int, str]]
    counts: dict[str, int]

    def start(self, run: Run) -> None:
        self._stream = run.teaching.stream if isinstance(run.teaching, Teaching) else None

    def before_step(self, run: Run, step: int) -> None:
        if RANK == 0 and step in self.pauses:
            (self.folder / f"at-{self.number}-{step}").touch()
            while not (self.folder / f"go-{self.number}-{step}").exists():
                time.sleep(0.005)

    def after_step(self, run: Run, result: StepResult) -> None:
        self.sources.append((result.step - 1, result.source))

    def close(self) -> None:
        self.counts.update(getattr(self._stream, "counts", {}))


def train(folder: Path, number: int, arguments: list[str], pauses: list[int]) -> dict[str, Any]:
    """code, printed, error, log: of the command; sources: (step, where its signals came from); counts: the stream's."""
    Witness.folder, Witness.number, Witness.pauses, Witness.sources, Witness.counts = folder, number, pauses, [], {}
    log, printed = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    error = ""
    began = time.monotonic()
    try:
        with contextlib.redirect_stderr(printed):
            code = megapd(["train", *arguments, "--training.callbacks=[witness]"])
    except Exception:
        error, code = traceback.format_exc(), 1  # what the interpreter would print and return
    finally:
        logging.getLogger().removeHandler(handler)
    told = {"printed": printed.getvalue(), "error": error, "log": log.getvalue()}
    seconds = time.monotonic() - began
    return {"code": code, "seconds": seconds, "sources": Witness.sources, "counts": Witness.counts, **told}


def main(folder: Path) -> None:
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the test asks a rank that hangs where it is
    logging.getLogger().addHandler(logging.StreamHandler())  # to the launch's own output; keeps main() from adding another
    (folder / f"rank-{RANK}").write_text(str(os.getpid()))
    for number in itertools.count():
        path = folder / f"run-{number}.json"
        while not path.exists():
            time.sleep(0.02)
        asked = json.loads(path.read_text())
        result = folder / f"result-{number}-{RANK}.json"
        result.with_suffix(".writing").write_text(json.dumps(train(folder, number, **asked)))
        result.with_suffix(".writing").rename(result)


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
