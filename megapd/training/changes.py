"""what changes the schedule of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megapd.config import AdaptiveConfig, Config, ScheduleConfig
from megapd.errors import UserError
from megapd.schedule import changes as changes_module
from megapd.schedule import live
from megapd.schedule.adaptive import EmbeddedDecider, check_lead
from megapd.schedule.changes import ChangeLog, ChangeSource, EmbeddedSource
from megapd.schedule.decision_log import FILE, DecisionLog, recorded_decisions, subject
from megapd.schedule.live import Change, LivePlan
from megapd.schedule.plan import AdaptivePlan, Plan
from megapd.schedule.resolve import resolve_plan
from megapd.scheduler.client.changes import Registration, ServiceSource
from megapd.scheduler.client.http import Api
from megapd.trajectory import Checkpoints
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from megapd.world import World

SERVICE_SECONDS = 5.0  # longest wait for an answer of the scheduler


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
        if isinstance(config.schedule, AdaptiveConfig):
            check_lead(config.schedule, ahead)

    def resolve(schedule: ScheduleConfig) -> Plan:
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
            log = ChangeLog(config.folder / changes_module.FILE)
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
            known = ChangeLog(config.folder / changes_module.FILE).changes
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
            f"scheduler.url: the scheduler decides for this run ({changes_module.FILE} in its folder), and nothing else can go "
            f"on with that; name the scheduler again, or start a run of another name"
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
            f"{changes_module.FILE} in the run's folder, or start a run of another name"
        )


def _resume_decisions(config: Config, plan: AdaptivePlan, world: World, known: int) -> ChangeSource | None:
    """Extend the plan by the decisions on record, `known` to the run's checkpoint; on rank 0 what decides from here on."""
    assert isinstance(config.schedule, AdaptiveConfig)
    assert config.teacher is not None
    check_lead(config.schedule, max(config.training.prefetch, config.teacher.depth))
    about = subject(config.schedule, plan.candidates)
    decisions = DecisionLog(config.folder / FILE, about, writes=world.rank == 0)
    for decision in recorded_decisions(decisions, known):
        plan.take(decision)
    if world.rank > 0:
        return None
    return EmbeddedSource(config.schedule, EmbeddedDecider(config.schedule, plan.candidates, decisions))
