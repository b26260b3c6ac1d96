"""A run's parts, put together: world, task, student, teacher's stream, telemetry, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megapd.config import Config, Follow, dump, flatten
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.kernels import LossOptions
from megapd.models import Learner, build_model, flops_per_token, parameter_count
from megapd.schedule.policies import Plan, build_plan
from megapd.schedule.record import ScheduleRecord
from megapd.signal import Kind, negotiate
from megapd.tasks import Task, build_task
from megapd.teacher.engine import Teacher
from megapd.teacher.stream import ColocatedStream, Stream
from megapd.training.checkpoint import CheckpointStore
from megapd.training.engine import DTYPES, Engine, World, start_world
from megapd.training.telemetry import Telemetry
from megapd.trajectory import Checkpoint, Trajectory

# What may differ between a run's start and its resumption: nothing here changes what the run learns.
FREE_SECTIONS = ("checkpoint.", "telemetry.", "runs_dir", "corpus.sources", "evaluation.micro_batch", "training.prefetch")


@dataclass
class Run:
    """Everything the loop needs.

    start   student steps done before: 0, or where the run resumes
    saved   student steps of the newest checkpoint, -1: none
    state   what a checkpoint carries beside DeepSpeed's own: equal on all ranks
    """

    config: Config
    world: World
    task: Task
    engine: Engine
    plan: Plan | None
    stream: Stream | None
    record: ScheduleRecord | None
    store: CheckpointStore
    telemetry: Telemetry
    start: int
    saved: int
    state: dict[str, Any]
    flops_per_token: float

    @property
    def writes(self) -> bool:
        return self.world.rank == 0

    def close(self) -> None:
        self.telemetry.close()
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


def resolve_plan(config: Config, trajectory: Trajectory) -> Plan:
    """The schedule of the run over the checkpoints there are; `follow` does not need them yet."""
    assert config.schedule is not None
    return build_plan(config.schedule, available=trajectory.steps, steps=config.training.steps)


def signal_kind(config: Config, task: Task, checkpoint: Checkpoint) -> Kind:
    """The kind asked for, or for `auto` the cheapest exact one, given one of the teacher's checkpoints."""
    assert config.teacher is not None
    if config.teacher.signal != "auto":
        return config.teacher.signal
    model = checkpoint.config["model"]
    width = model["width"] if model["kind"] == "mlp" else model["hidden"]
    return negotiate(task.classes, width, config.loss.teacher_temperature, config.loss.divergence)


def open_trajectory(config: Config) -> Trajectory:
    assert config.teacher is not None
    return Trajectory(config.teacher.trajectory, must_exist=not isinstance(config.schedule, Follow))


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
    restored = store.restore(engine) if resumed else None
    saved = -1 if restored is None else int(restored["step"])
    state |= {key: value for key, value in (restored or {}).items() if key in state}
    stream, record = None, None
    if plan is not None and trajectory is not None:
        record = ScheduleRecord(config.folder / "schedule.json", plan, resumed=resumed, writes=world.rank == 0)
        if state["step"] < config.training.steps:
            stream = _open_stream(config, task, trajectory, plan, world, record, state["step"])
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
    return Run(config, world, task, engine, plan, stream, record, store, telemetry, state["step"], saved, state, flops)


def _open_stream(
    config: Config, task: Task, trajectory: Trajectory, plan: Plan, world: World, record: ScheduleRecord, step: int
) -> Stream:
    """A stream whose teacher of `step` is in place: a damaged or foreign one shows before the run's folder is touched."""
    wait = config.schedule.timeout_seconds if isinstance(config.schedule, Follow) else None
    teacher = Teacher(trajectory, task, world.device, DTYPES[config.training.precision], config.loss.chunk_bytes, wait)
    try:
        checkpoint = teacher.rotate(plan.checkpoint_at(step))
        record.confirm(checkpoint)
        return ColocatedStream(teacher, plan, signal_kind(config, task, checkpoint))
    except BaseException:
        teacher.close()  # its reader may be waiting for a file, and would keep the process alive
        raise


def _check_folder(config: Config, store: CheckpointStore) -> bool:
    """Whether the run's folder is to be resumed; UserError if it holds another run, or may not be resumed."""
    saved = config.folder / "config.yaml"
    if not saved.exists():
        return False
    if not config.checkpoint.resume:
        raise UserError(f"{config.folder} holds a run already: set checkpoint.resume true to continue it, or choose another name")
    before, now = flatten(yaml.safe_load(saved.read_text())), flatten(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            raise UserError(
                f"{key} was {before.get(key)!r} when {config.folder} began and is {now.get(key)!r} now; "
                f"a resumed run keeps its settings: restore it, or choose another name"
            )
    return True
