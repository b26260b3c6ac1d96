"""A run's parts, put together: world, task, student, teacher's stream, telemetry, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megapd.config import RETIRED_SETTINGS, Config, dump, flatten
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.models import Learner, build_model, flops_per_token, parameter_count
from megapd.schedule.changes import ChangeSource
from megapd.schedule.plan import LivePlan, Plan
from megapd.schedule.record import ScheduleRecord
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.cache import SignalCache
from megapd.teacher.setup import open_stream, open_trajectory
from megapd.teacher.stream import Stream
from megapd.training.changes import open_changes
from megapd.training.checkpoint import CheckpointStore
from megapd.training.engine import Engine, start_world
from megapd.training.telemetry import Telemetry
from megapd.trajectory import Checkpoints
from megapd.world import World
from megapd_kernels import LossOptions

# What may differ between a run's start and its resumption: nothing here changes what the run learns.
FREE_SECTIONS: tuple[str, ...]


FREE_SECTIONS = (
    "checkpoint.",
    "telemetry.",
    "scheduler.",
    "runs_dir",
    "corpus.sources",
    "evaluation.micro_batch",
    "training.prefetch",
)


# Streams are interchangeable, and schedule.json holds a resumed run to the digests of its teachers, wherever they lie.
FREE_TEACHER = "trajectory sharding resident carrier cache endpoints token root_certificate certificate key depth"


FREE_TEACHER += " call_seconds deadline_seconds on_failure server."


FREE_SECTIONS += tuple(f"teacher.{key}" for key in FREE_TEACHER.split())


@dataclass
class Run:
    """Everything the loop needs.

    start   student steps done before: 0, or where the run resumes
    saved   student steps of the newest checkpoint, -1: none
    state   what a checkpoint carries beside DeepSpeed's own: equal on all ranks
    fallback  recorded signals for teacher.on_failure cache
    changes  on rank 0, what metrics are reported to and what changes the schedule: the service, or an adaptive one's decider
    """

    config: Config
    world: World
    task: Task
    engine: Engine
    plan: LivePlan | None
    stream: Stream | None
    record: ScheduleRecord | None
    store: CheckpointStore
    telemetry: Telemetry
    start: int
    saved: int
    state: dict[str, Any]
    fallback: SignalCache | None
    changes: ChangeSource | None
    flops_per_token: float

    @property
    def writes(self) -> bool:
        return self.world.rank == 0

    def close(self) -> None:
        self.telemetry.close()
        if self.changes is not None:
            self.changes.close()
        if self.stream is not None:
            self.stream.close()
        self.engine.destroy()


def loss_options(config: Config) -> LossOptions:
    try:
        return LossOptions(**config.loss.model_dump())
    except ValueError as error:
        raise UserError(f"loss.{error}") from error


def build_student(config: Config, task: Task) -> Learner:
    return build_model(
        config.model,
        vocab_size=task.vocab_size,
        classes=task.classes,
        length=task.length,
        options=loss_options(config),
        seed=config.seed,
    )


def checkpoint_config(config: Config, task: Task) -> dict[str, Any]:
    """What a checkpoint of a trajectory says about its model: the configuration, and the shapes that the task gave it."""
    shapes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    return {**config.model_dump(mode="json"), "shapes": shapes}


def start(config: Config) -> Run:
    """Build the run, or resume it where its folder stopped. Raises UserError before anything is written."""
    task = build_task(config)
    plan, trajectory = None, None
    if config.teacher is not None:
        trajectory = open_trajectory(config)
        plan = resolve_plan(config, trajectory)
    learner = build_student(config, task)
    world = start_world()
    if config.training.precision == "fp16" and world.device.type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; on a CPU choose bf16 or fp32")
    engine = Engine(learner, config, world)
    store = CheckpointStore(config.folder / "checkpoints", world, config.checkpoint.keep, task.data_digest)
    resumed = _check_folder(config, store)
    world.barrier()  # no rank may look at the folder after rank 0 has begun to write it
    state: dict[str, Any] = {"step": 0, "nonfinite": 0, "nonfinite_in_a_row": 0, "overflows": 0}
    state |= {"steps_from_cache": 0, "steps_from_labels": 0, "decisions": 0}
    restored = store.restore(engine) if resumed else None
    saved = -1 if restored is None else int(restored["step"])
    state |= {key: value for key, value in (restored or {}).items() if key in state}
    stream, record = None, None
    opened = open_changes(config, plan, trajectory, world, step=state["step"], known=state["decisions"])
    plan, changes = opened.plan, opened.source
    if plan is not None and trajectory is not None:
        path, writes = config.folder / "schedule.json", world.rank == 0
        record = ScheduleRecord(path, plan, resumed=resumed, writes=writes, registered=opened.registered)
        if state["step"] < config.training.steps:
            stream = _open_stream(config, task, trajectory, plan, world, record, state["step"])
    fallback = None
    if stream is not None and config.teacher is not None and config.teacher.on_failure == "cache":
        assert config.teacher.cache is not None
        fallback = SignalCache(config.teacher.cache)
    if world.rank == 0:
        try:
            write_atomic(config.folder / "config.yaml", dump(config))
        except OSError as error:
            raise UserError(f"runs_dir: cannot write to {config.folder}: {error}") from error
    summary = {"parameters": parameter_count(learner)[0], "ranks": world.size}
    telemetry = Telemetry(config, world.rank == 0, state["step"], summary)
    flops = flops_per_token(
        config.model,
        classes=task.classes,
        length=task.length,
        labelled_share=task.labelled_per_sample / task.length,
    )
    return Run(
        config, world, task, engine, plan, stream, record, store, telemetry, state["step"], saved, state, fallback, changes, flops
    )


def _open_stream(
    config: Config, task: Task, trajectory: Checkpoints, plan: Plan, world: World, record: ScheduleRecord, step: int
) -> Stream:
    stream = open_stream(config, task, trajectory, plan, world, step)
    try:
        record.confirm(stream.teacher(step))
    except BaseException:
        stream.close()
        raise
    return stream


def _check_folder(config: Config, store: CheckpointStore) -> bool:
    """Whether the run's folder is to be resumed; UserError if it holds another run, or may not be resumed."""
    saved = config.folder / "config.yaml"
    if not saved.exists():
        return False
    if not config.checkpoint.resume:
        raise UserError(f"{config.folder} holds a run already: set checkpoint.resume true to continue it, or choose another name")
    before, now = flatten(yaml.safe_load(saved.read_text())), flatten(config.model_dump(mode="json"))
    for key in sorted((before.keys() | now.keys()) - set(RETIRED_SETTINGS)):
        if before.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            raise UserError(
                f"{key} was {before.get(key)!r} when {config.folder} began and is {now.get(key)!r} now; "
                f"a resumed run keeps its settings: restore it, or choose another name"
            )
    return True
