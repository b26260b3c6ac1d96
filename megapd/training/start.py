"""How a run is put together, or resumed where its folder stopped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from megapd import registry
from megapd.config import Config
from megapd.errors import UserError
from megapd.evaluation import DownstreamTask, check_samples, open_downstream
from megapd.models import Learner, build_model, parameter_count, start_from, teacher_logit_form
from megapd.schedule.plan import Plan
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.limits import check_teachers
from megapd.teacher.locate import open_trajectory
from megapd.training.callbacks import Checkpointer, Evaluation, Guard, TrajectoryWriter
from megapd.training.engine import Engine, start_world
from megapd.training.folder import agree, check_room, open_folder, read_record, write_config
from megapd.training.run import Callback, Progress, Run, StopRequest
from megapd.training.state import CheckpointStore
from megapd.training.teaching import open_teaching
from megapd.training.telemetry import Meter, Telemetry
from megapd.trajectory import Checkpoints
from megapd.world import World
from megapd_kernels import LossOptions

log = logging.getLogger(__name__)

Entry = TypeVar("Entry")


def build_student(config: Config, task: Task, teacher_form: tuple[float, float | None] = (1.0, None)) -> Learner:
    """teacher_form: scale and soft cap of the teacher's logits, see teacher_logit_form."""
    scale, cap = teacher_form
    try:
        options = LossOptions(**config.loss.model_dump(), teacher_logit_scale=scale, teacher_soft_cap=cap)
    except ValueError as error:
        raise UserError(f"loss.{error}") from error
    return build_model(
        config.model, vocab_size=task.vocab_size, classes=task.classes, length=task.length, options=options, seed=config.seed
    )


def student_engine(config: Config, learner: Learner, world: World) -> Engine:
    """The student under ZeRO on the ranks of `world`; a collective."""
    if config.training.precision == "fp16" and world.device.type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; on a CPU choose bf16 or fp32")
    return Engine(learner, config.training, config.optimizer, world, compiled=bool(getattr(config.model, "compile", False)))


def start(
    config: Config, callbacks: Sequence[Callback] = (), *, allow_change: Sequence[str] = (), take_over: bool = False
) -> Run:
    """Build the run, or resume it where its folder stopped; the caller closes it. Raises UserError before anything is written.

    callbacks: called after those that training.callbacks names; see `order`. allow_change, take_over: see `train`.
    """
    task = build_task(config)
    check_samples(task, config.evaluation.samples)
    downstream = open_downstream(config, task)
    curriculum = None
    if config.teacher is not None:
        trajectory = open_trajectory(config)
        plan = resolve_plan(config, trajectory)
        check_teachers(config, task, trajectory, plan)
        curriculum = trajectory, plan
    named = [make() for make in _registered(registry.callbacks, config.training.callbacks, "training.callbacks")]
    whole = order(config, [*named, *callbacks], downstream)
    with ExitStack() as opened:
        for callback in whole:
            opened.callback(callback.close)
        learner = build_student(config, task, _teacher_form(curriculum))
        world = start_world()
        world.on_first(lambda: check_room(config, parameter_count(learner)[0]))
        digests = {"data": task.data_digest, "vocabulary": task.vocabulary_digest}
        if config.model.initial is not None and not world.on_first(lambda: _has_weights(config.folder)):
            digests["initial weights"] = start_from(learner, config.model, task.vocabulary_digest)
        agree(world, config, digests)
        if curriculum is not None and world.rank == 0:
            for warning in curriculum[1].warnings:
                log.warning(warning)
        folder = open_folder(world, config, digests, allow_change=allow_change, take_over=take_over)
        opened.callback(folder.close)
        engine = student_engine(config, learner, world)
        opened.callback(engine.destroy)
        store = CheckpointStore(
            config.folder / "checkpoints", world, config.checkpoint.keep, task.data_digest, folder.run, adopted=folder.adopted
        )
        restored = (store.restore(engine) if folder.resumed else None) or {}
        _restore_callbacks(whole, restored.get("callbacks", {}))
        progress = Progress(**{key: restored[key] for key in asdict(Progress()) if key in restored})
        if progress.step > config.training.steps:
            raise UserError(f"training.steps: {config.training.steps}, but {config.folder} has made {progress.step}; give more")
        teaching = open_teaching(config, task, world, curriculum, restored, folder)
        opened.callback(teaching.close)
        if progress.step < config.training.steps:  # else run.json keeps the settings that it has, see RunFolder.begin
            world.on_first(lambda: write_config(config.folder, config))
        stop = StopRequest(config.folder / "stop", watches_file=world.rank == 0)
        first, saved = progress.step, int(restored.get("step", -1))
        return Run(config, world, task, engine, teaching, folder, store, stop, whole, progress, first, saved, opened.pop_all())


def _teacher_form(curriculum: tuple[Checkpoints, Plan] | None) -> tuple[float, float | None]:
    """Scale and cap of the teacher's logits, which all checkpoints of a trajectory share."""
    if curriculum is None:
        return 1.0, None
    trajectory, plan = curriculum
    written = next((step for step in plan.teachers if trajectory.written(step)), None)
    return (1.0, None) if written is None else teacher_logit_form(trajectory.describe(written))


def _has_weights(folder: Path) -> bool:
    """Whether the run in the folder saved a checkpoint, which it will go on from."""
    record = read_record(folder)
    return record is not None and record.saved >= 0


def order(config: Config, added: Sequence[Callback], downstream: Sequence[DownstreamTask] = ()) -> list[Callback]:
    """All callbacks of a run, in the order in which they are called.

    The guard of the folder; the meter, whose numbers the others see; those that were added, in their order; then what acts on the
    step: telemetry writes the line of metrics before the evaluation leads to its own, the trajectory's weights carry both, and
    the checkpoint carries the states of all.
    """
    if twice := [name for name, count in Counter(callback.name for callback in added).items() if count > 1]:
        raise UserError(f"training.callbacks: two are called {twice[0]!r}; give one another name, the key of its state")
    trackers = _registered(registry.trackers, config.telemetry.trackers, "telemetry.trackers")
    return [Guard(), Meter(), *added, Telemetry(trackers), Evaluation(downstream), TrajectoryWriter(), Checkpointer()]


def _registered(entries: registry.Registry[Entry], names: Sequence[str], setting: str) -> list[Entry]:
    try:
        return [entries.get(name) for name in names]
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def _restore_callbacks(callbacks: Sequence[Callback], states: dict[str, dict[str, Any]]) -> None:
    if missing := states.keys() - {callback.name for callback in callbacks}:
        what = f"the run's checkpoint carries the state of {', '.join(sorted(missing))}"
        raise UserError(f"training.callbacks: {what}; name it again, or start a run of another name")
    for callback in callbacks:
        if callback.name in states:
            callback.load_state_dict(states[callback.name])
