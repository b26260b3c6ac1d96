"""A task and a curriculum metric of one's own through a sweep: analysed, and compared over seeds in a table.

    python examples/own_metric.py [FOLDER]

The task is own_task's, whose section registers itself when it is imported. The metric, how sure a teacher is of its answers, is a
class with three parts: what its numbers depend on, for which tasks it is, and how it measures a model. A package would name both
as entry points of the groups megapd.tasks and megapd.metrics; then `megapd sweep`, `megapd table` and `megapd analyse` know them
by name.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import own_task  # noqa: F401 - registers the task
import yaml

from megapd.analysis.curriculum import Metric, Model, analyse, metrics_of
from megapd.config import load
from megapd.experiments import load_sweep
from megapd.experiments.results import table
from megapd.experiments.runner import run_sweep
from megapd.experiments.spec import teachers_of
from megapd.registry import metrics
from megapd.tasks import Task, build_task
from megapd.trajectory.reader import Trajectory

SWEEP = {
    "name": "copy",
    "base": {
        "task": {"kind": "copy", "letters": 3, "alphabet": 4},
        "training": {"steps": 60, "global_batch": 32},
        "optimizer": {"lr": 0.005},
        "evaluation": {"every": 20, "samples": 128},
        "telemetry": {"wandb": "disabled", "progress": False},
    },
    "teacher": {"model": {"kind": "gpt", "layers": 2, "hidden": 32, "heads": 4}, "trajectory": {"every": 20}},
    "student": {"model": {"kind": "gpt", "layers": 1, "hidden": 16, "heads": 2}},
    "methods": {"progressive": {"schedule": {"policy": "matched", "refresh": 20}}, "labels": {}},
    "teacher_seeds": [0],
    "student_seeds": [1, 2],
}


@metrics.register("certainty")
class Certainty(Metric):
    """certainty: the mean probability of the likeliest class at held-out positions."""

    def __init__(self, task: Task, samples: int) -> None:
        self.task, self.settings = task, {"samples": samples, "version": 1}

    def measure(self, model: Model) -> dict[str, float]:
        batch = self.task.heldout(range(self.settings["samples"]))
        return {"certainty": model(batch, mode="logits").softmax(-1).amax(-1).mean().item()}


def main(folder: Path) -> None:
    file = folder / "copy.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, "output": str(folder / "runs")}, sort_keys=False))
    sweep = load_sweep(file)
    # Processes of the sweep import what an entry point names; a task of this file alone is made in this one.
    run_sweep(sweep, jobs=0)
    print(table(sweep))
    for seed, cell in teachers_of(sweep).items():
        run = sweep.folder / cell.address
        task = build_task(load(run / "config.yaml"))
        for step, values in analyse(Trajectory(run / "trajectory"), task, metrics_of(task, ["certainty"])).items():
            print(f"teacher {seed}, step {step}: certainty {values['certainty']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
