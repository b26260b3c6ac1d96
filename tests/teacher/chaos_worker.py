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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapd.batch import Batch
from megapd.cli import main as megapd
from megapd.training import loop
from megapd.training.fallback import Taken, take_signals
from megapd.training.run import Run

RANK = int(os.environ["RANK"])


def train(folder: Path, number: int, arguments: list[str], pauses: list[int]) -> dict[str, Any]:
    """code, printed, error, log: of the command; sources: (step, where its signals came from); counts: the stream's."""
    sources: list[tuple[int, str]] = []
    counts: dict[str, int] = {}
    whole = loop.train

    def paused(run: Run, step: int, batches: Sequence[Batch]) -> Taken:
        if RANK == 0 and step in pauses:
            (folder / f"at-{number}-{step}").touch()
            while not (folder / f"go-{number}-{step}").exists():
                time.sleep(0.005)
        taken = take_signals(run, step, batches)
        sources.append((step, taken.source))
        return taken

    def counted(run: Run) -> bool:
        try:
            return whole(run)
        finally:
            counts.update(getattr(run.stream, "counts", {}))

    log, printed = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    error = ""
    loop.take_signals, loop.train = paused, counted
    began = time.monotonic()
    try:
        with contextlib.redirect_stderr(printed):
            code = megapd(["train", *arguments])
    except Exception:
        error, code = traceback.format_exc(), 1  # what the interpreter would print and return
    finally:
        loop.take_signals, loop.train = take_signals, whole
        logging.getLogger().removeHandler(handler)
    told = {"printed": printed.getvalue(), "error": error, "log": log.getvalue()}
    return {"code": code, "seconds": time.monotonic() - began, "sources": sources, "counts": counts, **told}


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
