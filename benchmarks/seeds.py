"""The demo's claim over seeds: steps to 99 % on sparse parity of students taught by a trajectory, and by its last checkpoint.

    python benchmarks/seeds.py [--seeds 4 5 6 7 8] [--folder FOLDER] [--output benchmarks/results/seeds.json]

Trains the demo's teacher (configs/demo), then its progressive and its one-shot student once a seed, one after the other, one
thread and one rank each. The seed decides initial weights and samples; the task, hence the hidden parity, stays. Reported: steps
to 99 % held-out accuracy, null where the run's 5,000 steps did not get there. With --folder what is trained there already is not
trained again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import write_result
from transition import THRESHOLD, train

from megapd.analysis.plots import read_metrics, steps_to_accuracy

POLICIES = ("progressive", "one_shot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6, 7, 8])
    parser.add_argument("--folder", type=Path, help="where to train; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/seeds.json"))
    arguments = parser.parse_args()
    steps: dict[str, dict[str, int | None]] = {policy: {} for policy in POLICIES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        train("teacher.yaml", folder, "teacher")
        taught = [f"--teacher.trajectory={folder / 'teacher' / 'trajectory'}", "--training.zero_stage=0"]
        for seed in arguments.seeds:
            for policy in POLICIES:
                train(f"{policy}.yaml", folder, f"{policy}_{seed}", f"--seed={seed}", *taught)
                steps[policy][str(seed)] = steps_to_accuracy(read_metrics(folder / f"{policy}_{seed}"), THRESHOLD)
                print(policy, seed, steps[policy][str(seed)], flush=True)
    arguments.folder = None if arguments.folder is None else arguments.folder.name
    question = "steps to 99 % of the demo's students over seeds"
    write_result(arguments.output, question, arguments, ("torch", "deepspeed"), steps_to_99=steps)


if __name__ == "__main__":
    main()
