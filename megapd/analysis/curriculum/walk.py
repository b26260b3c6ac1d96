"""A metric over the checkpoints of a trajectory, one at a time; what is measured is kept with the checkpoint at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path

import torch

from megapd.analysis.curriculum.metric import Metric
from megapd.errors import UserError
from megapd.files import machine_cache
from megapd.models import load_teacher
from megapd.registry import metrics
from megapd.tasks import Task
from megapd.trajectory import Checkpoint
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from megapd.trajectory.measured import FILE, read_measured, write_measured
from megapd.trajectory.reader import Trajectory

OWN = ("context", "monomials", "boundaries", "nonterminals")
COSTLY = ("nonterminals",)  # a probe is trained for each checkpoint: only where it is asked for

Told = Callable[[int, str], object]  # (teacher step, metric), before it is measured


def metrics_of(task: Task, names: Iterable[str] = (), samples: int | None = None) -> dict[str, Metric]:
    """The metrics of those names, or all that are for such a task, ready to measure. UserError for one that is not."""
    for name in OWN:  # registered where they are defined
        import_module(f"megapd.analysis.curriculum.{name}")
    if samples is not None and not 1 <= samples <= task.heldout_samples:
        raise UserError(f"--samples: {samples} asked for, the task holds out {task.heldout_samples}; ask for fewer")
    asked = tuple(names)
    found: dict[str, Metric] = {}
    for name in asked or metrics.names():
        kind: type[Metric] = metrics.get(name)
        if not (lacks := kind.lacks(task)):
            if asked or name not in COSTLY:
                found[name] = kind(task, min(kind.samples, task.heldout_samples) if samples is None else samples)
        elif asked:
            raise UserError(f"--metrics: {name}: the task lacks {lacks}; leave it out")
    if not found:
        raise UserError(f"--metrics: no metric is for this task; there are {', '.join(metrics.names())}")
    return found


def analyse(
    trajectory: Trajectory | HuggingFaceTrajectory, task: Task, asked: Mapping[str, Metric], told: Told = lambda step, name: None
) -> dict[int, dict[str, float]]:
    """Teacher step -> numbers by name, of all checkpoints.

    What was measured before under the same settings is read: an analysis that was stopped goes on, and that of a longer
    trajectory measures what is new. Raises UserError for a checkpoint of another vocabulary, or numbers that are not finite.
    """
    found: dict[int, dict[str, float]] = {}
    for step in trajectory.steps:
        checkpoint = trajectory.checkpoint(step)
        if not checkpoint.speaks(task.vocabulary_digest):
            fix = "name the task that it was trained on, as --task.kind=..."
            raise UserError(f"{checkpoint.path}: trained on another vocabulary than the task has; {fix}")
        file = _file(trajectory, checkpoint)
        measured = read_measured(file, checkpoint.digest)
        wanted = {name: {"data": task.data_digest, **metric.settings} for name, metric in asked.items()}
        missing = [name for name in asked if measured.get(name, {}).get("settings") != wanted[name]]
        if missing:
            model = load_teacher(trajectory, checkpoint)
            for name in missing:
                told(step, name)
                with torch.no_grad():
                    values = asked[name].measure(model)
                if broken := [key for key, value in values.items() if not math.isfinite(value)]:
                    raise UserError(f"{checkpoint.path}: {name}: {broken[0]} is {values[broken[0]]}; are its weights finite?")
                measured[name] = {"settings": wanted[name], "values": values}
                write_measured(file, checkpoint.digest, measured)
        found[step] = {key: value for name in asked for key, value in measured[name]["values"].items()}
    return found


def _file(trajectory: Trajectory | HuggingFaceTrajectory, checkpoint: Checkpoint) -> Path:
    """Beside the weights; of published ones in the machine's cache."""
    if isinstance(trajectory, Trajectory):
        return checkpoint.path / FILE
    return machine_cache("measured") / f"{checkpoint.digest}.json"
