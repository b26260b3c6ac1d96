"""The application: routes, page, errors, guard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from megapd import __version__
from megapd.errors import UserError
from megapd.scheduler import dashboard, routes
from megapd.scheduler.api import Problem
from megapd.scheduler.service import CanonicalJSON, Guard, Service
from megapd.scheduler.store import Conflict, NotFound, Refused, Unavailable


def build_app(service: Service) -> FastAPI:
    """The application; its lifespan runs the leases."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="megapd scheduler",
        version=__version__,
        summary="Which teacher checkpoint teaches which run, when",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses={code: {"model": Problem} for code in (400, 401, 403, 404, 408, 409, 413, 421, 422, 429, 503)},
        exception_handlers=_HANDLERS,
    )
    app.state.service = service
    for router in (*routes.ROUTERS, *dashboard.ROUTERS):
        app.include_router(router)
    app.add_middleware(Guard, service=service)
    return app


def _problem(status: int, detail: str, current: Any = None, **headers: str) -> CanonicalJSON:
    body = {"detail": detail} if current is None else {"detail": detail, "current": current}
    return CanonicalJSON(body, status, headers=headers)


async def _not_found(_: Request, error: Exception) -> Response:
    return _problem(404, str(error))


async def _conflict(_: Request, error: Exception) -> Response:
    return _problem(409, str(error), getattr(error, "current", None))


async def _refused(_: Request, error: Exception) -> Response:
    return _problem(422, str(error))


async def _unavailable(_: Request, error: Exception) -> Response:
    return _problem(503, f"the database does not answer: {error}", **{"Retry-After": "2"})


async def _invalid(_: Request, error: Exception) -> Response:
    # Without what was sent, which the default answer repeats: it may be long, or no JSON (NaN).
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
    return _problem(422, "; ".join(told)[:2000])


async def _other(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, str(error.detail), **(error.headers or {}))


_HANDLERS: dict[Any, Any] = {
    NotFound: _not_found,
    Conflict: _conflict,
    Refused: _refused,
    UserError: _refused,
    Unavailable: _unavailable,
    RequestValidationError: _invalid,
    HTTPException: _other,
}
