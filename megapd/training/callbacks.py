"""The callbacks of every run beside its telemetry: evaluation, trajectory, checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megapd.config import Config, EvaluationConfig, TrajectoryWriterConfig
from megapd.evaluation import held_out
from megapd.tasks import Task
from megapd.training.run import Callback, Run, StepResult, due
from megapd.trajectory.writer import write_checkpoint


class Evaluation(Callback):
    """Held-out loss and accuracy, each evaluation.every steps and at the end."""

    def __init__(self, settings: EvaluationConfig) -> None:
        self._settings = settings

    def after_step(self, run: Run, result: StepResult) -> None:
        if due(result.step, self._settings.every, run.steps):
            micro = self._settings.micro_batch or run.engine.tiling.micro_batch
            values = held_out(run.task, self._settings.samples, run.world, micro, run.engine.evaluate)
            for callback in run.callbacks:
                callback.evaluated(run, result.step, values)


class TrajectoryWriter(Callback):
    """The weights of some steps, for later students; only rank 0 keeps them, all ranks gather."""

    def __init__(self, settings: TrajectoryWriterConfig) -> None:
        self._settings = settings

    def after_step(self, run: Run, result: StepResult) -> None:
        every = self._settings.every
        if result.step not in self._settings.steps and not (every and due(result.step, every, run.steps)):
            return
        if run.writes:
            write_checkpoint(
                run.config.folder / "trajectory",
                result.step,
                run.engine.weights(),
                config=checkpoint_config(run.config, run.task),
                vocabulary=run.task.vocabulary_digest,
                metrics=dict(run.latest),
                shard_bytes=self._settings.shard_bytes,
            )
        else:
            for _ in run.engine.weights():
                continue
        run.world.barrier()


class Checkpointer(Callback):
    """Resumable checkpoints, each `every` steps and where the run ends. The last of all callbacks, whose states they carry."""

    def __init__(self, every: int) -> None:
        self._every = every

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.step < run.steps and due(result.step, self._every, run.steps):
            self._save(run)

    def end(self, run: Run, *, finished: bool) -> None:
        if run.step > run.saved:
            self._save(run)

    def _save(self, run: Run) -> None:
        state = {**asdict(run.progress), **run.teaching.state}
        if carried := {callback.name: kept for callback in run.callbacks if (kept := callback.state_dict())}:
            state["callbacks"] = carried
        run.teaching.sync()
        folder = run.store.save(run.engine, run.step, state)
        run.saved = run.step
        for callback in run.callbacks:
            callback.saved(run, run.step, folder)


def checkpoint_config(config: Config, task: Task) -> dict[str, Any]:
    """What a checkpoint of a trajectory says about its model: the configuration, and the shapes that the task gave it."""
    shapes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    return {**config.model_dump(mode="json"), "shapes": shapes}
