"""A process that makes one run after the other: a line of JSON with a configuration's path in, a line with how it ended out,
[kind, error] of kind finished, stopped, failed (it diverged) or mistake.

    python -m megapd.experiments.worker DESCRIPTOR        # of a pipe, for the answers

Importing torch and DeepSpeed takes longer than a small run, so a sweep pays for it once a worker. What runs print goes to run.log
in their folders.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from megapd.config import Config, load
from megapd.errors import RunFailed, UserError
from megapd.training import train


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")  # not stdout, on which libraries have their say
    for line in sys.stdin:
        config = load(Path(json.loads(line)))
        config.folder.mkdir(parents=True, exist_ok=True)
        with (config.folder / "run.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            answer = make(config)
        print(json.dumps(answer), file=answers, flush=True)


def make(config: Config) -> tuple[str, str]:
    """Make a run to its end, in this process: (kind, error), see above."""
    try:
        return ("finished", "") if train(config).finished else ("stopped", "by a signal")
    except UserError as error:
        return "mistake", str(error)
    except RunFailed as error:
        return "failed", str(error)


if __name__ == "__main__":
    main()
