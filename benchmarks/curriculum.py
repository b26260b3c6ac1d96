"""Which of parity's correlations shows a teacher's transition: two small settings, one seed each, 40 seconds on two cores.

    python benchmarks/curriculum.py [--output FILE]

Trains a teacher at (50, 5) and one at (40, 4) by `megapd train`, measures its checkpoints by `megapd analyse`, and writes
held-out accuracy, the ratio of the correlations inside the support to those outside for each degree, and `support`, the largest
below the support's own degree.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

from common import write_result

from megapd.cli import main as megapd

TEACHERS = {"(50, 5)": (50, 5, 3000, 150), "(40, 4)": (40, 4, 1500, 75)}  # dimension, degree, steps, between checkpoints


def teacher(folder: Path, name: str, dimension: int, degree: int, steps: int, every: int) -> list[dict[str, float]]:
    run = folder / f"parity_{dimension}_{degree}"
    settings = [
        f"--runs_dir={folder}",
        f"--name={run.name}",
        f"--task={{kind: parity, dimension: {dimension}, degree: {degree}}}",
        "--model={kind: mlp, width: 2000}",
        f"--training={{steps: {steps}, global_batch: 256}}",
        "--optimizer={kind: sgd, lr: 0.5, momentum: 0, weight_decay: 0}",
        "--lr.kind=constant",
        f"--trajectory.every={every}",
        f"--evaluation={{every: {every}, samples: 2000}}",
        "--telemetry={wandb: disabled, progress: false}",
    ]
    assert megapd(["train", *settings]) == 0
    assert megapd(["analyse", str(run)]) == 0
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    accuracy = {line["step"]: line["accuracy"] for line in lines if line["kind"] == "eval"}
    rows: dict[int, dict[str, float]] = {}
    with (run / "plots" / "curriculum.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row["step"]), {})[row["name"]] = float(row["value"])
    found = []
    for step, values in rows.items():
        ratios = {
            f"degree_{d}": round(values[f"degree_{d}"] / max(values[f"degree_{d}_out"], values["floor"]), 2)
            for d in range(1, degree)
        }
        found.append({"step": step, "accuracy": round(accuracy[step], 3), "support": round(values["support"], 2), **ratios})
    print(name, *found, sep="\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "curriculum.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: teacher(Path(folder), name, *numbers) for name, numbers in TEACHERS.items()}
    write_result(arguments.output, "Which correlations show parity's transition?", arguments, ("torch", "megapd"), teachers=rows)


if __name__ == "__main__":
    main()
