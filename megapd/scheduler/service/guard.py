"""What every request passes first: who asks, from where, and how much; and what is counted of it.

Bearer tokens have roles: read < run < admin. A service without any token, which listens on loopback alone, takes everybody on the
machine for an administrator; the first token ends that. There a browser's requests under another host's name are refused, so that
no web page can reach it by making its own name point to 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException

from megapd.scheduler.service.access import Tokens
from megapd.scheduler.service.figures import Figures
from megapd.scheduler.service.lanes import Lanes, try_lane
from megapd.scheduler.store.database import Unavailable
from megapd.scheduler.store.tables import canonical

BODY_SECONDS = 30.0  # for a request's body to arrive


GUARDED = ("/v1", "/metrics", "/openapi.json")  # what needs a token; the rest (health, the page without its data) does not


Message = MutableMapping[str, Any]


Receive = Callable[[], Awaitable[Message]]


Send = Callable[[Message], Awaitable[None]]


App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware: 401 without a good token before anything of the body is read, 413, 408, and the figures."""

    def __init__(self, app: App, tokens: Tokens, figures: Figures, lanes: Lanes, max_body_bytes: int) -> None:
        self._app, self._tokens, self._figures, self._max = app, tokens, figures, max_body_bytes
        self._lanes = lanes
        self._series: dict[tuple[str, str, int], tuple[Any, Any]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
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
                await _answer(sending, *refusal)
                return
            if scope["method"] not in ("GET", "HEAD"):
                receive = self._limited(receive)
            lane = self._lanes.find(scope["method"], scope["path"], scope["query_string"], scope.get("caller", ("", "read"))[1])
            if lane is not None:
                try:
                    message = await receive()
                except HTTPException as error:
                    await _answer(sending, error.status_code, str(error.detail), ((b"connection", b"close"),))
                    return
                whole = message["type"] == "http.request" and not message.get("more_body", False)
                told = try_lane(*lane, message.get("body", b"")) if whole else None
                if told is not None:
                    scope["lane"] = lane[0].route
                    await _send(sending, 200, told)
                    return
                receive = _again(message, receive)
            await self._app(scope, receive, sending)
        finally:
            self._count(scope, status, time.perf_counter() - started)

    def _refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str, tuple[tuple[bytes, bytes], ...]] | None:
        headers: dict[bytes, bytes] = {}
        for key, value in scope["headers"]:
            headers[key] = b"" if key == b"authorization" and key in headers else value
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max:
            return 413, f"the body is longer than scheduler.max_body_bytes, {self._max}", ((b"connection", b"close"),)
        path = scope["path"]
        if not path.startswith(GUARDED):
            return None
        try:
            if self._tokens.open():
                if not _local(headers.get(b"host", b"")):
                    return 421, "host: without tokens, this service answers to localhost alone", ()
                scope["caller"] = ("anybody", "admin")
                return None
            scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            found = self._tokens.find(token.strip()) if scheme.lower() == "bearer" and token else None
        except Unavailable as error:
            return 503, f"the database does not answer: {error}", ((b"retry-after", b"2"),)
        if found is None:
            challenge = (b"www-authenticate", b"Bearer")
            return 401, "authorization: a bearer token is needed; `megapd scheduler token ROLE` makes one", (challenge,)
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

    def _count(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        route = str(scope.get("lane") or getattr(scope.get("route"), "path", "other"))
        method: str = scope["method"] if scope["method"] in ("GET", "POST", "PUT", "DELETE") else "other"
        key = (method, route, status)
        if key not in self._series:
            self._series[key] = self._figures.requests.labels(method, route, str(status)), self._figures.seconds.labels(route)
        counter, histogram = self._series[key]
        counter.inc()
        histogram.observe(seconds)


def _again(first: Message, receive: Receive) -> Receive:
    """`receive` as it was before `first` was taken from it."""
    waiting = [first]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(send: Send, status: int, detail: str, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    await _send(send, status, canonical({"detail": detail}).encode(), headers)


async def _send(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def _local(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name[: name.rindex("]") + 1] if name.startswith("[") and "]" in name else name.partition(":")[0]
    return name in ("localhost", "[::1]") or (name.startswith("127.") and name.replace(".", "").isdigit())
