"""Routes of trajectories, checkpoints and names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Response
from sqlalchemy import Connection

from megapd.scheduler import api
from megapd.scheduler.service.access import Needs
from megapd.scheduler.service.hub import Answer, Service
from megapd.scheduler.store import tokens as journal
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.tables import DIGEST


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    read, run = (Depends(Needs(role)) for role in journal.ROLES[:2])
    admin = Needs("admin")

    # ------------------------------------------------------------------------------------------------------ trajectories

    @routes.get("/trajectories", response_model=list[api.TrajectoryAnswer], tags=["trajectories"], dependencies=[read])
    async def list_trajectories(after: api.AfterName = "", limit: api.Limit = 100) -> Response:
        """In the order of their digests."""
        return Answer(await service.read(lambda connection: catalogue.list_trajectories(connection, after, limit)))

    @routes.post("/trajectories", response_model=api.TrajectoryAnswer, tags=["trajectories"], dependencies=[run])
    async def add_trajectory(body: api.NewTrajectory) -> Response:
        """201: it is new; 200: it was there."""

        def write(connection: Connection) -> tuple[dict[str, Any], bool]:
            found, new = catalogue.add_trajectory(connection, body.run, body.location, body.vocabulary)
            if body.name is not None:
                catalogue.set_name(connection, _no_digest(body.name), found["digest"])
            return found, new

        found, new = await service.write(write)
        return Answer(found, 201 if new else 200)

    @routes.get("/trajectories/{reference}", response_model=api.TrajectoryAnswer, tags=["trajectories"], dependencies=[read])
    async def find_trajectory(reference: api.NamePath) -> Response:
        """reference: digest or name."""
        return Answer(await service.look(lambda connection: catalogue.find_trajectory(connection, reference)))

    @routes.get(
        "/trajectories/{reference}/checkpoints",
        response_model=list[api.CheckpointAnswer],
        tags=["trajectories"],
        dependencies=[read],
    )
    async def list_checkpoints(reference: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 100) -> Response:
        """In the order of their steps, those after one."""

        def find(connection: Connection) -> list[dict[str, Any]]:
            digest = catalogue.find_trajectory(connection, reference)["digest"]
            return catalogue.list_checkpoints(connection, digest, after, limit)

        return Answer(await service.read(find))

    @routes.post(
        "/trajectories/{reference}/checkpoints", response_model=api.CheckpointAnswer, tags=["trajectories"], dependencies=[run]
    )
    async def add_checkpoint(reference: api.NamePath, body: api.NewCheckpoint) -> Response:
        """201: it is new; 200: it was there; 409: the trajectory has another one of that step."""
        record = body.model_dump(mode="json")
        record["bytes"] = sum(file.bytes for file in body.files.values())

        def write(connection: Connection) -> tuple[dict[str, Any], bool]:
            digest = catalogue.find_trajectory(connection, reference)["digest"]
            return catalogue.add_checkpoint(connection, digest, record)

        found, new = await service.write(write)
        return Answer(found, 201 if new else 200)

    @routes.put(
        "/trajectories/{reference}/flags", response_model=list[api.CheckpointAnswer], tags=["trajectories"], dependencies=[run]
    )
    async def set_flags(reference: api.NamePath, body: api.Findings) -> Response:
        """What `verify` found, instead of what it found before. Returns the flagged checkpoints."""
        found = {int(step): {str(kind): detail for kind, detail in kinds.items()} for step, kinds in body.flags.items()}

        def write(connection: Connection) -> list[dict[str, Any]]:
            return catalogue.set_flags(connection, catalogue.find_trajectory(connection, reference)["digest"], found)

        return Answer(await service.write(write))

    # ------------------------------------------------------------------------------------------------------- checkpoints

    @routes.get("/checkpoints/{reference}", response_model=api.CheckpointAnswer, tags=["checkpoints"], dependencies=[read])
    async def find_checkpoint(reference: api.NamePath) -> Response:
        """reference: digest or name."""
        return Answer(await service.look(lambda connection: catalogue.find_checkpoint(connection, reference)))

    @routes.post("/checkpoints/{digest}/accept", response_model=api.CheckpointAnswer, tags=["checkpoints"])
    async def accept(digest: api.DigestPath, author: str = Depends(admin)) -> Response:
        """Let it be scheduled though it is flagged."""
        return Answer(await service.write(lambda connection: catalogue.accept(connection, digest, author)))

    # ------------------------------------------------------------------------------------------------------------- names

    @routes.get("/names", response_model=list[api.NameAnswer], tags=["names"], dependencies=[read])
    async def list_names(after: api.AfterName = "", limit: api.Limit = 100) -> Response:
        return Answer(await service.read(lambda connection: catalogue.list_names(connection, after, limit)))

    @routes.put("/names/{name}", response_model=api.NameAnswer, tags=["names"], dependencies=[Depends(admin)])
    async def set_name(name: api.NamePath, body: api.NewName) -> Response:
        """Point a name to a trajectory or checkpoint."""
        _no_digest(name)
        return Answer(await service.write(lambda connection: catalogue.set_name(connection, name, body.digest, body.expected)))

    return routes


def _no_digest(name: str) -> str:
    import re

    if re.fullmatch(DIGEST, name):
        raise HTTPException(422, "name: it looks like a digest; choose another")
    return name
