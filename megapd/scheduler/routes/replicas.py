"""Routes of the replicas' leases."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Response

from megapd.scheduler import api
from megapd.scheduler.routes.common import READ, RUN, Serving, made
from megapd.scheduler.service import CanonicalJSON, Lease, LeaseTable

routes = APIRouter(prefix="/v1/replicas", tags=["replicas"])


@routes.post("/{id}/beat", response_model=api.BeatAnswer, dependencies=[RUN])
async def beat(service: Serving, id: api.NamePath, body: api.Beat) -> Response:
    """Renew the lease; three times in its length is a good pace. 404: it was dropped, register again."""
    lease = service.leases.heartbeat(id, body.figures)
    return CanonicalJSON({"state": lease.state, "lease_seconds": service.leases.seconds})


@routes.get("", response_model=list[api.LeaseAnswer], dependencies=[READ])
async def list_replicas(service: Serving) -> Response:
    """Those with a lease."""
    return CanonicalJSON([_shown(service.leases, lease) for lease in service.leases.held()])


@routes.put("/{id}", response_model=api.BeatAnswer, dependencies=[RUN])
async def register_replica(service: Serving, id: api.NamePath, body: api.NewReplica) -> Response:
    """Take a lease. The id is the process's own, so that a repeat is known for one. 201: it is new, or was dropped."""
    new = await asyncio.wrap_future(service.leases.register(id, body.group, body.endpoint, body.facts))
    return made({"state": "live", "lease_seconds": service.leases.seconds}, new)


@routes.post("/{id}/drain", status_code=204, dependencies=[RUN])
async def drain(service: Serving, id: api.NamePath) -> Response:
    """Send students elsewhere."""
    await asyncio.wrap_future(service.leases.drain(id))
    return Response(status_code=204)


@routes.delete("/{id}", status_code=204, dependencies=[RUN])
async def leave(service: Serving, id: api.NamePath) -> Response:
    """Give the lease back."""
    await asyncio.wrap_future(service.leases.leave(id))
    return Response(status_code=204)


def _shown(leases: LeaseTable, lease: Lease) -> dict[str, Any]:
    told = {"id": lease.id, "group": lease.group, "endpoint": lease.endpoint, "state": lease.state}
    return {**told, "age": leases.age(lease), "figures": lease.metrics, "lease_seconds": leases.seconds}
