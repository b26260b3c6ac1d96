"""The application: routes, page, errors, guard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from megapd import __version__
from megapd.errors import UserError
from megapd.scheduler import dashboard, routes
from megapd.scheduler.api import Problem
from megapd.scheduler.service import Guard, Service, problem, unavailable
from megapd.scheduler.store import Conflict, NotFound, Unavailable


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


def _told(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    """A handler that answers what the error says."""

    async def answer(_: Request, error: Exception) -> Response:
        return problem(status, str(error), getattr(error, "current", None))

    return answer


async def _unavailable(_: Request, error: Exception) -> Response:
    return unavailable(error)


async def _invalid(_: Request, error: Exception) -> Response:
    # Without what was sent, which the default answer repeats: it may be long, or no JSON (NaN).
    assert isinstance(error, RequestValidationError)
    told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
    return problem(422, "; ".join(told)[:2000])


async def _other(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), **(error.headers or {}))


_HANDLERS: dict[Any, Any] = {
    NotFound: _told(404),
    Conflict: _told(409),
    UserError: _told(422),
    Unavailable: _unavailable,
    RequestValidationError: _invalid,
    HTTPException: _other,
}
