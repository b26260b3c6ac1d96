"""The training loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.config import Config
from megapd.errors import DiskFailed, Diverged
from megapd.models import STATISTICS, Compared
from megapd.tasks import tokens_per_sample
from megapd.training.feed import BatchFeed
from megapd.training.folder import METRICS, numbers, recorded
from megapd.training.learning_rate import learning_rate
from megapd.training.run import Callback, Run, StepResult, due
from megapd.training.start import start
from megapd.training.teaching import Source

TOP = 5  # likeliest classes whose agreement evaluations tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    folder    of the run
    step      student steps done, those before a resume included
    finished  False: a request stopped it early, with a checkpoint saved
    metrics   the last of each kind, as train/loss and eval/accuracy
    """

    folder: Path
    step: int
    finished: bool
    metrics: dict[str, float]


def train(
    config: Config, callbacks: Sequence[Callback] = (), *, allow_change: Sequence[str] = (), take_over: bool = False
) -> TrainingResult:
    """Train the run of `config`, or go on where its folder stopped: on the ranks that the launcher started, or on this one alone.

    callbacks: beside those that training.callbacks names. allow_change: settings, or sections, that may differ from what the run
    has on record. take_over: a folder whose process on another machine gave no sign for a minute. Raises UserError for a mistake
    in the settings or files, before anything is written; Diverged, TeacherLost, CheckpointTimeout; and what a callback raises.
    """
    with closing(start(config, callbacks, allow_change=allow_change, take_over=take_over)) as run:
        try:
            finished = train_run(run)
        except DiskFailed as error:
            steps = run.store.steps()
            then = f"goes on from step {steps[-1]}, whose checkpoint is kept" if steps else "begins again"
            raise DiskFailed(f"{error}; then the same command {then}") from error
    latest = run.latest
    if not latest:  # the run was complete already
        for line in recorded(config.folder / METRICS, run.step):
            latest |= numbers(line.pop("kind"), {key: value for key, value in line.items() if key != "step"})
    return TrainingResult(config.folder, run.step, finished, latest)


def train_run(run: Run) -> bool:
    """Train from run.start to the last step; False if a stop request ended it early, with a checkpoint saved."""
    config, world, engine, teaching, callbacks = run.config, run.world, run.engine, run.teaching, run.callbacks
    depth = max(config.training.prefetch, teaching.ahead)
    feed = BatchFeed(run.task, engine.tiling.rows(world.rank), range(run.start, run.steps), depth, world.device, teaching.request)
    with closing(feed), run.stop:
        for callback in callbacks:
            callback.start(run)
        while (step := run.step) < run.steps:
            # All ranks agree: the labelled positions of the global batch, whether to stop, whether the schedule changes.
            with run.waited.counted("data"):
                batches = feed.get(step)
            change = teaching.next_change(step)
            labels = sum(batch.labelled for batch in batches)
            labelled, stops, changes = world.sum(labels, int(run.stop.pending()), int(change is not None))
            if changes:
                teaching.take(change)
            with run.waited.counted("teacher"):
                came = not stops and teaching.came(step, run.stop.pending)
            if not came:
                break
            for callback in callbacks:
                callback.before_step(run, step)

            # The teacher of this step, and its signals.
            with run.waited.counted("teacher"):
                rotation = teaching.rotation(step)
            if rotation is not None:
                for callback in callbacks:
                    callback.rotated(run, step, rotation)
            with run.waited.counted("teacher"):
                signals, source = teaching.signals(step, batches)

            # Forward and backward of each micro-batch, then one update.
            wanted = any(callback.due(step + 1) for callback in callbacks)
            compared = compared_at(run, step + 1) if wanted else None
            sums = torch.zeros(3 if compared is None else 3 + 2 * len(STATISTICS), dtype=torch.float64, device=world.device)
            for batch, signal in zip(batches, signals, strict=False):
                sums += engine.accumulate(batch, signal, labelled, compared)
            lr = learning_rate(config.lr, config.optimizer.lr, step, run.steps)
            applied = engine.step(lr)
            count_nonfinite(run, applied, sums, batches if source == "teacher" else None)
            run.progress.step += 1

            # What else there is to do.
            metrics = step_metrics(run, sums, labelled, lr, source) if wanted else None
            top = None if metrics is None else metrics.pop("top_agreement", None)
            result = StepResult(run.step, labelled, lr, source, applied, metrics, top)
            for callback in callbacks:
                callback.after_step(run, result)
        finished = run.step == run.steps
        for callback in callbacks:
            callback.end(run, finished=finished)
    if not finished and run.writes:
        reason = run.stop.reason or "another rank"
        log.warning("stopped by %s at step %d of %d; start the same command again to continue", reason, run.step, run.steps)
    return finished


def compared_at(run: Run, step: int) -> Compared | None:
    """What is told of student and teacher at the step that makes `step` in all, of each micro-batch; None: nothing."""
    positions, evaluates = run.config.telemetry.statistics, due(step, run.config.evaluation.every, run.steps)
    share = -(-positions // run.engine.tiling.accumulation)
    return Compared(share, TOP if evaluates else 0) if positions else None


def count_nonfinite(run: Run, applied: bool, sums: Tensor, taught: Sequence[Batch] | None = None) -> None:
    """Count skipped updates; raise Diverged after training.max_nonfinite non-finite ones in a row.

    taught: the step's batches, of whose signals SignalNotFinite is raised if they were the cause.

    In fp16 an overflow of the scaled gradients with a finite loss is how the loss scale is found, not a divergence.
    """
    progress, training = run.progress, run.config.training
    if applied:
        progress.nonfinite_in_a_row = 0
        return
    loss_broke = run.world.sum(int(not bool(torch.isfinite(sums[:3]).all())))[0] > 0
    if training.precision == "fp16" and not loss_broke:
        progress.overflows += 1
        return
    if loss_broke and taught is not None:
        run.teaching.accuse(progress.step, taught)
    progress.nonfinite += 1
    progress.nonfinite_in_a_row += 1
    if run.writes:
        log.warning("step %d: %s not finite, update skipped", run.step, "loss" if loss_broke else "gradients")
    if progress.nonfinite_in_a_row >= training.max_nonfinite:
        what = f"{progress.nonfinite_in_a_row} steps in a row were not finite, up to step {run.step} (training.max_nonfinite)"
        raise Diverged(f"{what}; lower optimizer.lr, set training.clip, or resume from an earlier checkpoint")


def step_metrics(run: Run, sums: Tensor, labelled: int, lr: float, source: Source) -> dict[str, Any]:
    """Global means of the step just made, and the run's counts; a collective. sums, of this rank: see Learner.forward."""
    if run.world.size > 1:
        dist.all_reduce(sums)
    divergence, cross_entropy, correct = (sums[:3] / max(labelled, 1)).tolist()
    told = sums[3:].tolist()
    sides = zip(STATISTICS, told[: len(STATISTICS)], told[len(STATISTICS) :], strict=False)  # none where nothing was asked for
    statistics = {name: value / count for name, value, count in sides if count}
    loss = run.config.loss
    scale = loss.student_temperature**2 if loss.scale_t2 else 1.0
    mixed = loss.alpha * cross_entropy + (1.0 - loss.alpha) * scale * divergence
    return {
        "loss": cross_entropy if source == "labels" else mixed,
        **run.teaching.metrics(run.step - 1, divergence),
        "cross_entropy": cross_entropy,
        "accuracy": correct,
        **statistics,
        "lr": lr,
        "grad_norm": run.engine.grad_norm,
        "labelled": labelled,
        "tokens": round(run.step * run.config.training.global_batch * tokens_per_sample(run.task)),
        "nonfinite": run.progress.nonfinite,
        "overflows": run.progress.overflows,
    }
