"""`megapd evaluate`: held-out loss and accuracy of what a run's folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megapd.batch import Batch
from megapd.config import Config
from megapd.errors import UserError
from megapd.evaluation import held_out, label_logprobs, open_downstream
from megapd.files import write_atomic
from megapd.models import copy_weights
from megapd.signals import DTYPES
from megapd.tasks import Task, build_task
from megapd.tiling import tile
from megapd.training import CheckpointStore, build_student, start_world, student_engine
from megapd.training.folder import check_weights, held, read_record
from megapd.training.state import StateReader, holds_state
from megapd.trajectory import Trajectory
from megapd.world import World


def evaluate_run(config: Config, folder: Path) -> int:
    """Evaluate every checkpoint of the run's trajectory, or without one its newest resumable checkpoint.

    Rank 0 prints a line each and writes evaluation.json into the folder, unless a process trains the run.
    """
    check_weights(folder)
    world, results = start_world(), []
    trajectory = Trajectory(folder / "trajectory", must_exist=False)
    if trajectory.incomplete:
        which = ", ".join(f"step_{step}" for step in trajectory.incomplete)
        raise UserError(f"{folder / 'trajectory'}: {which} lack what describes them; restore it, or remove those folders")
    for step, values in _trajectory(config, trajectory, world) if trajectory.steps else _newest(config, folder, world):
        results.append({"step": step, **values})
        if world.rank == 0:
            told = "   ".join(f"{key} {value:.6g}" for key, value in values.items() if key != "samples")
            print(f"step {step:>9,}   {told}", flush=True)
    if world.rank == 0 and not held(folder):
        write_atomic(folder / "evaluation.json", json.dumps(results, indent=1))
    return 0


def _trajectory(config: Config, trajectory: Trajectory, world: World) -> Iterator[tuple[int, dict[str, float]]]:
    task = build_task(config)
    learner = build_student(config, task).to(world.device, DTYPES[config.training.precision])
    measured = _measures(config, task, world)
    for step in trajectory.steps:
        checkpoint = trajectory.checkpoint(step)
        if checkpoint.vocabulary != task.vocabulary_digest:
            raise UserError(f"{checkpoint.path} was trained on another vocabulary than task.corpus has now; restore the corpus")
        copy_weights(learner, trajectory.load(step), checkpoint.path)
        yield step, measured(lambda batch: learner(batch)[1], partial(label_logprobs, learner))


def _newest(config: Config, folder: Path, world: World) -> Iterator[tuple[int, dict[str, float]]]:
    task = build_task(config)
    record = read_record(folder)
    run, adopted = ("", True) if record is None else (record.id, record.adopted)
    store = CheckpointStore(folder / "checkpoints", world, config.checkpoint.keep, task.data_digest, run, adopted=adopted)
    found = store.newest()
    if found is None:
        raise UserError(f"{folder} has neither a trajectory nor a checkpoint to evaluate")
    step, path = found
    learner, measured = build_student(config, task), _measures(config, task, world)
    if not holds_state(path):  # of an older megapd: DeepSpeed reads it, on the ranks that wrote it
        engine = student_engine(config, learner, world)
        store.load(engine, path)
        yield step, measured(engine.evaluate, engine.label_logprobs)
        return
    learner = learner.to(world.device, DTYPES[config.training.precision])
    with StateReader(path) as state:
        copy_weights(learner, dict(state.weights()), path)
    yield step, measured(lambda batch: learner(batch)[1], partial(label_logprobs, learner))


Of = Callable[[Batch], Tensor]


def _measures(config: Config, task: Task, world: World) -> Callable[[Of, Of], dict[str, float]]:
    """Held-out loss and accuracy, and evaluation.tasks, of a model that gives sums of a batch and log p of its labels."""
    micro = config.evaluation.micro_batch or tile(config.training, world.size).micro_batch
    downstream = open_downstream(config, task)

    @torch.no_grad()
    def measured(sums: Of, logprobs: Of) -> dict[str, float]:
        values = held_out(task, config.evaluation.samples, world, micro, sums)
        for one in downstream:
            values |= one.score(logprobs, world, micro)
        return values

    return measured
