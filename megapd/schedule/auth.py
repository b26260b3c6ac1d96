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

from fastapi import HTTPException, Request, Security
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from megapd.schedule.journal import ROLES, find_token, list_tokens, token_hash
from megapd.schedule.lanes import Lanes, try_lane
from megapd.schedule.store import Store, Unavailable
from megapd.schedule.tables import canonical

KNOWN_SECONDS = 5.0  # that a token is taken for valid without a look into the store: how long a revoked one lives on
BODY_SECONDS = 30.0  # for a request's body to arrive
GUARDED = ("/v1", "/metrics", "/openapi.json")  # what needs a token; the rest (health, the page without its data) does not

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Figures:
    """Of one service for Prometheus. Names begin with megapd_scheduler_."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "megapd_scheduler_"
        self.requests = Counter(f"{name}requests", "Answers", ["method", "route", "status"], registry=registry)
        self.seconds = Histogram(f"{name}seconds", "Of an answer", ["route"], registry=registry, buckets=_SECONDS)
        self.replicas = Gauge(f"{name}replicas", "Replicas with a lease", ["state"], registry=registry)
        self.oldest = Gauge(f"{name}oldest_beat_seconds", "Age of the oldest beat of a lease", registry=registry)
        self.streams = Gauge(f"{name}streams", "Event streams that are open", registry=registry)


class Tokens:
    """Who a token stands for. `open`: there are no tokens, and need be none."""

    def __init__(self, store: Store, *, loopback: bool) -> None:
        self._store = store
        self._known: dict[str, tuple[float, tuple[str, str]]] = {}
        self._needed = not loopback  # and once needed, needed until the end: the last one revoked opens nothing
        self._open_until = 0.0

    def open(self) -> bool:
        now = time.monotonic()
        if not self._needed and now >= self._open_until:
            self._needed = bool(self._store.read(list_tokens))
            self._open_until = now + 1.0
        return not self._needed

    def find(self, token: str) -> tuple[str, str] | None:
        """(name, role), None of an unknown one."""
        hashed, now = token_hash(token), time.monotonic()
        known = self._known.get(hashed)
        if known is not None and now < known[0]:
            return known[1]
        found = self._store.read(lambda connection: find_token(connection, hashed))
        if found is None:
            self._known.pop(hashed, None)
            return None
        self._known[hashed] = (now + KNOWN_SECONDS, found)
        return found

    def forget(self) -> None:
        """Look into the store again, now."""
        self._known.clear()
        self._open_until = 0.0


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


_bearer = Security(HTTPBearer(auto_error=False, description="of the role that the operation names, or a higher one"))


class Needs:
    """Dependency of a route: the caller's name, if its role is high enough, else 403."""

    def __init__(self, role: str) -> None:
        self._least = ROLES.index(role)
        self._text = f"authorization: this needs a token of role {role}"

    async def __call__(self, request: Request, _: Any = _bearer) -> str:
        name, role = request.scope["caller"]
        if ROLES.index(role) < self._least:
            raise HTTPException(403, f"{self._text}; yours is of role {role}")
        return name
