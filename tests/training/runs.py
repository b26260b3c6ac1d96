"""Small runs that the training tests share: a parity teacher and its students, in process or under the launcher."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from megapd.cli import main
from megapd.processes.local import local_command
from tests.forked import Forked, environment, run_ranks

TIMINGS = ("seconds", "tok_per_sec", "mfu", "data_wait", "teacher_wait")

COMMON = [
    "--task.kind=parity",
    "--task.dimension=10",
    "--task.degree=2",
    "--model.kind=mlp",
    "--training.global_batch=16",
    "--optimizer.kind=adamw",
    "--optimizer.lr=0.01",
    "--telemetry.every=1",
    "--telemetry.wandb=disabled",
    "--telemetry.progress=false",
    "--evaluation.samples=64",
]


def teacher(folder: Path, steps: int = 30, every: int = 5) -> Path:
    """Train a teacher in this process; its trajectory."""
    arguments = [f"--runs_dir={folder}", "--name=teacher", f"--training.steps={steps}", f"--trajectory.every={every}"]
    assert main(["train", *COMMON, "--model.width=32", *arguments]) == 0
    return folder / "teacher" / "trajectory"


def student(folder: Path, name: str, trajectory: Path, *overrides: str) -> list[str]:
    """Arguments of `megapd train` for a progressive student."""
    arguments = [f"--runs_dir={folder}", f"--name={name}", f"--teacher.trajectory={trajectory}", "--model.width=8"]
    schedule = ["--schedule.policy=matched", "--schedule.refresh=5", "--training.steps=30"]
    return ["train", *COMMON, *arguments, *schedule, *overrides]


def metrics(run: Path) -> list[dict]:
    """The run's records without its name and what depends on the clock."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line["kind"] != "run"]


def run(arguments: list[str], ranks: int = 2) -> str:
    """`megapd ARGUMENTS` on these ranks, without the launcher, which takes seconds; what it printed."""
    return run_ranks("megapd", arguments, ranks)


def launch(arguments: list[str], ranks: int, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        local_command(arguments, ranks), env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def start_and_kill(arguments: list[str], ranks: int, run: Path, step: int, *, launcher: bool = False) -> None:
    """Start a run and kill -9 every rank once it has logged `step`. launcher: under deepspeed's, which takes seconds."""
    process: subprocess.Popen[bytes] | Forked
    if launcher:
        null = subprocess.DEVNULL
        process = subprocess.Popen(local_command(arguments, ranks), env=environment(), stdout=null, stderr=null)
    else:
        process = Forked("megapd", arguments, environment(), Path(os.devnull), ranks)
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never reached the step"
        time.sleep(0.001)
    kill_ranks(process, ranks)


def kill_ranks(process: subprocess.Popen[bytes] | Forked, ranks: int) -> None:
    """kill -9 of every rank of a run, in any order; the launcher, if there is one, then ends by itself."""
    if isinstance(process, Forked):
        victims = list(process.pids)
    else:
        started = {p.pid: " ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)}
        victims = [pid for pid, line in started.items() if "--local_rank" in line and "deepspeed.launcher" not in line]
    assert len(victims) == ranks
    random.shuffle(victims)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.wait(timeout=60)


def until(done: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    if not path.exists():
        return -1
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if b'"train"' in line]
    return json.loads(lines[-1])["step"] if lines else -1
