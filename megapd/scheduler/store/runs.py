"""Runs, their schedules, decisions and reports in the store: functions of a connection.

Of a run's schedule versions, the highest that has begun at a student step is in force there; a version begins at `effective`, or
where its run says that all ranks took it up (`applied`), which is never earlier; so does what a decision decides. Decisions are
numbered from 0 without gaps, and never changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, bindparam, func, insert, select, update

from megapd.config import ScheduleConfig
from megapd.errors import UserError
from megapd.schedule.adaptive import decide
from megapd.schedule.plan import Decision, Plan, Report
from megapd.schedule.policies import build_plan, candidates
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.database import Conflict, NotFound, Refused, one
from megapd.scheduler.store.events import emit
from megapd.scheduler.store.tables import canonical, decisions, replicas, reports, runs, schedules

_SCHEDULE: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)

# What every run asks for again and again: built once, which takes four times as long as to execute it.
_ASSIGNMENT = select(runs.c.assignment_version, runs.c.endpoints).where(runs.c.name == bindparam("run"))
_NEWEST = (
    select(schedules)
    .join_from(runs, schedules, (schedules.c.run == runs.c.name) & (schedules.c.version == runs.c.schedule_version))
    .where(runs.c.name == bindparam("run"))
)


class Stored(TypedDict):
    """A megapd.schedule.plan.Decision as a tree, and the student step at which its run took it up, None: at `effective`."""

    sequence: int
    step: int
    effective: int
    checkpoint: int
    reason: str
    evidence: Any
    applied: int | None


def begins(change: Mapping[str, Any]) -> int:
    """The student step at which a schedule version, or a decision, begins."""
    return int(change["effective"] if change["applied"] is None else change["applied"])


# ------------------------------------------------------------------------------------------------------------------ runs


def put_run(
    connection: Connection, name: str, *, trajectory: str | None, group: str, steps: int, facts: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """(the run, whether it is new). A run that is there may become longer or change group and facts, but not its trajectory.

    trajectory: digest or name, None if nothing is registered; group: whose replicas teach it. facts: its `run`, the id, may only
    differ from the one known as long as no step was made: changes are those of one run.
    """
    digest = None if trajectory is None else catalogue.find_trajectory(connection, trajectory)["digest"]
    found = connection.execute(select(runs).where(runs.c.name == name)).first()
    given = {"trajectory": digest, "group": group, "steps": steps, "facts": canonical(facts)}
    if found is None:
        none = {"schedule_version": 0, "decisions": 0, "step": -1, "reported": None, "assignment_version": 0, "endpoints": "[]"}
        connection.execute(insert(runs), {"name": name, **given, **none, "created": time.time()})
    elif found.trajectory not in (None, digest):
        raise Conflict(f"trajectory: {name} is taught by {found.trajectory}; start a run of another name", _run(found))
    elif found.step >= 0 and facts.get("run") not in (None, known := json.loads(found.facts).get("run")) and known is not None:
        raise Conflict(
            f"name: the run {name} here is another ({known}), with changes of its own; choose another name", _run(found)
        )
    else:
        connection.execute(update(runs).where(runs.c.name == name).values(given))
    if found is None or any(found._mapping[key] != value for key, value in given.items()):
        emit(connection, "run", name, trajectory=digest, group=group, steps=steps)
    reassign(connection, group)
    return find_run(connection, name), found is None


def find_run(connection: Connection, name: str) -> dict[str, Any]:
    return _run(one(connection, select(runs).where(runs.c.name == name), f"run: there is none called {name}"))


def list_runs(connection: Connection, after: str, limit: int) -> list[dict[str, Any]]:
    query = select(runs).where(runs.c.name > after).order_by(runs.c.name).limit(limit)
    return [_run(row) for row in connection.execute(query)]


def _run(row: Any) -> dict[str, Any]:
    return {**row._mapping, "facts": json.loads(row.facts), "endpoints": json.loads(row.endpoints)}


# ------------------------------------------------------------------------------------------------------------- schedules


def set_schedule(
    connection: Connection,
    run: str,
    document: dict[str, Any],
    *,
    expected: int,
    effective: int | None,
    author: str,
    note: str = "",
    accept: bool = False,
) -> tuple[dict[str, Any], bool]:
    """(the new version, whether it is new): document as the section `schedule` of a configuration.

    expected: the version that it replaces, 0 of none; Conflict, with the present one, if another is there. A repeat of what was
    set last is no conflict. effective: the student step that it begins at, later than what the run has reported; None: the one
    after that. Raises Refused for a schedule that the run's trajectory cannot follow, or that names flagged checkpoints, unless
    `accept`.
    """
    found = find_run(connection, run)
    parsed = parse_schedule(document)
    shown = canonical(parsed.model_dump(mode="json"))
    present = found["schedule_version"]
    if present == expected + 1:
        last = find_schedule(connection, run)
        same = (canonical(last["document"]), last["author"], last["note"]) == (shown, author, note)
        if same and effective in (None, last["effective"]):
            return last, False
    if present != expected:
        current = None if present == 0 else find_schedule(connection, run)
        raise Conflict(f"expected: the schedule of {run} is at version {present}, not {expected}; look at it again", current)
    if effective is None:
        effective = found["step"] + 1 if present else 0
    if present == 0 and effective != 0:
        raise Refused("effective: the first schedule of a run begins at 0")
    if present > 0 and effective <= found["step"]:
        raise Refused(f"effective: {run} has done step {found['step']}; choose a later one")
    if effective >= found["steps"]:
        raise Refused(f"effective: {run} ends at step {found['steps']}; choose an earlier one")
    _check_schedule(connection, found, parsed, effective, accept)
    version = present + 1
    row = {"run": run, "version": version, "document": shown, "effective": effective, "author": author, "note": note}
    connection.execute(insert(schedules), {**row, "applied": None if present else 0, "created": time.time()})
    connection.execute(update(runs).where(runs.c.name == run).values(schedule_version=version))
    emit(connection, "schedule", run, version=version, policy=parsed.policy, effective=effective, by=author, note=note)
    return find_schedule(connection, run), True


def parse_schedule(document: Any) -> ScheduleConfig:
    """Refused, naming the setting, for what is no schedule."""
    try:
        return _SCHEDULE.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["schedule", *map(str, first["loc"])])
        raise Refused(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def find_schedule(connection: Connection, run: str, version: int | None = None) -> dict[str, Any]:
    """Of a version; None: the newest."""
    numbered = select(schedules).where((schedules.c.run == run) & (schedules.c.version == version))
    row = connection.execute(_NEWEST if version is None else numbered, {"run": run}).first()
    if row is None:
        find_run(connection, run)
        none = f"schedule: {run} has none yet"
        raise NotFound(none if version is None else f"version: {run} has no schedule of version {version}")
    return _schedule(row)


def list_schedules(connection: Connection, run: str, after: int = 0, limit: int = 1 << 30) -> list[dict[str, Any]]:
    """The versions in order, those after one."""
    find_run(connection, run)
    query = select(schedules).where((schedules.c.run == run) & (schedules.c.version > after))
    return [_schedule(row) for row in connection.execute(query.order_by(schedules.c.version).limit(limit))]


def apply_schedule(connection: Connection, run: str, version: int, step: int) -> dict[str, Any]:
    """The ranks agreed to take a version up at student step `step`. A repeat changes nothing, another step is a Conflict."""
    found = find_schedule(connection, run, version)
    if _is_news(found, step, f"version {version}", "begins at"):
        mine = (schedules.c.run == run) & (schedules.c.version == version)
        connection.execute(update(schedules).where(mine).values(applied=step))
        emit(connection, "schedule_applied", run, version=version, step=step)
    return {**found, "applied": step}


def _is_news(change: Mapping[str, Any], step: int, what: str, begins: str) -> bool:
    """Whether nobody said before that the change was taken up at `step`. Raises Conflict and Refused where it cannot be."""
    if change["applied"] not in (None, step):
        raise Conflict(f"step: {what} was taken up at student step {change['applied']}", change)
    if change["applied"] is None and step < change["effective"]:
        raise Refused(f"step: {what} {begins} student step {change['effective']}, not before")
    return change["applied"] is None


def _schedule(row: Any) -> dict[str, Any]:
    return {**row._mapping, "document": json.loads(row.document)}


def resolve(connection: Connection, run: dict[str, Any], schedule: ScheduleConfig) -> Plan:
    """The schedule over the run's registered checkpoints. Refused where there are none, or not those that it asks for."""
    if run["trajectory"] is None:
        raise Refused(f"trajectory: none is registered for {run['name']}, so its schedule cannot be resolved here")
    steps = catalogue.steps_of(connection, run["trajectory"])

    def metrics_of(step: int) -> dict[str, Any]:
        return dict(catalogue.checkpoint_at(connection, run["trajectory"], step)["metrics"])

    try:
        return build_plan(schedule, available=steps or None, steps=run["steps"], metrics_of=metrics_of)
    except UserError as error:
        raise Refused(str(error)) from error


def _check_schedule(connection: Connection, run: dict[str, Any], schedule: ScheduleConfig, effective: int, accept: bool) -> None:
    if run["trajectory"] is None:
        if schedule.grows is not None and not schedule.grows.teachers:
            raise Refused("schedule.checkpoints: no trajectory is registered to choose them from; name them in schedule.teachers")
        return  # the run resolves it over the folder that it has itself
    plan = resolve(connection, run, schedule)
    if accept:
        return
    last = effective if schedule.waits is None else 0
    taught = {plan.checkpoint_at(last), *(teacher for start, teacher in plan.rotations() if start >= last)}
    if schedule.grows is not None:
        taught = set(candidates(schedule.grows, tuple(catalogue.steps_of(connection, run["trajectory"]))))
    catalogue.refuse_flagged(connection, run["trajectory"], taught, "schedule")


# ------------------------------------------------------------------------------------------------------------- decisions


def add_decision(connection: Connection, run: str, decision: Stored) -> tuple[Stored, bool]:
    """(the decision, whether it is new). The next number is taken; a repeat of the same changes nothing, all else is a Conflict.

    decision: `applied` is not looked at. Raises Refused for a checkpoint that is flagged and not accepted, and for an effect
    before that of the decision before.
    """
    found, sequence = find_run(connection, run), decision["sequence"]
    wanted = Stored(**{**decision, "evidence": json.loads(canonical(decision["evidence"])), "applied": None})
    if sequence < found["decisions"]:
        present = list_decisions(connection, run, sequence - 1, 1)[0]
        if {**present, "applied": None} == wanted:
            return present, False
        raise Conflict(f"sequence: decision {sequence} of {run} is another one, and decisions are never changed", present)
    if sequence > found["decisions"]:
        told = {"decisions": found["decisions"]}
        raise Conflict(f"sequence: the next decision of {run} is number {found['decisions']}, not {sequence}", told)
    before = list_decisions(connection, run, sequence - 2, 1) if sequence else []
    if before and wanted["effective"] <= begins(before[0]):
        at = begins(before[0])
        raise Refused(f"effective: decision {sequence - 1} takes effect at student step {at}; choose a later one")
    if found["trajectory"] is not None:
        catalogue.refuse_flagged(connection, found["trajectory"], [wanted["checkpoint"]], "checkpoint")
    row = {**wanted, "run": run, "evidence": canonical(wanted["evidence"]), "created": time.time()}
    connection.execute(insert(decisions), row)
    connection.execute(update(runs).where(runs.c.name == run).values(decisions=sequence + 1))
    emit(connection, "decision", run, sequence=sequence, checkpoint=wanted["checkpoint"], effective=wanted["effective"])
    return wanted, True


def list_decisions(connection: Connection, run: str, after: int = -1, limit: int = 1 << 30) -> list[Stored]:
    """Those with a greater number, in order; none of a run that there is not."""
    columns = [decisions.c[key] for key in Stored.__annotations__]
    query = select(*columns).where((decisions.c.run == run) & (decisions.c.sequence > after))
    rows = connection.execute(query.order_by(decisions.c.sequence).limit(limit))
    return [Stored(**{**row._mapping, "evidence": json.loads(row.evidence)}) for row in rows]  # type: ignore[typeddict-item]


def apply_decision(connection: Connection, run: str, sequence: int, step: int) -> Stored:
    """The run learned of a decision too late, and its ranks take it up at student step `step`; as `apply_schedule`."""
    found = list_decisions(connection, run, sequence - 1, 1)
    if not found:
        find_run(connection, run)
        raise NotFound(f"sequence: {run} has no decision {sequence}")
    if _is_news(found[0], step, f"decision {sequence}", "takes effect at"):
        mine = (decisions.c.run == run) & (decisions.c.sequence == sequence)
        connection.execute(update(decisions).where(mine).values(applied=step))
        emit(connection, "decision_applied", run, sequence=sequence, step=step)
    return {**found[0], "applied": step}


# --------------------------------------------------------------------------------------------------------------- reports


def add_report(
    connection: Connection, run: str, step: int, metrics: dict[str, float], now: int | None = None
) -> tuple[bool, Stored | None]:
    """(whether it is new, the decision that it led to) of what the run measured when it had done `step` steps.

    now: student steps that the run has done since, where the report comes late; what is decided takes effect after them.

    A report of a step that is on record, or before one that is, changes nothing: a resumed run measures the same again. Where the
    schedule in force there is adaptive, the decision is made here and is part of the same transaction.
    """
    found = find_run(connection, run)
    newest = connection.execute(select(func.max(reports.c.step)).where(reports.c.run == run)).scalar()
    new = newest is None or step > newest
    moment = time.time()
    if new:
        connection.execute(insert(reports), {"run": run, "step": step, "metrics": canonical(metrics), "created": moment})
    done = step if now is None else max(step, now)
    connection.execute(update(runs).where(runs.c.name == run).values(step=done, reported=moment))
    if not new:
        rest = select(decisions.c.sequence).where((decisions.c.run == run) & (decisions.c.step == step))
        sequence = connection.execute(rest).scalar()
        return False, None if sequence is None else list_decisions(connection, run, sequence - 1, 1)[0]
    return True, _decide(connection, found, step, done)


def _decide(connection: Connection, run: dict[str, Any], step: int, now: int) -> Stored | None:
    versions = [v for v in list_schedules(connection, run["name"]) if begins(v) <= step]
    settings = parse_schedule(versions[-1]["document"]).grows if versions else None
    if settings is None:
        return None
    available = catalogue.steps_of(connection, run["trajectory"]) if run["trajectory"] else list(settings.teachers)
    last = list_decisions(connection, run["name"], run["decisions"] - 2, 1)
    start = begins(last[0]) if last else 0
    # The reports after the last decision's beginning, and the last one before it.
    before = select(func.max(reports.c.step)).where((reports.c.run == run["name"]) & (reports.c.step <= start))
    first = connection.execute(before).scalar()
    found = list_reports(connection, run["name"], -1 if first is None else first - 1)
    measured = [Report(r["step"], r["metrics"][settings.metric]) for r in found if settings.metric in r["metrics"]]
    made = [*[None] * (run["decisions"] - len(last)), *map(_as_taken, last)]
    decision = decide(settings, candidates(settings, tuple(available)), measured, made, now)  # type: ignore[arg-type]
    if decision is None:
        return None
    try:
        return add_decision(connection, run["name"], Stored(**asdict(decision), applied=None))[0]  # type: ignore[typeddict-item]
    except Refused as error:  # the checkpoint was flagged since the schedule was set: the run stays where it is, and says so
        emit(connection, "decision_refused", run["name"], sequence=decision.sequence, detail=str(error))
        return None


def _as_taken(stored: Stored) -> Decision:
    """As its run took it up."""
    return Decision(**{**{key: value for key, value in stored.items() if key != "applied"}, "effective": begins(stored)})  # type: ignore[arg-type]


def list_reports(connection: Connection, run: str, after: int = -1, limit: int = 1 << 30) -> list[dict[str, Any]]:
    """Those of later steps, in order."""
    query = select(reports).where((reports.c.run == run) & (reports.c.step > after)).order_by(reports.c.step).limit(limit)
    return [{"step": r.step, "metrics": json.loads(r.metrics), "created": r.created} for r in connection.execute(query)]


# ----------------------------------------------------------------------------------------------------------- assignments


def assignment(connection: Connection, run: str) -> dict[str, Any]:
    """{"version", "endpoints"}: where a run's students find their teacher; one row, whatever the history."""
    row = connection.execute(_ASSIGNMENT, {"run": run}).first()
    if row is None:
        raise NotFound(f"run: there is none called {run}")
    return {"version": row.assignment_version, "endpoints": json.loads(row.endpoints)}


def reassign(connection: Connection, group: str) -> None:
    """Bring the lists of a group's runs up to its live replicas; a list that changes gets the next version.

    Each run has the replicas in an order of its own (by sha256 of run and endpoint), so that runs do not all begin with the same.
    """
    query = select(replicas.c.endpoint).where((replicas.c.group == group) & (replicas.c.state == "live"))
    live = list(connection.execute(query).scalars())
    mine = select(runs.c.name, runs.c.assignment_version, runs.c.endpoints).where(runs.c.group == group)
    for name, version, before in connection.execute(mine).all():
        endpoints = sorted(live, key=lambda endpoint: hashlib.sha256(f"{name}\n{endpoint}".encode()).digest())
        if canonical(endpoints) != before:
            values = {"assignment_version": version + 1, "endpoints": canonical(endpoints)}
            connection.execute(update(runs).where(runs.c.name == name).values(values))
            emit(connection, "assignment", name, version=version + 1, endpoints=endpoints)
