"""Routes of the service itself: health, metrics, tokens, events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from megapd import __version__
from megapd.scheduler import api
from megapd.scheduler.routes.common import ADMIN, READ, Serving
from megapd.scheduler.service import CanonicalJSON, Service
from megapd.scheduler.store import canonical, events, tokens

KEEP_ALIVE_SECONDS = 15.0  # an event stream says something this often, so that neither side waits at a connection that is dead
FOREIGN_SECONDS = 2.0  # between looks for events that another process wrote
PACE_SECONDS = 0.1  # between two looks of one stream, however often something is written
PAGE = 500

routes = APIRouter()


@routes.get("/health", response_model=api.HealthAnswer, tags=["service"])
async def health(service: Serving) -> Response:
    """200 when the database answers. For everybody."""
    await service.look(tokens.find_token, "")
    return CanonicalJSON({"status": "ok", "version": __version__})


@routes.get("/metrics", tags=["service"], dependencies=[READ], response_class=Response)
async def metrics(service: Serving) -> Response:
    """For Prometheus."""
    held, metrics = service.leases.held(), service.metrics
    for state in ("live", "draining"):
        metrics.replicas.labels(state).set(sum(lease.state == state for lease in held))
    metrics.oldest.set(max(map(service.leases.age, held), default=0.0))
    metrics.streams.set(service.streams)
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/tokens", response_model=list[api.TokenAnswer], tags=["tokens"], dependencies=[ADMIN])
async def list_tokens(service: Serving) -> Response:
    return CanonicalJSON(await service.read(tokens.list_tokens))


@routes.post("/v1/tokens", response_model=api.SecretAnswer, status_code=201, tags=["tokens"], dependencies=[ADMIN])
async def create_token(service: Serving, body: api.NewToken) -> Response:
    """The token is in this answer and nowhere else."""
    token = await service.write(tokens.create_token, body.role, body.name)
    service.authenticator.forget()
    return CanonicalJSON({"name": body.name, "role": body.role, "token": token}, 201)


@routes.delete("/v1/tokens/{name}", status_code=204, tags=["tokens"], dependencies=[ADMIN])
async def revoke_token(service: Serving, name: api.NamePath) -> Response:
    await service.write(tokens.revoke_token, name)
    service.authenticator.forget()
    return Response(status_code=204)


@routes.get("/v1/events", response_model=list[api.EventAnswer], tags=["events"], dependencies=[READ])
async def list_events(
    service: Serving,
    after: api.AfterNumber = -1,
    limit: api.Limit = 100,
    of: Annotated[str | None, Query(pattern=api.NAME)] = None,
) -> Response:
    """Events with a greater id, in order; `of` one run."""
    return CanonicalJSON(await service.read(events.events_after, after, limit, of))


@routes.get("/v1/stream", tags=["events"], dependencies=[READ], response_class=StreamingResponse)
async def stream(
    service: Serving,
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
    oldest, newest = await service.read(events.span)
    begin = int(last_event_id) if last_event_id is not None else newest if after is None else after
    return StreamingResponse(
        _stream(service, begin, oldest, newest), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


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
            found = await service.read(events.events_after, last, PAGE)
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
