"""What every request passes first: who asks, from where, and how much; and what is counted of it.

Bearer tokens have roles: read < run < admin. A service without any token, which listens on loopback alone, takes everybody on the
machine for an administrator; the first token ends that. There a browser's requests under another host's name are refused, so that
no web page can reach it by making its own name point to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megapd.scheduler.service.core import CanonicalJSON, Service, problem, unavailable
from megapd.scheduler.store import Unavailable

BODY_SECONDS = 30.0  # for a request's body to arrive
GUARDED = ("/v1", "/metrics", "/openapi.json")  # what needs a token; the rest (health, the page without its data) does not


class Guard:
    """ASGI middleware: 401 without a good token before anything of the body is read, 413, 408, and the metrics.

    A scope that has its caller already is of this process (see local.py): it passes.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._authenticator, self._metrics = app, service.authenticator, service.metrics
        self._max = service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "caller" in scope:
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, sending)
            else:
                await self._app(scope, receive if scope["method"] in ("GET", "HEAD") else self._limited(receive), sending)
        finally:
            route = str(getattr(scope.get("route"), "path", "other"))
            self._metrics.count(scope["method"], route, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> CanonicalJSON | None:
        headers: dict[bytes, bytes] = {}
        for key, value in scope["headers"]:
            headers[key] = b"" if key == b"authorization" and key in headers else value
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max:
            return problem(413, f"the body is longer than scheduler.max_body_bytes, {self._max}", Connection="close")
        if not scope["path"].startswith(GUARDED):
            return None
        try:
            if self._authenticator.open():
                if not _local(headers.get(b"host", b"")):
                    return problem(421, "host: without tokens, this service answers to localhost alone")
                scope["caller"] = ("anybody", "admin")
                return None
            scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            found = self._authenticator.find(token.strip()) if scheme.lower() == "bearer" and token else None
        except Unavailable as error:
            return unavailable(error)
        if found is None:
            what = "authorization: a bearer token is needed; `megapd scheduler token ROLE` makes one"
            return problem(401, what, **{"WWW-Authenticate": "Bearer"})
        scope["caller"] = found
        return None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            if received < 0:
                return await receive()  # after the body: waits for the client to go
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:g} s") from error
            received += len(message.get("body", b""))
            if received > self._max:
                raise HTTPException(413, f"the body is longer than scheduler.max_body_bytes, {self._max}")
            if not message.get("more_body", False):
                received = -1
            return message

        return limited


def _local(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name[: name.rindex("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]
    return name in ("localhost", "[::1]") or (name.startswith("127.") and name.replace(".", "").isdigit())
