"""Routes of runs: what they are, their schedules, decisions, reports, and where their students find the teacher."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from sqlalchemy import Connection

from megapd.scheduler import api
from megapd.scheduler.service.access import Needs
from megapd.scheduler.service.hub import Answer, Service
from megapd.scheduler.store import runs
from megapd.scheduler.store.control import control


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/runs", tags=["runs"])
    needs_run, admin = Needs("run"), Needs("admin")
    read, run = Depends(Needs("read")), Depends(needs_run)

    @routes.get("/{name}/assignment", response_model=api.AssignmentAnswer, dependencies=[read])
    async def assignment(name: api.NamePath) -> Response:
        """Where the run's students find their teacher; the version grows whenever the list changes."""
        return Answer(await service.look(lambda connection: runs.assignment(connection, name)))

    @routes.get("/{name}/schedule", response_model=api.ScheduleAnswer, dependencies=[read])
    async def schedule(name: api.NamePath, version: Annotated[int | None, Query(ge=1, lt=1 << 31)] = None) -> Response:
        """The newest version, or one."""
        return Answer(await service.look(lambda connection: runs.find_schedule(connection, name, version)))

    @routes.get("", response_model=list[api.RunAnswer], dependencies=[read])
    async def list_runs(after: api.AfterName = "", limit: api.Limit = 100) -> Response:
        """In the order of their names."""
        return Answer(await service.read(lambda connection: runs.list_runs(connection, after, limit)))

    @routes.put("/{name}", response_model=api.RunAnswer, dependencies=[run])
    async def put_run(name: api.NamePath, body: api.NewRun) -> Response:
        """201: it is new. A run may become longer and change group and facts; 409 for another trajectory."""

        def write(connection: Connection) -> tuple[dict[str, Any], bool]:
            return runs.put_run(
                connection, name, trajectory=body.trajectory, group=body.group or name, steps=body.steps, facts=body.facts
            )

        found, new = await service.write(write)
        return Answer(found, 201 if new else 200)

    @routes.get("/{name}", response_model=api.RunAnswer, dependencies=[read])
    async def find_run(name: api.NamePath) -> Response:
        return Answer(await service.look(lambda connection: runs.find_run(connection, name)))

    # --------------------------------------------------------------------------------------------------------- schedules

    @routes.get("/{name}/schedules", response_model=list[api.ScheduleAnswer], dependencies=[read])
    async def schedules(name: api.NamePath, after: api.AfterNumber = 0, limit: api.Limit = 100) -> Response:
        """The versions in order. Of those that have begun at a student step, the highest is in force there."""
        return Answer(await service.read(lambda connection: runs.list_schedules(connection, name, after, limit)))

    @routes.put("/{name}/schedule", response_model=api.ScheduleAnswer)
    async def set_schedule(name: api.NamePath, body: api.NewSchedule, request: Request, author: str = run) -> Response:
        """Compare and set. The first version is the run's own (role run); others, and `accept`, need the role admin.

        201: it is new; 200: it is what was set last; 409, with the present version: another one is there than `expected`.
        """
        if body.expected > 0 or body.accept:
            author = await admin(request)

        def write(connection: Connection) -> tuple[dict[str, Any], bool]:
            changes = body.model_dump(exclude={"document"})
            return runs.set_schedule(connection, name, body.document, author=author, **changes)

        found, new = await service.write(write)
        return Answer(found, 201 if new else 200)

    @routes.post("/{name}/control", response_model=api.ScheduleAnswer)
    async def control_run(name: api.NamePath, body: api.Control, author: str = Depends(admin)) -> Response:
        """pause: what teaches goes on teaching; advance: the next rotation now; pin: one checkpoint; resume: the schedule before.

        Each sets a new version of the schedule, which begins at the student step `effective`.
        """

        def write(connection: Connection) -> tuple[dict[str, Any], bool]:
            return control(connection, name, author=author, **body.model_dump())

        found, new = await service.write(write)
        return Answer(found, 201 if new else 200)

    @routes.post("/{name}/schedules/{version}/applied", response_model=api.ScheduleAnswer, dependencies=[run])
    async def applied(name: api.NamePath, version: int, body: api.Applied) -> Response:
        """All ranks took the version up at that student step. Said before the first of them does."""
        if not 1 <= version < 1 << 31:
            raise HTTPException(422, "version: from 1 on")
        return Answer(await service.write(lambda connection: runs.apply_schedule(connection, name, version, body.step)))

    # --------------------------------------------------------------------------------------------- decisions and reports

    @routes.get("/{name}/decisions", response_model=list[api.DecisionAnswer], dependencies=[read])
    async def decisions(name: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 100) -> Response:
        """In order, those with a greater number."""

        def find(connection: Connection) -> list[runs.Stored]:
            runs.find_run(connection, name)
            return runs.list_decisions(connection, name, after, limit)

        return Answer(await service.read(find))

    @routes.post("/{name}/decisions", response_model=api.DecisionAnswer, dependencies=[run])
    async def add_decision(name: api.NamePath, body: api.NewDecision) -> Response:
        """Append. 201: it is new; 200: it was there, the same; 409: that number is taken, or not the next."""
        decision = runs.Stored(**body.model_dump(), applied=None)  # type: ignore[typeddict-item]
        found, new = await service.write(lambda connection: runs.add_decision(connection, name, decision))
        return Answer(found, 201 if new else 200)

    @routes.post("/{name}/decisions/{sequence}/applied", response_model=api.DecisionAnswer, dependencies=[run])
    async def decision_applied(name: api.NamePath, sequence: int, body: api.Applied) -> Response:
        """All ranks take the decision up at that student step, later than it says, having learned of it too late."""
        if not 0 <= sequence < 1 << 31:
            raise HTTPException(422, "sequence: from 0 on")
        return Answer(await service.write(lambda connection: runs.apply_decision(connection, name, sequence, body.step)))

    @routes.get("/{name}/reports", response_model=list[api.ReportAnswer], dependencies=[read])
    async def reports(name: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 1000) -> Response:
        """In order, those of later steps."""

        def find(connection: Connection) -> list[dict[str, Any]]:
            runs.find_run(connection, name)
            return runs.list_reports(connection, name, after, limit)

        return Answer(await service.read(find))

    @routes.post("/{name}/reports", response_model=api.ReportedAnswer, dependencies=[run])
    async def add_report(name: api.NamePath, body: api.Report) -> Response:
        """What the run measured when it had done `step` steps; of an adaptive schedule, the decision that this led to.

        A step that is on record, or before one that is, changes nothing.
        """

        def write(connection: Connection) -> tuple[bool, runs.Stored | None]:
            return runs.add_report(connection, name, body.step, body.metrics, body.now)

        new, decision = await service.write(write)
        return Answer({"new": new, "decision": decision}, 201 if new else 200)

    return routes
