"""Progressive distillation on Wikipedia and books, BERT and GPT, on two ranks: do losses fall, do the ZeRO stages agree?

    python benchmarks/text.py [--folder runs/text] [--output benchmarks/results/text.json]

Wants data/wikipedia.parquet and data/books.parquet (docs/text.md). For each of BERT and GPT: prepares the corpus, trains the
teacher with its six checkpoints (ZeRO-2), then students of labels, the last checkpoint, and all six in turn; then 20 steps of the
progressive student at ZeRO 1, 2 and 3, with four times the micro-batches, and with an untied head.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import deepspeed
import torch

from megapd.analysis.plots import plot_runs, read_metrics
from megapd.cli import main as megapd
from megapd.files import write_atomic
from megapd.processes.local import launch_local

RANKS = 2
KINDS = ("bert", "gpt")
RUNS = ("teacher", "labels", "one_shot", "progressive")
SHORT = ["--training.steps=20", "--telemetry.every=1", "--checkpoint.every=0", "--lr.warmup=4"]
VARIANTS = {
    "zero1": ["--training.zero_stage=1"],
    "zero2": ["--training.zero_stage=2"],
    "zero3": ["--training.zero_stage=3"],
    "zero2-accumulate": ["--training.zero_stage=2", "--training.micro_batch=2"],
    "zero1-untied": ["--training.zero_stage=1", "--model.tied=false"],
    "zero3-untied": ["--training.zero_stage=3", "--model.tied=false"],
}
# Rotates at step 10, so that the agreement covers a rotation.
SCHEDULE = ["--schedule.policy=explicit", "--schedule.ranges=[{start: 0, checkpoint: 80}, {start: 10, checkpoint: 480}]"]


def train(kind: str, config: str, name: str, folder: Path, *overrides: str) -> Path:
    """One run on two ranks, unless its folder is there from an earlier call; the run's folder."""
    arguments = ["train", f"configs/text/{kind}_{config}.yaml", f"--name={name}", f"--runs_dir={folder}"]
    if config not in ("teacher", "labels"):
        arguments.append(f"--teacher.trajectory={folder / f'{kind}_teacher' / 'trajectory'}")
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    code = launch_local([*arguments, "--telemetry.wandb=disabled", *overrides], RANKS, log=folder / f"{name}.log")
    assert code == 0, f"{name} ended with {code}: see {folder / name}.log"
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return folder / name


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def summarise(run: Path) -> dict[str, Any]:
    records = read_metrics(run)
    held_out = [record for record in records if record["kind"] == "eval"]
    trained = losses(run)
    return {
        "first_loss": trained[0],
        "last_loss": trained[-1],
        "heldout_loss": [e["loss"] for e in held_out],
        "heldout_accuracy": [e["accuracy"] for e in held_out],
        "rotations": sum(record["kind"] == "rotation" for record in records),
    }


def agreement(kind: str, folder: Path) -> dict[str, float]:
    """Largest differences of the losses over 20 steps of the progressive student."""
    runs = {}
    for name, overrides in VARIANTS.items():
        # The file's schedule is `equal`; its keys would be unknown to `explicit`, so these runs start from the one-shot's file.
        runs[name] = losses(train(kind, "one_shot", f"{kind}_{name}", folder, *SHORT, *SCHEDULE, *overrides))
    return {
        "stages_tied": max(difference(runs["zero1"], runs[f"zero{s}"]) for s in (2, 3)),
        "stages_1_3_untied": difference(runs["zero1-untied"], runs["zero3-untied"]),
        "accumulation_4_zero2": difference(runs["zero2"], runs["zero2-accumulate"]),
        "tied_untied_apart": difference(runs["zero1"], runs["zero1-untied"]),
        "first_loss": runs["zero1"][0],
        "last_loss": runs["zero1"][-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/text.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "question": "losses on Wikipedia and books; agreement of ZeRO stages and accumulation over 20 steps in fp32",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {RANKS} ranks of one thread",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }
    for kind in KINDS:
        assert megapd(["prepare", f"configs/text/{kind}_teacher.yaml"]) == 0
        runs = [train(kind, name, f"{kind}_{name}", arguments.folder) for name in RUNS]
        plot_runs(runs, arguments.folder / f"{kind}.png")
        result[kind] = {run.name: summarise(run) for run in runs} | {"agreement": agreement(kind, arguments.folder)}
        write_atomic(arguments.output, json.dumps(result, indent=1))
        print(json.dumps(result[kind]["agreement"], indent=1), flush=True)


if __name__ == "__main__":
    main()
