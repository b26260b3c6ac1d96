"""What governs a run's teacher: its plan, with what is on record, and where changes come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    log         on rank 0, the changes on record
    """

    plan: LivePlan | None
    source: ChangeSource | None
    registered: Mapping[int, str]
    log: ChangeLog | None

    def sync(self) -> dict[str, Any]:
        """On rank 0: what was reported lasts from here on; `Journal`, for a checkpoint of the run."""
        reports = (0, "") if self.source is None else self.source.sync()
        known = 0 if self.plan is None else self.plan.known
        return {"changes": (known, "" if self.log is None else self.log.digest(known)), "reports": reports}


def open_changes(
    config: Config,
    plan: Plan | None,
    trajectory: Checkpoints | None,
    world: World,
    *,
    run: str,
    step: int,
    known: int,
    rests: Mapping[str, tuple[int, str]],
) -> Changes:
    """What is on record of a run, and what the service tells now. A collective; raises UserError on all ranks together.

    plan    what the run's own schedule resolved to over `trajectory`; both None where nothing teaches
    run     its id
    step    student steps done before
    known   changes that the run's checkpoint knew
    rests   what it rests on, see Changes.sync; {} for one of an older megapd, or none
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
    log: ChangeLog | None = None

    def open_record() -> tuple[Sequence[Change], Mapping[int, str]]:
        # On rank 0 alone: it writes there too, and no other rank may see some of that.
        nonlocal source, log
        log = ChangeLog(config.folder / FILE, run)
        base = known, rests.get("changes", (known, ""))[1]
        if config.scheduler.url is None:
            if grown is not None:
                source = _resume_alone(config, grown, trajectory, log, run, step, base, rests.get("reports", (0, "")))
            return log.changes, {}
        source = service = _join_service(config, grown, trajectory, log, run, world.size, ahead, base)
        service.start(step, config.folder / "metrics.jsonl")
        return log.changes, service.registered

    changes, registered = world.on_first(open_record)
    if grown is not None:
        for change in changes[grown.known :]:
            grown.take(change)
    return Changes(grown, source, registered, log)


def _join_service(
    config: Config,
    plan: LivePlan | None,
    trajectory: Checkpoints | None,
    log: ChangeLog,
    run: str,
    ranks: int,
    ahead: int,
    base: tuple[int, str],
) -> ServiceSource:
    """The service's changes, not started yet."""
    if has_reports(config.folder):
        raise UserError(
            f"scheduler.url: {config.folder} holds reports that this run decided on by itself, which the scheduler lacks; leave "
            f"scheduler.url out, or start a run of another name"
        )
    _take_recorded(plan, log, *base)

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
    facts = {"run": run, "task": config.task.kind, "model": config.model.kind, "ranks": ranks}
    name = settings.trajectory if plan is not None else None
    registration = Registration(config.name, config.training.steps, name, settings.group, facts, config.schedule)
    api = Api(settings, timeout_seconds=CALL_SECONDS)
    return ServiceSource(api, registration, plan, log, resolve, weights, ahead=ahead)


def _resume_alone(
    config: Config,
    plan: LivePlan,
    trajectory: Checkpoints | None,
    log: ChangeLog,
    run: str,
    step: int,
    base: tuple[int, str],
    reports: tuple[int, str],
) -> ChangeSource | None:
    """What changes the plan where no service does: an adaptive schedule's own decisions, or nothing any more."""
    grows = None if config.schedule is None else config.schedule.grows
    source = None
    # Decisions without reports are the service's.
    own = has_reports(config.folder) and all(isinstance(change, Decision) for change in log.changes)
    if grows and (own or reports[0] or not log.changes):
        assert trajectory is not None
        source = open_embedded(config.folder, run, grows, candidates(grows, trajectory.steps), log, reports)
    try:
        _take_recorded(plan, log, *base)
    except BaseException:
        if source is not None:
            source.close()
        raise
    if source is None and plan.grows_after(step):
        what = f"the scheduler decides for this run ({FILE} in its folder), and nothing else can go on with that"
        fix = f"name the scheduler again, or start a run of another name; if the run decided by itself, restore {REPORTS_FILE}"
        raise UserError(f"scheduler.url: {what}; {fix}")
    return source


def _take_recorded(plan: LivePlan | None, log: ChangeLog, known: int, digest: str) -> None:
    """digest: of the `known` first, "" for a checkpoint that has none."""
    if len(log.changes) < known or (digest and log.digest(known) != digest):
        what = f"the first {known} changes in {FILE}, which this run's checkpoint knew, are gone or others"
        raise UserError(f"schedule: {what}; restore it from a copy, or start a run of another name")
    if plan is not None:
        for change in log.changes:
            plan.take(change)
