"""What governs a run's teacher: its plan, with what is on record, and where changes come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megapd.config import Config, ScheduleConfig
from megapd.errors import UserError
from megapd.schedule.adaptive import check_lead
from megapd.schedule.changes import FILE, ChangeLog, ChangeSource, open_embedded
from megapd.schedule.plan import Change, Decision, LivePlan, Plan, resolved
from megapd.schedule.policies import candidates
from megapd.schedule.reports import REPORTS_FILE, has_reports
from megapd.schedule.resolve import resolve_plan
from megapd.scheduler.client.changes import ServiceSource
from megapd.scheduler.client.http import CALL_SECONDS, Api
from megapd.scheduler.client.registration import Registration
from megapd.trajectory import Checkpoints
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from megapd.world import World


@dataclass(frozen=True)
class Changes:
    """How the teacher of each step is known.

    plan        with all changes on record, the same on every rank; None where nothing teaches
    source      on rank 0, what metrics are reported to and changes come from: the service, or an adaptive schedule's own rule
    registered  teacher step -> digest that the scheduler has of it, as far as it has one
    """

    plan: LivePlan | None
    source: ChangeSource | None
    registered: Mapping[int, str]


def open_changes(
    config: Config, plan: Plan | None, trajectory: Checkpoints | None, world: World, *, step: int, known: int
) -> Changes:
    """What is on record of a run, and what the service tells now. A collective; raises UserError on all ranks together.

    plan    what the run's own schedule resolved to over `trajectory`; both None where nothing teaches
    step    student steps done before
    known   changes that the run's checkpoint knew
    """
    ahead, grown = 0, None
    if plan is not None:
        assert config.schedule is not None
        assert config.teacher is not None
        ahead = max(config.training.prefetch, config.teacher.depth)
        if config.schedule.grows:
            check_lead(config.schedule.grows, ahead)
        grown = LivePlan(resolved(1, 0, config.schedule, plan), config.training.steps)
    source: ChangeSource | None = None

    def open_record() -> tuple[Sequence[Change], Mapping[int, str]]:
        # On rank 0 alone: it writes there too, and no other rank may see some of that.
        nonlocal source
        log = ChangeLog(config.folder / FILE)
        if config.scheduler.url is None:
            source = _resume_alone(config, grown, trajectory, log, step, known) if grown is not None else None
            return log.changes, {}
        source = service = _join_service(config, grown, trajectory, log, world.size, ahead, known)
        service.start(step, config.folder / "metrics.jsonl")
        return log.changes, service.registered

    changes, registered = world.on_first(open_record)
    if grown is not None:
        for change in changes[grown.known :]:
            grown.take(change)
    return Changes(grown, source, registered)


def _join_service(
    config: Config, plan: LivePlan | None, trajectory: Checkpoints | None, log: ChangeLog, ranks: int, ahead: int, known: int
) -> ServiceSource:
    """The service's changes, not started yet."""
    if has_reports(config.folder):
        raise UserError(
            f"scheduler.url: {config.folder} holds reports that this run decided on by itself, which the scheduler lacks; leave "
            f"scheduler.url out, or start a run of another name"
        )
    _take_known(plan, log, known)

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

    settings = config.scheduler
    facts = {"task": config.task.kind, "model": config.model.kind, "ranks": ranks}
    name = settings.trajectory if plan is not None else None
    run = Registration(config.name, config.training.steps, name, settings.group, facts, config.schedule)
    api = Api(settings, timeout_seconds=CALL_SECONDS)
    return ServiceSource(api, run, plan, log, resolve, weights, ahead=ahead)


def _resume_alone(
    config: Config, plan: LivePlan, trajectory: Checkpoints | None, log: ChangeLog, step: int, known: int
) -> ChangeSource | None:
    """What changes the plan where no service does: an adaptive schedule's own decisions, or nothing any more."""
    grows = None if config.schedule is None else config.schedule.grows
    source = None
    # Decisions without reports are the service's.
    own = has_reports(config.folder) and all(isinstance(change, Decision) for change in log.changes)
    if grows and (own or not log.changes):
        assert trajectory is not None
        source = open_embedded(config.folder, grows, candidates(grows, trajectory.steps), log)
    try:
        _take_known(plan, log, known)
    except BaseException:
        if source is not None:
            source.close()
        raise
    if source is None and plan.grows_after(step):
        what = f"the scheduler decides for this run ({FILE} in its folder), and nothing else can go on with that"
        fix = f"name the scheduler again, or start a run of another name; if the run decided by itself, restore {REPORTS_FILE}"
        raise UserError(f"scheduler.url: {what}; {fix}")
    return source


def _take_known(plan: LivePlan | None, log: ChangeLog, known: int) -> None:
    if len(log.changes) < known:
        what = f"this run's checkpoint knew {known} changes, but {len(log.changes)} are on record"
        raise UserError(f"schedule: {what}; restore {FILE} in the run's folder, or start a run of another name")
    if plan is not None:
        for change in log.changes:
            plan.take(change)
