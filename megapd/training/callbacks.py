"""The callbacks of every run beside its telemetry: evaluation, trajectory, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapd.config import Config, public_tree
from megapd.evaluation import DownstreamTask, held_out
from megapd.tasks import Task
from megapd.training.export import export
from megapd.training.run import Callback, Run, StepResult, due
from megapd.trajectory.writer import write_checkpoint


class Guard(Callback):
    """Puts what the run does on its record, and stops it where another process has taken its folder over."""

    def before_step(self, run: Run, step: int) -> None:
        run.folder.check()
        if step == run.start:
            run.folder.begin(step)

    def saved(self, run: Run, step: int, folder: Path) -> None:
        run.folder.saved(step)


class Evaluation(Callback):
    """Held-out loss and accuracy and downstream tasks, each evaluation.every steps and at the end, and of the step's own batch
    how many of the teacher's likeliest classes are the student's."""

    def __init__(self, tasks: Sequence[DownstreamTask] = ()) -> None:
        self._tasks = tasks

    def start(self, run: Run) -> None:
        self._every, self._steps = run.config.evaluation.every, run.steps

    def due(self, step: int) -> bool:
        return due(step, self._every, self._steps)

    def after_step(self, run: Run, result: StepResult) -> None:
        settings = run.config.evaluation
        if self.due(result.step):
            micro = settings.micro_batch or run.engine.tiling.micro_batch
            values = held_out(run.task, settings.samples, run.world, micro, run.engine.evaluate)
            for task in self._tasks:
                values |= task.score(run.engine.label_logprobs, run.world, micro)
            if result.top_agreement is not None:
                values["top_agreement"] = result.top_agreement
            for callback in run.callbacks:
                callback.evaluated(run, result.step, values)


class TrajectoryWriter(Callback):
    """The weights of some steps, for later students; only rank 0 keeps them, all ranks gather."""

    def after_step(self, run: Run, result: StepResult) -> None:
        settings = run.config.trajectory
        if result.step not in settings.steps and not (settings.every and due(result.step, settings.every, run.steps)):
            return
        if run.writes:
            write_checkpoint(
                run.config.folder / "trajectory",
                result.step,
                run.engine.weights(),
                config=checkpoint_config(run.config, run.task),
                vocabulary=run.task.vocabulary_digest,
                metrics=dict(run.latest),
                shard_bytes=settings.shard_bytes,
                run=run.folder.run,
            )
            target = run.config.folder / "exports" / f"step_{result.step}"
            if settings.export and not target.exists():  # a resumed run comes to the same weights again
                export(run.config, target, step=result.step)
        else:
            for _ in run.engine.weights():
                continue
        run.world.barrier()


class Checkpointer(Callback):
    """Resumable checkpoints, each checkpoint.every steps and at the end. The last of all callbacks, whose states they carry."""

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.step < run.steps and due(result.step, run.config.checkpoint.every, run.steps):
            self._save(run)

    def end(self, run: Run, *, finished: bool) -> None:
        if run.step > max(run.saved, 0):  # a run that made no step binds nobody to its settings
            self._save(run)

    def _save(self, run: Run) -> None:
        state = {**asdict(run.progress), **run.teaching.state}
        if carried := {callback.name: kept for callback in run.callbacks if (kept := callback.state_dict())}:
            state["callbacks"] = carried
        state["journal"] = run.world.on_first(run.teaching.sync)
        folder = run.store.save(run.engine, run.step, state)
        run.saved = run.step
        for callback in run.callbacks:
            callback.saved(run, run.step, folder)


def checkpoint_config(config: Config, task: Task) -> dict[str, Any]:
    """What a checkpoint of a trajectory says about its model: the configuration, and the shapes that the task gave it."""
    shapes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    return public_tree(config) | {"shapes": shapes}
