"""The page's files: plain HTML, CSS and JavaScript modules in static/; Plotly's script comes from the installed package plotly.

Nothing is loaded from another host, and the content security policy lets no browser do it: no inline script or style, no other
origin.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.metadata
import importlib.util
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, HTTPException, Request, Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
}

_YEAR = "public, max-age=31536000, immutable"  # for a file that has its version in its name

routes = APIRouter(include_in_schema=False)


class Asset(NamedTuple):
    """A file as it is sent; packed: with gzip."""

    body: bytes
    packed: bytes
    kind: str
    tag: str


@cache
def assets() -> dict[str, Asset]:
    """The page's files by name. A request names one of these, never a path."""
    folder = files("megapd.scheduler.dashboard") / "static"
    found = {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in _TYPES}
    found["page.html"] = found["page.html"].replace(b"{{plotly}}", plotly_version().encode())
    return {name: _asset(name, body) for name, body in found.items()}


def plotly_version() -> str:
    """Of the installed package, "none" without it."""
    try:
        return importlib.metadata.version("plotly")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def plotly(version: str) -> Asset | None:
    """Plotly's script, if that version is installed. Found without importing the package, which takes a second."""
    spec = importlib.util.find_spec("plotly") if version == plotly_version() != "none" else None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return _asset(path.name, path.read_bytes())
    return None


def _asset(name: str, body: bytes) -> Asset:
    tag = hashlib.sha256(body).hexdigest()[:32]
    return Asset(body, gzip.compress(body, 6, mtime=0), _TYPES[Path(name).suffix], tag)


def _send(request: Request, asset: Asset, caching: str) -> Response:
    packed = "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{asset.tag}{"-gz" if packed else ""}"'
    headers = {**HEADERS, "Cache-Control": caching, "ETag": tag, "Vary": "Accept-Encoding"}
    if tag in [given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    if packed:
        headers["Content-Encoding"] = "gzip"
    return Response(asset.packed if packed else asset.body, media_type=asset.kind, headers=headers)


@routes.get("/")
async def index(request: Request) -> Response:
    return _send(request, assets()["page.html"], "no-cache")


@routes.get("/page/plotly-{version}.min.js")
async def charts(version: str, request: Request) -> Response:
    found = await asyncio.to_thread(plotly, version)  # 5 MB to pack, at the first request
    if found is None:
        raise HTTPException(404, "the package plotly is not installed beside the service; the page goes without its charts")
    return _send(request, found, _YEAR)


@routes.get("/page/{name}")
async def asset(name: str, request: Request) -> Response:
    found = assets().get(name)
    if found is None or name == "page.html":
        raise HTTPException(404, "there is no such file")
    return _send(request, found, "no-cache")
