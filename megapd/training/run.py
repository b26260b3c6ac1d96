"""A run's parts, put together: world, task, student, teacher's stream, telemetry, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
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
from megapd.schedule.live import Change, ChangeLog, ChangeSource, EmbeddedSource, LivePlan
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
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
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
FREE_TEACHER = "trajectory sharding resident carrier cache endpoints data_port token root_certificate certificate key depth"
FREE_TEACHER += " call_seconds deadline_seconds on_failure server."
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
    registered: dict[int, str] = {}
    if config.scheduler.url is not None:
        plan, changes, registered = _join_scheduler(config, plan, trajectory, world, state)
    else:
        plan = _resume_changes(config, plan, world, state)
        if isinstance(plan, AdaptivePlan):
            changes = _resume_decisions(config, plan, world, state["decisions"])
    if plan is not None and trajectory is not None:
        path, writes = config.folder / "schedule.json", world.rank == 0
        record = ScheduleRecord(path, plan, resumed=resumed, writes=writes, registered=registered)
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
) -> tuple[LivePlan | None, ChangeSource | None, dict[int, str]]:
    """(the plan with all changes on record and those that the service tells now, where they come from: on rank 0, the digests
    that are registered of the teacher's steps)."""
    ahead = 0
    if plan is not None:
        assert config.schedule is not None
        assert config.teacher is not None
        ahead = max(config.training.prefetch, config.teacher.depth)
        if isinstance(config.schedule, Adaptive):
            check_lead(config.schedule, ahead)

    def resolve(schedule: Schedule) -> Plan:
        assert trajectory is not None
        trajectory.refresh()
        return resolve_plan(config, trajectory, schedule)

    def weights(step: int) -> str | None:
        # To describe a model of transformers is to fetch and hash it, for which no other rank waits long enough: ScheduleRecord
        # looks at it when it begins to teach, as at all others.
        if trajectory is None or isinstance(trajectory, HuggingFaceTrajectory) or not trajectory.written(step):
            return None
        return trajectory.checkpoint(step).digest

    source, grown, found, registered, failure = None, None, [], {}, None
    known: Sequence[Change] = ()
    if world.rank == 0:  # the one that reads the record: it writes there too, and no other rank may see some of that
        facts = {"task": config.task.kind, "model": config.model.kind, "ranks": world.size}
        settings = config.scheduler
        name = settings.trajectory if plan is not None else None
        run = Registration(config.name, config.training.steps, name, settings.group, facts, config.schedule)
        try:
            log = ChangeLog(config.folder / live.FILE)
            known = log.changes
            _check_known(known, state)
            grown = _grown(config, plan, known)
            source = ServiceSource(Api(settings, timeout_seconds=SERVICE_SECONDS), run, log, resolve, weights, ahead=ahead)
            found = source.start(grown, state["step"], config.folder / "metrics.jsonl")
            registered = source.registered
        except UserError as error:
            failure = str(error)
    (failure, known, found, registered), *_ = world.gather((failure, known, found, registered))
    if failure is not None:
        if source is not None:
            source.close()
        raise UserError(failure)
    if world.rank > 0:
        grown = _grown(config, plan, [*known, *found])
    return grown, source, registered


def _resume_changes(config: Config, plan: Plan | None, world: World, state: dict[str, Any]) -> Plan | None:
    """The plan with what the scheduler changed before, where scheduler.url is not set any more."""
    if plan is None:
        return None
    known: Sequence[Change] = ()
    failure, embedded = None, isinstance(plan, AdaptivePlan)
    if world.rank == 0:
        try:
            known = ChangeLog(config.folder / live.FILE).changes
            if known or not embedded:
                _check_known(known, state)
        except UserError as error:
            failure = str(error)
    (failure, known), *_ = world.gather((failure, known))
    if failure is not None:
        raise UserError(failure)
    if not known:
        return plan
    grown = _grown(config, plan, known)
    assert grown is not None
    if "adaptive" in grown.policies(state["step"]):
        raise UserError(
            f"scheduler.url: the scheduler decides for this run ({live.FILE} in its folder), and nothing else can go on "
            f"with that; name the scheduler again, or start a run of another name"
        )
    return grown


def _grown(config: Config, plan: Plan | None, changes: Sequence[Change]) -> LivePlan | None:
    if plan is None:
        return None
    assert config.schedule is not None
    return LivePlan(live.resolved(1, 0, config.schedule, plan), config.training.steps, changes)


def _check_known(changes: Sequence[Change], state: dict[str, Any]) -> None:
    if len(changes) < state["decisions"]:
        raise UserError(
            f"schedule: this run's checkpoint knew {state['decisions']} changes, but {len(changes)} are on record; restore "
            f"{live.FILE} in the run's folder, or start a run of another name"
        )


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
