"""The demo: on sparse parity, a student of successive checkpoints learns what one of the finished teacher does not.

Four runs from configs/demo, each its own process, as a user would start them; the progressive student on two ZeRO ranks by the
deepspeed launcher. The sizes are those at which the effect shows on two cores (sparse parity, d 50, k 5).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megapd.analysis.plots import METRICS, plot_runs, read_metrics, steps_to_accuracy
from megapd.commands.progress import Progress
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.processes.local import launch_local

STAGES = (("teacher",), ("labels", "one_shot"), ("progressive",))  # what runs side by side
RUNS = tuple(name for together in STAGES for name in together)
RANKS = {"progressive": 2}
MARKER = ".megapd-demo"
THRESHOLD = 0.99
MARGIN = 0.75  # progressive must need at most this share of one-shot's steps


def run_demo(folder: Path) -> int:
    """Train the four runs below `folder`, write summary.json and curves.png there; 1 if progressive did not win."""
    console = Console()
    _clear(folder)
    seconds: dict[str, float] = {}
    steps = {name: _settings(name)["training"]["steps"] for name in RUNS}
    progress = Progress("demo", sum(steps.values()), "steps", stream=sys.stdout)
    for together in STAGES:
        progress.say("training " + " and ".join(f"{name} (ranks: {RANKS.get(name, 1)})" for name in together))
        with ThreadPoolExecutor(len(together)) as pool:
            futures = {name: pool.submit(_train, name, folder) for name in together}
            while wait(futures.values(), timeout=1.0).not_done:
                made = {name: _last_step(folder / name) for name in RUNS}
                told = ", ".join(f"{name} {made[name]:,} of {steps[name]:,}" for name in together)
                progress.update(sum(made.values()), told)
        seconds |= {name: future.result() for name, future in futures.items()}
    summary = summarise(folder, seconds)
    write_atomic(folder / "summary.json", json.dumps(summary, indent=1))
    plot_runs([folder / name for name in RUNS], folder / "curves.png")
    console.print(_table(summary))
    console.print(f"{folder / 'summary.json'}\n{folder / 'curves.png'}", highlight=False)
    progressive, one_shot = summary["progressive"], summary["one_shot"]
    if progressive["reached_99"] and progressive["steps_to_99"] <= MARGIN * one_shot["steps_to_99"]:
        return 0
    lost = f"progressive needed more than {MARGIN} of one-shot's steps to {THRESHOLD:.0%}"
    console.print(lost, style="bold red", highlight=False)
    return 1


def summarise(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Of each run: steps to 99 % held-out accuracy, final accuracy, seconds with start-up.

    A run that never got there has reached_99 false, and its budget as a lower bound in steps_to_99.
    """
    summary = {}
    for name in RUNS:
        metrics = read_metrics(folder / name)
        evaluations = [record for record in metrics if record["kind"] == "eval"]
        reached = steps_to_accuracy(metrics, THRESHOLD)
        summary[name] = {
            "steps_to_99": evaluations[-1]["step"] if reached is None else reached,
            "reached_99": reached is not None,
            "final_accuracy": evaluations[-1]["accuracy"],
            "seconds": round(seconds[name], 1),
            "ranks": RANKS.get(name, 1),
        }
    return summary


def _settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((resources.files("megapd.configs") / "demo" / f"{name}.yaml").read_text())
    return found


def _last_step(run: Path) -> int:
    """Student steps on record of a run that is under way, 0 before its first line."""
    lines = read_metrics(run) if (run / METRICS).exists() else []
    return max((line["step"] for line in lines), default=0)


def _clear(folder: Path) -> None:
    """Make way for a new demo: an earlier one's runs go, in a folder that it marked as its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARKER).exists():
        raise UserError(f"--folder: {folder} holds something other than a demo; choose an empty folder")
    (folder / MARKER).touch()
    for name in RUNS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _train(name: str, folder: Path) -> float:
    """Train one run to its end, its output in a log beside it; seconds, start-up included."""
    started, ranks = time.perf_counter(), RANKS.get(name, 1)
    # One thread a process: the same sums in the same order on any machine, and no threads that spin for each other on a busy one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with resources.as_file(resources.files("megapd.configs") / "demo" / f"{name}.yaml") as config:
        arguments = ["train", str(config), f"--runs_dir={folder}"]
        if "teacher" in _settings(name):
            arguments.append(f"--teacher.trajectory={folder / 'teacher' / 'trajectory'}")
        log = folder / f"{name}.log"
        if ranks > 1:
            code = launch_local(arguments, ranks, log=log, environment=environment)
        else:
            with log.open("w") as file:
                command = [sys.executable, "-m", "megapd", *arguments]
                code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    if code != 0:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"the demo's run {name} ended with exit code {code}; the end of {log}:\n{tail}")
    return time.perf_counter() - started


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title="sparse parity, d 50, k 5")
    for column in ("run", "ranks", "steps to 99 %", "final accuracy", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, row in summary.items():
        steps = f"{row['steps_to_99']:,}" if row["reached_99"] else f"> {row['steps_to_99']:,}"
        table.add_row(name, str(row["ranks"]), steps, f"{row['final_accuracy']:.4f}", f"{row['seconds']:.1f}")
    return table
