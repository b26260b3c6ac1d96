"""What the benchmark scripts share: a run's step times, and results with machine, versions and date."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from megapd.files import write_atomic
from megapd.training import Callback, Run, StepResult


class StepTimes(Callback):
    """seconds: from the end of each update to the end of the next, for the steps 1, 2, ..."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def after_step(self, run: Run, result: StepResult) -> None:
        self._ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self._ends)]


def write_result(path: Path, question: str, arguments: Namespace, packages: tuple[str, ...], **values: Any) -> None:
    """One JSON file: the question, when and where it was asked, with which versions and settings, and the answer."""
    result = {
        "question": question,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        **values,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result, indent=1))
