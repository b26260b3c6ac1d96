"""Progressive distillation in one file: a student of successive checkpoints learns what one of the finished teacher does not.

    python examples/minimal.py [FOLDER]

The task is sparse parity: the label is the product of 5 hidden coordinates out of 24, each -1 or +1. A wide teacher finds them.
A narrow student is trained three times: on the labels, on the finished teacher, and on the teacher's checkpoints one after the
other (arXiv 2410.05464). It takes about a minute on a CPU. In a folder of your own the runs stay: start it again, and what is
complete is told, what was stopped goes on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import megapd

COMMON = [
    "--task={kind: parity, dimension: 24, degree: 5}",
    "--training={steps: 1500, global_batch: 256, zero_stage: 0}",
    "--optimizer={kind: sgd, lr: 0.5}",
    "--evaluation={every: 50, samples: 2048, micro_batch: 2048}",
    "--telemetry={every: 50, wandb: disabled, progress: false}",
]
TEACHER = ["--model={kind: mlp, width: 1000}", "--trajectory.every=100"]
STUDENT = ["--model={kind: mlp, width: 30}"]


class Reached(megapd.Callback):
    """The first step after which the held-out accuracy is at least `accuracy`. It is part of the run's checkpoints."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy
        self.step: int | None = None

    def evaluated(self, run: megapd.Run, step: int, values: dict[str, float]) -> None:
        if self.step is None and values["accuracy"] >= self.accuracy:
            self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def train(folder: Path, name: str, settings: list[str]) -> str:
    """Train a run to its end; its line of the table."""
    config = megapd.load(overrides=[*COMMON, *settings, f"--runs_dir={folder}", f"--name={name}"])
    reached = Reached(0.99)
    result = megapd.train(config, callbacks=[reached])
    when = f"> {result.step}" if reached.step is None else str(reached.step)
    return f"{name:<12} {when:>14} {result.metrics['eval/accuracy']:>15.3f}"


def main(folder: Path) -> None:
    taught = [*STUDENT, f"--teacher.trajectory={folder / 'teacher' / 'trajectory'}", "--loss.teacher_temperature=1e-4"]
    lines = [
        train(folder, "teacher", TEACHER),
        train(folder, "labels", [*STUDENT, "--seed=1"]),
        train(folder, "one_shot", [*taught, "--seed=2", "--schedule.policy=one_shot"]),
        train(folder, "progressive", [*taught, "--seed=3", "--schedule={policy: matched, refresh: 100}"]),
    ]
    print(f"{'run':<12} {'steps to 99 %':>14} {'final accuracy':>15}", *lines, sep="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
