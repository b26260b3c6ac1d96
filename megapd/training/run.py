"""A run's parts, put together: world, task, student, teacher's stream, telemetry, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megapd.config import Adaptive, Config, Schedule, dump, flatten
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.kernels import LossOptions
from megapd.models import Learner, build_model, flops_per_token, parameter_count
from megapd.schedule import live
from megapd.schedule.adaptive import FILE, AdaptivePlan, DecisionLog, EmbeddedDecider, check_lead, recorded_decisions, subject
from megapd.schedule.client import Registration, ServiceSource
from megapd.schedule.http import Api
from megapd.schedule.live import ChangeLog, ChangeSource, EmbeddedSource, LivePlan
from megapd.schedule.policies import Plan
from megapd.schedule.record import ScheduleRecord
from megapd.tasks import Task, build_task
from megapd.teacher.cache import SignalCache
from megapd.teacher.setup import open_stream, open_trajectory, resolve_plan
from megapd.teacher.stream import Stream
from megapd.training.checkpoint import CheckpointStore
from megapd.training.engine import Engine, start_world
from megapd.training.telemetry import Telemetry
from megapd.trajectory import Checkpoints
from megapd.world import World

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
FREE_TEACHER = "trajectory sharding resident carrier cache endpoints token root_certificate certificate key depth call_seconds"
FREE_TEACHER += " deadline_seconds on_failure server."
FREE_SECTIONS += tuple(f"teacher.{key}" for key in FREE_TEACHER.split())

SERVICE_SECONDS = 5.0  # longest wait for an answer of the scheduler


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
    plan: Plan | None
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
    stream, record, changes = None, None, None
    if config.scheduler.url is not None:
        plan, changes = _join_scheduler(config, plan, trajectory, world, state)
    elif isinstance(plan, AdaptivePlan):
        changes = _resume_decisions(config, plan, world, state["decisions"])
    if plan is not None and trajectory is not None:
        record = ScheduleRecord(config.folder / "schedule.json", plan, resumed=resumed, writes=world.rank == 0)
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


def _join_scheduler(
    config: Config, plan: Plan | None, trajectory: Checkpoints | None, world: World, state: dict[str, Any]
) -> tuple[LivePlan | None, ChangeSource | None]:
    """(the plan with all changes on record and those that the service tells now, where they come from: on rank 0)."""
    ahead, known = 0, ChangeLog(config.folder / live.FILE)
    if len(known.changes) < state["decisions"]:
        raise UserError(
            f"schedule: this run's checkpoint knew {state['decisions']} changes, but {len(known.changes)} are on record; restore "
            f"{live.FILE} in the run's folder, or start a run of another name"
        )
    grown = None
    if plan is not None:
        assert config.schedule is not None
        assert config.teacher is not None
        ahead = max(config.training.prefetch, config.teacher.depth)
        if isinstance(config.schedule, Adaptive):
            check_lead(config.schedule, ahead)
        grown = LivePlan(live.resolved(1, 0, config.schedule, plan), config.training.steps, known.changes)

    def resolve(schedule: Schedule) -> Plan:
        assert trajectory is not None
        trajectory.refresh()
        return resolve_plan(config, trajectory, schedule)

    def weights(step: int) -> str | None:
        assert trajectory is not None
        return trajectory.checkpoint(step).digest if trajectory.written(step) else None

    source, found, failure = None, [], None
    if world.rank == 0:
        facts = {"task": config.task.kind, "model": config.model.kind, "ranks": world.size}
        settings = config.scheduler
        registered = settings.trajectory if plan is not None else None
        run = Registration(config.name, config.training.steps, registered, settings.group, facts, config.schedule)
        try:
            source = ServiceSource(Api(settings, timeout_seconds=SERVICE_SECONDS), run, known, resolve, weights, ahead=ahead)
            found = source.start(grown, state["step"], config.folder / "metrics.jsonl")
        except UserError as error:
            failure = str(error)
    (failure, found), *_ = world.gather((failure, found))
    if failure is not None:
        if source is not None:
            source.close()
        raise UserError(failure)
    if grown is not None and world.rank > 0:
        for change in found:
            grown.take(change)
    return grown, source


def _resume_decisions(config: Config, plan: AdaptivePlan, world: World, known: int) -> ChangeSource | None:
    """Extend the plan by the decisions on record, `known` to the run's checkpoint; on rank 0 what decides from here on."""
    assert isinstance(config.schedule, Adaptive)
    assert config.teacher is not None
    check_lead(config.schedule, max(config.training.prefetch, config.teacher.depth))
    about = subject(config.schedule, plan.candidates)
    decisions = DecisionLog(config.folder / FILE, about, writes=world.rank == 0)
    for decision in recorded_decisions(decisions, known):
        plan.take(decision)
    if world.rank > 0:
        return None
    return EmbeddedSource(config.schedule, EmbeddedDecider(config.schedule, plan.candidates, decisions))


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
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(FREE_SECTIONS):
            raise UserError(
                f"{key} was {before.get(key)!r} when {config.folder} began and is {now.get(key)!r} now; "
                f"a resumed run keeps its settings: restore it, or choose another name"
            )
    return True
