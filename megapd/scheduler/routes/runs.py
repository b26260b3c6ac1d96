"""Routes of runs: what they are, their schedules, decisions, reports, and where their students find the teacher."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from megapd.scheduler import api
from megapd.scheduler.routes.common import ADMIN, READ, RUN, Serving, made, needs_admin
from megapd.scheduler.service import CanonicalJSON
from megapd.scheduler.store import runs
from megapd.scheduler.store.control import control

routes = APIRouter(prefix="/v1/runs", tags=["runs"])


@routes.get("/{name}/assignment", response_model=api.AssignmentAnswer, dependencies=[READ])
async def assignment(service: Serving, name: api.NamePath) -> Response:
    """Where the run's students find their teacher; the version grows whenever the list changes."""
    return CanonicalJSON(await service.look(runs.assignment, name))


@routes.get("/{name}/schedule", response_model=api.ScheduleAnswer, dependencies=[READ])
async def schedule(
    service: Serving, name: api.NamePath, version: Annotated[int | None, Query(ge=1, lt=1 << 31)] = None
) -> Response:
    """The newest version, or one."""
    return CanonicalJSON(await service.look(runs.find_schedule, name, version))


@routes.get("", response_model=list[api.RunAnswer], dependencies=[READ])
async def list_runs(service: Serving, after: api.AfterName = "", limit: api.Limit = 100) -> Response:
    """In the order of their names."""
    return CanonicalJSON(await service.read(runs.list_runs, after, limit))


@routes.put("/{name}", response_model=api.RunAnswer, dependencies=[RUN])
async def put_run(service: Serving, name: api.NamePath, body: api.NewRun) -> Response:
    """201: it is new. A run may become longer and change group and facts; 409 for another trajectory."""
    given = {**body.model_dump(), "group": body.group or name}
    return made(*await service.write(runs.put_run, name, **given))


@routes.get("/{name}", response_model=api.RunAnswer, dependencies=[READ])
async def find_run(service: Serving, name: api.NamePath) -> Response:
    return CanonicalJSON(await service.look(runs.find_run, name))


@routes.get("/{name}/schedules", response_model=list[api.ScheduleAnswer], dependencies=[READ])
async def schedules(service: Serving, name: api.NamePath, after: api.AfterNumber = 0, limit: api.Limit = 100) -> Response:
    """The versions in order. Of those that have begun at a student step, the highest is in force there."""
    return CanonicalJSON(await service.read(runs.list_schedules, name, after, limit))


@routes.put("/{name}/schedule", response_model=api.ScheduleAnswer)
async def set_schedule(
    service: Serving, name: api.NamePath, body: api.NewSchedule, request: Request, author: Annotated[str, RUN]
) -> Response:
    """Compare and set. The first version is the run's own (role run); others, and `accept`, need the role admin.

    201: it is new; 200: it is what was set last; 409, with the present version: another one is there than `expected`.
    """
    if body.expected > 0 or body.accept:
        author = await needs_admin(request)
    changes = body.model_dump(exclude={"document"})
    return made(*await service.write(runs.set_schedule, name, body.document, author=author, **changes))


@routes.post("/{name}/control", response_model=api.ScheduleAnswer)
async def control_run(service: Serving, name: api.NamePath, body: api.Control, author: Annotated[str, ADMIN]) -> Response:
    """pause: what teaches goes on teaching; advance: the next rotation now; pin: one checkpoint; resume: the schedule before.

    Each sets a new version of the schedule, which begins at the student step `effective`.
    """
    return made(*await service.write(control, name, author=author, **body.model_dump()))


@routes.post("/{name}/schedules/{version}/applied", response_model=api.ScheduleAnswer, dependencies=[RUN])
async def applied(service: Serving, name: api.NamePath, version: int, body: api.Applied) -> Response:
    """All ranks took the version up at that student step. Said before the first of them does."""
    if not 1 <= version < 1 << 31:
        raise HTTPException(422, "version: from 1 on")
    return CanonicalJSON(await service.write(runs.apply_schedule, name, version, body.step))


@routes.get("/{name}/decisions", response_model=list[api.DecisionAnswer], dependencies=[READ])
async def decisions(service: Serving, name: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 100) -> Response:
    """In order, those with a greater number."""
    await service.look(runs.find_run, name)
    return CanonicalJSON(await service.read(runs.list_decisions, name, after, limit))


@routes.post("/{name}/decisions", response_model=api.DecisionAnswer, dependencies=[RUN])
async def add_decision(service: Serving, name: api.NamePath, body: api.NewDecision) -> Response:
    """Append. 201: it is new; 200: it was there, the same; 409: that number is taken, or not the next."""
    decision = runs.Stored(**body.model_dump(), applied=None)  # type: ignore[typeddict-item]
    return made(*await service.write(runs.add_decision, name, decision))


@routes.post("/{name}/decisions/{sequence}/applied", response_model=api.DecisionAnswer, dependencies=[RUN])
async def decision_applied(service: Serving, name: api.NamePath, sequence: int, body: api.Applied) -> Response:
    """All ranks take the decision up at that student step, later than it says, having learned of it too late."""
    if not 0 <= sequence < 1 << 31:
        raise HTTPException(422, "sequence: from 0 on")
    return CanonicalJSON(await service.write(runs.apply_decision, name, sequence, body.step))


@routes.get("/{name}/reports", response_model=list[api.ReportAnswer], dependencies=[READ])
async def reports(service: Serving, name: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 1000) -> Response:
    """In order, those of later steps."""
    await service.look(runs.find_run, name)
    return CanonicalJSON(await service.read(runs.list_reports, name, after, limit))


@routes.post("/{name}/reports", response_model=api.ReportedAnswer, dependencies=[RUN])
async def add_report(service: Serving, name: api.NamePath, body: api.Report) -> Response:
    """What the run measured when it had done `step` steps; of an adaptive schedule, the decision that this led to.

    A step that is on record, or before one that is, changes nothing.
    """
    new, decision = await service.write(runs.add_report, name, body.step, body.metrics, body.now)
    return made({"new": new, "decision": decision}, new)
