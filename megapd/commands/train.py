"""`megapd train`: a teacher or a student, from its configuration to its last step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megapd import __version__
from megapd.commands.progress import duration, scaled, time_left
from megapd.config import Config
from megapd.models import parameter_count
from megapd.training import Callback, Run, StepResult, TrainingResult, train
from megapd.training.run import due
from megapd.trajectory import Checkpoint


class Console(Callback):
    """Rank 0 tells on stdout what it trains, what came of it, and between them, off a terminal, how far it is.

    On a terminal the bar of the tracker `progress` stands for the lines between. telemetry.progress false leaves out both.
    """

    def start(self, run: Run) -> None:
        self._speaks = run.writes
        self._lines = run.writes and run.config.telemetry.progress and not (sys.stdout.isatty() and sys.stderr.isatty())
        self._began, self._start, self._run = time.perf_counter(), run.start, run
        self._saved: Path | None = None
        self._say(beginning(run))

    def before_step(self, run: Run, step: int) -> None:
        if step == run.start:
            self._began = time.perf_counter()

    def after_step(self, run: Run, result: StepResult) -> None:
        if self._lines and result.metrics is not None and due(result.step, run.config.telemetry.every, run.steps):
            left = time_left(result.step - run.start, time.perf_counter() - self._began, run.steps - result.step)
            self._say([_step_line(run, result.metrics, left)])

    def rotated(self, run: Run, step: int, checkpoint: Checkpoint) -> None:
        if self._lines:
            self._say([f"step {step:,}: the teacher's step {checkpoint.step:,} teaches from here"])

    def evaluated(self, run: Run, step: int, values: dict[str, float]) -> None:
        if self._lines:
            told = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "samples")
            self._say([f"step {step:,}: held-out {told}"])

    def saved(self, run: Run, step: int, folder: Path) -> None:
        self._saved = folder
        if self._lines:
            self._say([f"step {step:,}: saved {folder}"])

    def summary(self, result: TrainingResult) -> None:
        """What the run came to, after its last checkpoint."""
        if self._speaks:
            self._say(ending(self._run, result, time.perf_counter() - self._began, self._saved))

    def _say(self, lines: list[str]) -> None:
        if self._speaks and lines:
            print("\n".join(lines), flush=True)


def train_command(config: Config, allow_change: list[str], take_over: bool) -> int:
    console = Console()
    console.summary(train(config, [console], allow_change=allow_change, take_over=take_over))
    return 0


def beginning(run: Run) -> list[str]:
    """What is trained, in ten lines at most."""
    config, tiling, world = run.config, run.engine.tiling, run.world
    lines = [f"megapd {__version__}: run {config.name} (id {run.folder.run}) in {config.folder}"]
    if run.start >= run.steps:
        return [*lines, f"{config.folder} is complete: {run.start:,} of {run.steps:,} steps"]
    if run.start:
        lines.append(f"resuming at step {run.start:,} of {run.steps:,} from {config.folder / 'checkpoints'}/step_{run.start}")
    else:
        lines.append(f"begins: {run.steps:,} steps")
    what = f"corpus {config.corpus.output}, " if config.task.kind == "text" else ""
    lines.append(f"task {config.task.kind}: {what}{run.task.length:,} tokens a sample, {run.task.classes:,} classes")
    lines.append(f"model {config.model.kind}: {scaled(parameter_count(run.engine.learner)[0])} parameters")
    lines.append(_teacher(config))
    ranks = f"{world.size:,} rank{'s' if world.size > 1 else ''} on {world.device.type}"
    lines.append(f"{ranks}, {config.training.precision}, ZeRO stage {config.training.zero_stage}")
    share = f"{world.size} x {tiling.micro_batch} x {tiling.accumulation} micro-batches"
    lines.append(f"batch {tiling.global_batch:,} samples = {share}, {config.optimizer.kind} lr {config.optimizer.lr:g}")
    if run.folder.changed:
        lines.append("changed since the last start: " + ", ".join(_changes(run.folder.changed)))
    return [*lines, f"all settings: {config.folder / 'config.yaml'}"]


def ending(run: Run, result: TrainingResult, seconds: float, saved: Path | None) -> list[str]:
    """What came of it, in four lines at most."""
    made, latest = result.step - run.start, result.metrics
    if made == 0:
        return []
    state = "finished" if result.finished else "stopped"
    lines = [f"{state}: {result.step:,} of {run.steps:,} steps, {made:,} of them now, in {duration(seconds)}"]
    named = {"train/loss": "loss", "train/divergence": "divergence", "eval/loss": "held-out loss"}
    named["eval/accuracy"] = "held-out accuracy"
    if told := [f"{name} {latest[key]:.4g}" for key, name in named.items() if key in latest]:
        lines.append(", ".join(told))
    waited = run.waited
    lines.append(f"waited {duration(waited.teacher)} for the teacher, {duration(waited.data)} for data")
    return [*lines, *([] if saved is None else [f"checkpoint: {saved}"])]


def _teacher(config: Config) -> str:
    if config.teacher is None or config.schedule is None:
        return "no teacher: it learns from the labels"
    whose = config.teacher.trajectory or ", ".join(config.teacher.endpoints) or "the replicas at scheduler.url"
    return f"teacher {whose}, {config.teacher.carrier}, schedule {config.schedule.policy}"


def _changes(changed: dict[str, list[Any]]) -> Iterator[str]:
    for number, (key, (before, now)) in enumerate(changed.items()):
        if number == 4:
            yield f"{len(changed) - 4} more"
            return
        yield f"{key} {before} -> {now}"


def _step_line(run: Run, metrics: dict[str, Any], left: str) -> str:
    rate, unit = metrics["tok_per_sec"], "tokens/s"
    if run.config.task.kind == "parity":  # its samples are points, not texts
        rate, unit = rate / run.task.length, "samples/s"
    told = [f"step {run.step:,}/{run.steps:,}", f"loss {metrics['loss']:.4g}"]
    if "divergence" in metrics:
        told.append(f"divergence {metrics['divergence']:.4g}")
    told += [f"lr {metrics['lr']:.3g}", f"{scaled(rate)} {unit}", left]
    if "teacher_step" in metrics:
        told.append(f"teacher {metrics['teacher_step']:,}")
    return "  ".join(part for part in told if part)
