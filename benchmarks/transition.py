"""Whether the checkpoint that `megapd trajectory suggest` chooses is the right one for (2, T)-progressive distillation.

    python benchmarks/transition.py [--steps 500] [--off 2] [--folder FOLDER] [--output benchmarks/results/transition.json]

Trains the demo's teacher (configs/demo, sparse parity, d 50, k 5), asks for the checkpoint in its jump, and trains the demo's
student three times, one after the other: taught for T steps by that checkpoint, by the one `off` before and by the one `off`
after, then by the last. Reported: steps to 99 % held-out accuracy, null where the run's 5,000 steps did not get there.
With --folder what is trained there already is not trained again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write_result

from megapd.analysis.plots import read_metrics, steps_to_accuracy
from megapd.analysis.suggest import describe_found, suggest
from megapd.config import TransitionConfig
from megapd.schedule.plan import Plan
from megapd.schedule.policies import build_plan
from megapd.trajectory import Trajectory

CONFIGS = Path(__file__).parent.parent / "configs" / "demo"
THRESHOLD = 0.99


def train(config: str, folder: Path, name: str, *settings: str) -> None:
    """One thread a process, as the demo trains: the same sums in the same order on any number of cores."""
    command = [
        sys.executable,
        "-m",
        "megapd",
        "train",
        str(CONFIGS / config),
        f"--runs_dir={folder}",
        f"--name={name}",
        *settings,
    ]
    log = folder / f"{name}.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{log.read_text()[-2000:]}")


def student(folder: Path, name: str, plan: Plan) -> dict[str, Any]:
    ranges = ", ".join(f"{{start: {start}, checkpoint: {teacher}}}" for start, teacher in plan.rotations())
    schedule = ["--schedule.policy=explicit", f"--schedule.ranges=[{ranges}]"]
    train("one_shot.yaml", folder, name, f"--teacher.trajectory={folder / 'teacher' / 'trajectory'}", *schedule)
    metrics = read_metrics(folder / name)
    last = [record for record in metrics if record["kind"] == "eval"][-1]
    found = {"checkpoint": plan.teachers[0], "steps_to_99": steps_to_accuracy(metrics, THRESHOLD)}
    return {**found, "final_accuracy": last["accuracy"], "steps": last["step"]}


def two_shot(checkpoint: int, last: int, times: int, steps: int) -> Plan:
    return Plan("explicit", steps, ((0, checkpoint), (times, last)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="T")
    parser.add_argument("--off", type=int, default=2, help="checkpoints before and after the chosen one")
    parser.add_argument("--folder", type=Path, help="where to train; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/transition.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train("teacher.yaml", folder, "teacher")
        found, _ = suggest(folder / "teacher", [], None, None)
        print(describe_found(found), flush=True)
        trajectory, (pick,) = Trajectory(folder / "teacher" / "trajectory"), found.picks
        place, run_steps = trajectory.steps.index(pick), trajectory.steps[-1]  # the demo's runs are all of one length
        chosen = {
            "chosen": pick,
            "before": trajectory.steps[place - arguments.off],
            "after": trajectory.steps[place + arguments.off],
        }
        plans = {name: two_shot(step, found.final, arguments.steps, run_steps) for name, step in chosen.items()}
        # What the policy would do is what is measured.
        policy = build_plan(
            TransitionConfig(steps=arguments.steps),
            available=trajectory.steps,
            steps=run_steps,
            metrics_of=lambda step: trajectory.checkpoint(step).metrics,
        )
        assert policy.rotations() == plans["chosen"].rotations()
        students = {}
        for name, plan in plans.items():
            students[name] = student(folder, f"{name}_{plan.teachers[0]}_{arguments.steps}", plan)
            print(name, students[name], flush=True)
    question = "steps to 99 % of a (2, T) student whose intermediate checkpoint is the one chosen, or one before or after it"
    losses = dict(zip(map(str, found.curve.steps), found.curve.values, strict=True))
    arguments.folder = None if arguments.folder is None else arguments.folder.name
    transition = {"metric": found.curve.key, "first": found.first, "last": found.last, "final": found.final, "values": losses}
    write_result(arguments.output, question, arguments, ("torch", "deepspeed"), transition=transition, students=students)


if __name__ == "__main__":
    main()
