"""Routes of the service itself: health, metrics, tokens, events, and the replicas' leases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from megapd import __version__
from megapd.scheduler import api
from megapd.scheduler.service.access import Needs
from megapd.scheduler.service.hub import Answer, Service
from megapd.scheduler.service.leases import Lease
from megapd.scheduler.store import events as journal
from megapd.scheduler.store import tokens as tokens_module
from megapd.scheduler.store.tables import canonical

KEEP_ALIVE_SECONDS = 15.0  # an event stream says something this often, so that neither side waits at a connection that is dead


FOREIGN_SECONDS = 2.0  # between looks for events that another process wrote


PACE_SECONDS = 0.1  # between two looks of one stream, however often something is written


PAGE = 500


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    read, run, admin = (Depends(Needs(role)) for role in tokens_module.ROLES)
    leases = service.leases

    # Routes are tried in order, so what is asked most comes first.
    @routes.post("/v1/replicas/{id}/beat", response_model=api.BeatAnswer, tags=["replicas"], dependencies=[run])
    async def beat(id: api.NamePath, body: api.Beat) -> Response:
        """Renew the lease; three times in its length is a good pace. 404: it was dropped, register again."""
        lease = leases.beat(id, body.figures)
        return Answer({"state": lease.state, "lease_seconds": leases.seconds})

    def shown(lease: Lease) -> dict[str, Any]:
        told = {"id": lease.id, "group": lease.group, "endpoint": lease.endpoint, "state": lease.state}
        return {**told, "age": leases.age(lease), "figures": lease.figures, "lease_seconds": leases.seconds}

    @routes.get("/v1/replicas", response_model=list[api.LeaseAnswer], tags=["replicas"], dependencies=[read])
    async def list_replicas() -> Response:
        """Those with a lease."""
        return Answer([shown(lease) for lease in leases.held()])

    @routes.put("/v1/replicas/{id}", response_model=api.BeatAnswer, tags=["replicas"], dependencies=[run])
    async def register_replica(id: api.NamePath, body: api.NewReplica) -> Response:
        """Take a lease. The id is the process's own, so that a repeat is known for one. 201: it is new, or was dropped."""
        new = await asyncio.wrap_future(leases.register(id, body.group, body.endpoint, body.facts))
        return Answer({"state": "live", "lease_seconds": leases.seconds}, 201 if new else 200)

    @routes.post("/v1/replicas/{id}/drain", status_code=204, tags=["replicas"], dependencies=[run])
    async def drain(id: api.NamePath) -> Response:
        """Send students elsewhere."""
        await asyncio.wrap_future(leases.drain(id))
        return Response(status_code=204)

    @routes.delete("/v1/replicas/{id}", status_code=204, tags=["replicas"], dependencies=[run])
    async def leave(id: api.NamePath) -> Response:
        """Give the lease back."""
        await asyncio.wrap_future(leases.leave(id))
        return Response(status_code=204)

    @routes.get("/health", response_model=api.HealthAnswer, tags=["service"])
    async def health() -> Response:
        """200 when the database answers. For everybody."""
        await service.look(lambda connection: tokens_module.find_token(connection, ""))
        return Answer({"status": "ok", "version": __version__})

    @routes.get("/metrics", tags=["service"], dependencies=[read], response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        held = leases.held()
        for state in ("live", "draining"):
            service.figures.replicas.labels(state).set(sum(lease.state == state for lease in held))
        service.figures.oldest.set(max(map(leases.age, held), default=0.0))
        service.figures.streams.set(service.streams)
        return Response(generate_latest(service.figures.registry), media_type=CONTENT_TYPE_LATEST)

    # ------------------------------------------------------------------------------------------------------------ tokens

    @routes.get("/v1/tokens", response_model=list[api.TokenAnswer], tags=["tokens"], dependencies=[admin])
    async def list_tokens() -> Response:
        return Answer(await service.read(tokens_module.list_tokens))

    @routes.post("/v1/tokens", response_model=api.SecretAnswer, status_code=201, tags=["tokens"], dependencies=[admin])
    async def create_token(body: api.NewToken) -> Response:
        """The token is in this answer and nowhere else."""
        token = await service.write(lambda connection: tokens_module.create_token(connection, body.role, body.name))
        service.tokens.forget()
        return Answer({"name": body.name, "role": body.role, "token": token}, 201)

    @routes.delete("/v1/tokens/{name}", status_code=204, tags=["tokens"], dependencies=[admin])
    async def revoke_token(name: api.NamePath) -> Response:
        await service.write(lambda connection: tokens_module.revoke_token(connection, name))
        service.tokens.forget()
        return Response(status_code=204)

    # ------------------------------------------------------------------------------------------------------------ events

    @routes.get("/v1/events", response_model=list[api.EventAnswer], tags=["events"], dependencies=[read])
    async def list_events(
        after: api.AfterNumber = -1, limit: api.Limit = 100, of: Annotated[str | None, Query(pattern=api.NAME)] = None
    ) -> Response:
        """Events with a greater id, in order; `of` one run."""
        return Answer(await service.read(lambda connection: journal.events_after(connection, after, limit, of)))

    @routes.get("/v1/stream", tags=["events"], dependencies=[read], response_class=StreamingResponse)
    async def stream(
        after: Annotated[int | None, Query(ge=-1, lt=api.STEPS)] = None,
        last_event_id: Annotated[str | None, Header(max_length=20)] = None,
    ) -> Response:
        """Events as they happen (text/event-stream): those after Last-Event-ID or `after`, without either from now on.

        An event `reset` says that events between were forgotten: look at everything again.
        """
        if last_event_id is not None and not last_event_id.isdecimal():
            raise HTTPException(422, "header.last-event-id: a number, as the stream gave it")
        if service.streams >= service.settings.streams:
            raise HTTPException(429, f"{service.streams} streams are open, scheduler.streams allows no more; close one")
        oldest, newest = await service.read(journal.span)
        begin = int(last_event_id) if last_event_id is not None else newest if after is None else after
        return StreamingResponse(
            _stream(service, begin, oldest, newest), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    return routes


async def _stream(service: Service, begin: int, oldest: int, newest: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    service.streams += 1
    try:
        last = begin
        yield b"retry: 2000\n\n"
        if begin > newest or (begin >= 0 and begin + 1 < oldest):
            last = min(begin, newest) if begin > newest else oldest - 1
            yield f"id: {max(last, 0)}\nevent: reset\ndata: {{}}\n\n".encode()
        spoke = loop.time()
        while not service.stopping:
            after = last
            found = await service.read(lambda connection: journal.events_after(connection, after, PAGE))  # noqa: B023
            for event in found:
                last, spoke = event["id"], loop.time()
                yield f"id: {last}\nevent: {event['kind']}\ndata: {canonical(event)}\n\n".encode()
            if loop.time() - spoke > KEEP_ALIVE_SECONDS:
                spoke = loop.time()
                yield b": still here\n\n"
            if len(found) < PAGE:
                await service.changed(FOREIGN_SECONDS)
                await asyncio.sleep(PACE_SECONDS)
    finally:
        service.streams -= 1
