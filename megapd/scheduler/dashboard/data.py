"""What the page shows and the API has no single answer for, below /v1/page; for the page alone, so not in the OpenAPI document.

The API tells a run's schedule versions; the page draws which checkpoint taught and will teach when, which takes the policies.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection, func, select

from megapd.errors import UserError
from megapd.schedule.plan import in_force, pieces
from megapd.schedule.policies import candidates
from megapd.scheduler import api
from megapd.scheduler.routes import READ, Serving
from megapd.scheduler.service import CanonicalJSON
from megapd.scheduler.store import Refused, runs
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.events import events_after
from megapd.scheduler.store.tables import decisions, events, reports

SEGMENTS = 400  # of a timeline, on each side of where the run is: more than a screen can show
POINTS = 1000  # of a curve

routes = APIRouter(prefix="/v1/page", include_in_schema=False)


@routes.get("/caller")
async def caller(request: Request, name: Annotated[str, READ]) -> Response:
    """Who the token stands for, and so which controls are of use."""
    return CanonicalJSON({"name": name, "role": request.scope["caller"][1]})


@routes.get("/runs/{name}/timeline", dependencies=[READ])
async def run_timeline(service: Serving, name: api.NamePath) -> Response:
    return CanonicalJSON(await service.read(timeline, name))


@routes.get("/runs/{name}/curve", dependencies=[READ])
async def run_curve(service: Serving, name: api.NamePath) -> Response:
    return CanonicalJSON(await service.read(curve, name))


@routes.get("/trajectories/{reference}/curve", dependencies=[READ])
async def trajectory_curve(
    service: Serving, reference: api.NamePath, after: api.AfterNumber = -1, limit: Annotated[int, Query(ge=1, le=500)] = 500
) -> Response:
    return CanonicalJSON(await service.read(teacher_curve, reference, after, limit))


@routes.get("/events", dependencies=[READ])
async def newest_events(service: Serving, limit: Annotated[int, Query(ge=1, le=500)] = 100) -> Response:
    return CanonicalJSON(await service.read(newest, limit))


def timeline(connection: Connection, run: str) -> dict[str, Any]:
    """{"step", "steps", "segments", "omitted", "expected", "problem"} of a run.

    segments  {"start", "end", "checkpoint", "version", "policy"}: student steps [start, end) are taught by the teacher's step
              `checkpoint`, in order, neighbours differ in checkpoint or version; those nearest to the run's step
    omitted   how many segments and older decisions were left out
    expected  the checkpoints that an adaptive schedule goes on to, when the student is ready
    problem   why there are none, or not all, "" if nothing is wrong
    """
    found = runs.find_run(connection, run)
    told = {"step": found["step"], "steps": found["steps"], "expected": [], "problem": ""}
    segments: list[dict[str, Any]] = []
    made = _decided(connection, run)
    forgotten = found["decisions"] - len(made)
    versions = runs.list_schedules(connection, run)
    for place, start, end in in_force([runs.begins(version) for version in versions], found["steps"]):
        version = versions[place]
        if version["document"]["policy"] == "adaptive" and forgotten:
            start = max(start, made[0][0])
        try:
            parts = list(_pieces(connection, found, version, made, start, end)) if start < end else []
        except (Refused, UserError) as error:
            told["problem"] = str(error)
            continue
        shown = {"version": version["version"], "policy": version["document"]["policy"]}
        segments += [{"start": a, "end": b, "checkpoint": teacher, **shown} for a, b, teacher in parts]
    if segments and segments[-1]["policy"] == "adaptive":
        schedule = runs.parse_schedule(runs.find_schedule(connection, run, segments[-1]["version"])["document"])
        assert schedule.grows is not None
        steps = catalogue.steps_of(connection, found["trajectory"])
        told["expected"] = [step for step in candidates(schedule.grows, steps) if step > segments[-1]["checkpoint"]]
    now = bisect_right([segment["start"] for segment in segments], max(found["step"], 0))
    kept = segments[max(now - SEGMENTS, 0) : now + SEGMENTS]
    return {**told, "segments": kept, "omitted": len(segments) - len(kept) + forgotten}


def _decided(connection: Connection, run: str) -> list[tuple[int, int]]:
    """(student step, teacher step) of the newest decisions, in order; without their evidence, which is long."""
    begin = func.coalesce(decisions.c.applied, decisions.c.effective).label("begin")
    query = select(begin, decisions.c.checkpoint).where(decisions.c.run == run)
    newest_first = connection.execute(query.order_by(decisions.c.sequence.desc()).limit(2 * SEGMENTS))
    return [(row.begin, row.checkpoint) for row in newest_first][::-1]


def _pieces(
    connection: Connection, run: dict[str, Any], version: dict[str, Any], made: list[tuple[int, int]], start: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """(start, end, teacher step) of a version that is in force in [start, end). made: the decisions."""
    plan = runs.resolve(connection, run, runs.parse_schedule(version["document"]))
    rotations = plan.rotations()
    if version["document"]["policy"] == "adaptive":
        rotations = [rotations[0], *made]
    return pieces(rotations, start, end)


def curve(connection: Connection, run: str) -> list[dict[str, Any]]:
    """{"step", "metrics"} of a run's reports, evenly thinned to at most POINTS and the last: the database reads them all, and
    sends these."""
    runs.find_run(connection, run)
    mine = reports.c.run == run
    count = connection.execute(select(func.count()).select_from(reports).where(mine)).scalar() or 0
    every = max(-(-count // POINTS), 1)
    place = func.row_number().over(order_by=reports.c.step).label("place")
    numbered = select(reports.c.step, place).where(mine).subquery()
    wanted = select(numbered.c.step).where((numbered.c.place % every == 0) | (numbered.c.place == count))
    query = select(reports.c.step, reports.c.metrics).where(mine & reports.c.step.in_(wanted)).order_by(reports.c.step)
    return [{"step": row.step, "metrics": json.loads(row.metrics)} for row in connection.execute(query)]


def teacher_curve(connection: Connection, reference: str, after: int, limit: int) -> list[dict[str, Any]]:
    """{"step", "digest", "metrics", "flags"} of checkpoints after a step; metrics: the numbers alone, probe_loss among them."""
    found = []
    for checkpoint in catalogue.list_checkpoints(connection, reference, after, limit):
        metrics = dict(numbers(checkpoint["metrics"]))
        if checkpoint.get("probe_loss") is not None:
            metrics["probe_loss"] = checkpoint["probe_loss"]
        flags = [{key: flag[key] for key in ("kind", "detail", "accepted_by")} for flag in checkpoint["flags"]]
        found.append({"step": checkpoint["step"], "digest": checkpoint["digest"], "metrics": metrics, "flags": flags})
    return found


def numbers(tree: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a tree by their dotted paths."""
    if isinstance(tree, dict):
        for key, below in tree.items():
            yield from numbers(below, f"{at}.{key}" if at else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield at, tree


def newest(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """The last `limit` events, in order."""
    last = connection.execute(select(events.c.id).order_by(events.c.id.desc()).limit(1).offset(limit - 1)).scalar()
    return events_after(connection, -1 if last is None else last - 1, limit)
