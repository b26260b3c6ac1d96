"""The web page: mounted on the service at /, where nothing needs a token; its data comes from /v1, which does."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse


def dashboard(app: FastAPI) -> None:
    """Add the page's routes to the service's application."""

    @app.get("/", include_in_schema=False)
    async def index() -> PlainTextResponse:
        return PlainTextResponse("megapd scheduler; the API's description is /openapi.json\n")
