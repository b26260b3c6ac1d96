"""Routes of trajectories, checkpoints and names."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Response

from megapd.scheduler import api
from megapd.scheduler.routes.common import ADMIN, READ, RUN, Serving, made
from megapd.scheduler.service import CanonicalJSON
from megapd.scheduler.store import trajectories as catalogue

trajectories = APIRouter(prefix="/v1/trajectories", tags=["trajectories"])
checkpoints = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])
names = APIRouter(prefix="/v1/names", tags=["names"])
ROUTERS = (trajectories, checkpoints, names)


@trajectories.get("", response_model=list[api.TrajectoryAnswer], dependencies=[READ])
async def list_trajectories(service: Serving, after: api.AfterName = "", limit: api.Limit = 100) -> Response:
    """In the order of their digests."""
    return CanonicalJSON(await service.read(catalogue.list_trajectories, after, limit))


@trajectories.post("", response_model=api.TrajectoryAnswer, dependencies=[RUN])
async def add_trajectory(service: Serving, body: api.NewTrajectory) -> Response:
    """201: it is new; 200: it was there."""
    return made(*await service.write(catalogue.add_trajectory, **body.model_dump()))


@trajectories.get("/{reference}", response_model=api.TrajectoryAnswer, dependencies=[READ])
async def find_trajectory(service: Serving, reference: api.NamePath) -> Response:
    """reference: digest or name."""
    return CanonicalJSON(await service.look(catalogue.find_trajectory, reference))


@trajectories.get("/{reference}/checkpoints", response_model=list[api.CheckpointAnswer], dependencies=[READ])
async def list_checkpoints(
    service: Serving, reference: api.NamePath, after: api.AfterNumber = -1, limit: api.Limit = 100
) -> Response:
    """In the order of their steps, those after one."""
    return CanonicalJSON(await service.read(catalogue.list_checkpoints, reference, after, limit))


@trajectories.post("/{reference}/checkpoints", response_model=api.CheckpointAnswer, dependencies=[RUN])
async def add_checkpoint(service: Serving, reference: api.NamePath, body: api.NewCheckpoint) -> Response:
    """201: it is new; 200: it was there; 409: the trajectory has another one of that step."""
    record = body.model_dump(mode="json")
    record["bytes"] = sum(file.bytes for file in body.files.values())
    return made(*await service.write(catalogue.add_checkpoint, reference, record))


@trajectories.put("/{reference}/flags", response_model=list[api.CheckpointAnswer], dependencies=[RUN])
async def set_flags(service: Serving, reference: api.NamePath, body: api.Findings) -> Response:
    """What `verify` found, instead of what it found before. Returns the flagged checkpoints."""
    found = {int(step): {str(kind): detail for kind, detail in kinds.items()} for step, kinds in body.flags.items()}
    return CanonicalJSON(await service.write(catalogue.set_flags, reference, found))


@checkpoints.get("/{reference}", response_model=api.CheckpointAnswer, dependencies=[READ])
async def find_checkpoint(service: Serving, reference: api.NamePath) -> Response:
    """reference: digest or name."""
    return CanonicalJSON(await service.look(catalogue.find_checkpoint, reference))


@checkpoints.post("/{digest}/accept", response_model=api.CheckpointAnswer)
async def accept(service: Serving, digest: api.DigestPath, author: Annotated[str, ADMIN]) -> Response:
    """Let it be scheduled though it is flagged."""
    return CanonicalJSON(await service.write(catalogue.accept, digest, author))


@names.get("", response_model=list[api.NameAnswer], dependencies=[READ])
async def list_names(service: Serving, after: api.AfterName = "", limit: api.Limit = 100) -> Response:
    return CanonicalJSON(await service.read(catalogue.list_names, after, limit))


@names.put("/{name}", response_model=api.NameAnswer, dependencies=[ADMIN])
async def set_name(service: Serving, name: api.NamePath, body: api.NewName) -> Response:
    """Point a name to a trajectory or checkpoint."""
    return CanonicalJSON(await service.write(catalogue.set_name, name, body.digest, body.expected))
