"""the application: routes, page, errors, guard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from megapd import __version__
from megapd.errors import UserError
from megapd.scheduler.api import Problem
from megapd.scheduler.dashboard import dashboard
from megapd.scheduler.routes import runs as routes_runs
from megapd.scheduler.routes import service as routes_service
from megapd.scheduler.routes import trajectories as routes_catalogue
from megapd.scheduler.service.guard import Guard
from megapd.scheduler.service.hub import Answer, Service
from megapd.scheduler.service.lanes import Lanes
from megapd.scheduler.store.database import Conflict, NotFound, Refused, Unavailable


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
    )
    app.state.service = service
    for module in (routes_service, routes_runs, routes_catalogue):  # matched in this order: what is asked most stands first
        app.include_router(module.router(service))
    dashboard(app)
    _handle_errors(app)
    app.add_middleware(
        Guard,
        tokens=service.tokens,
        figures=service.figures,
        lanes=Lanes(service),
        max_body_bytes=service.settings.max_body_bytes,
    )
    return app


def _handle_errors(app: FastAPI) -> None:
    def problem(status: int, detail: str, current: Any = None, **headers: str) -> Answer:
        body = {"detail": detail} if current is None else {"detail": detail, "current": current}
        return Answer(body, status, headers=headers)

    @app.exception_handler(NotFound)
    async def not_found(_: Request, error: Exception) -> Response:
        return problem(404, str(error))

    @app.exception_handler(Conflict)
    async def conflict(_: Request, error: Exception) -> Response:
        return problem(409, str(error), getattr(error, "current", None))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Exception) -> Response:
        return problem(422, str(error))

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: Exception) -> Response:
        return problem(422, str(error))

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Exception) -> Response:
        return problem(503, f"the database does not answer: {error}", **{"Retry-After": "2"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Exception) -> Response:
        # Without what was sent, which the default answer repeats: it may be long, or no JSON (NaN).
        assert isinstance(error, RequestValidationError)
        told = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()[:5]]
        return problem(422, "; ".join(told)[:2000])

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem(error.status_code, str(error.detail), **(error.headers or {}))
