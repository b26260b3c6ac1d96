"""The service's API as its clients call it: runs, replicas, the registry, the command line."""

from __future__ import annotations

import ssl
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from megapd.config import SchedulerConfig
from megapd.errors import UserError

TIMEOUT_SECONDS = 30.0
PAGE = 1000  # entries a page


class Away(Exception):
    """The service does not answer, or says that it cannot now (5xx, 429)."""


class Refusal(UserError):
    """The service said no. status: its HTTP code; current: what is there instead, of 409."""

    def __init__(self, message: str, status: int, current: Any) -> None:
        super().__init__(message)
        self.status, self.current = status, current


class Api:
    """Thread-safe. Every call may be repeated: a repeat changes nothing there."""

    def __init__(
        self,
        settings: SchedulerConfig,
        *,
        retry_seconds: float = 0.0,
        timeout_seconds: float = TIMEOUT_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """retry_seconds: how long a call is repeated while the service is away, 0: tried once. transport: of the service in this
        process. Raises UserError where token or certificate cannot be read."""
        assert settings.url is not None
        self.url, self._retry_seconds = settings.url.rstrip("/"), retry_seconds
        headers, verify = {}, True if settings.root_certificate is None else _authority(settings)
        if settings.token is not None:
            headers["Authorization"] = f"Bearer {_token(settings)}"
        try:
            self._client = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout_seconds, verify=verify, transport=transport
            )
        except httpx.InvalidURL as error:
            raise UserError(f"scheduler.url: {self.url}: {error}; give http://HOST:PORT or https://HOST:PORT") from error

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The tree of the answer, None if it is empty. Raises Refusal, or Away."""
        return self.answer(method, path, body)[1]

    def answer(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(HTTP code below 300, the tree)."""
        if not self._retry_seconds:
            return self._once(method, path, body)
        away = retry_if_exception(lambda error: isinstance(error, Away))
        wait, stop = wait_random_exponential(multiplier=0.2, max=5.0), stop_after_delay(self._retry_seconds)
        return Retrying(retry=away, wait=wait, stop=stop, reraise=True)(self._once, method, path, body)

    def pages(self, path: str, key: str, after: int) -> list[dict[str, Any]]:
        """All entries that follow `after` in the order of their field `key`, a page at a time."""
        found: list[dict[str, Any]] = []
        while True:
            last = found[-1][key] if found else after
            page = self.ask("GET", f"{path}?after={last}&limit={PAGE}")
            found += page
            if len(page) < PAGE:
                return found

    def close(self) -> None:
        self._client.close()

    def _once(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Away(f"scheduler.url: {self.url} does not answer ({error or type(error).__name__})") from error
        if response.status_code >= 500 or response.status_code == 429:
            raise Away(f"scheduler.url: {self.url} answers {response.status_code}: {_detail(response)}")
        if 300 <= response.status_code < 400:
            # Not followed: the token would go to whoever is named there.
            where = response.headers.get("location", "nowhere")
            raise Away(f"scheduler.url: {self.url} redirects to {where}; name the scheduler itself")
        if response.status_code >= 400:
            problem = _problem(response)
            raise Refusal(f"scheduler: {_detail(response)}", response.status_code, problem.get("current"))
        try:
            return response.status_code, response.json() if response.content else None
        except ValueError as error:
            raise Away(f"scheduler.url: {self.url} answers {path} with what is no JSON; is it a scheduler?") from error


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        tree = response.json()
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _detail(response: httpx.Response) -> str:
    return str(_problem(response).get("detail") or response.text)[:500]


def _authority(settings: SchedulerConfig) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(settings.root_certificate))
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"scheduler.root_certificate: {settings.root_certificate}: {reason}; name a PEM file") from error


def _token(settings: SchedulerConfig) -> str:
    assert settings.token is not None
    try:
        token = settings.token.read_text().strip()
    except OSError as error:
        raise UserError(f"scheduler.token: {settings.token}: {error.strerror or error}; name a file that can be read") from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"scheduler.token: {settings.token} holds no token; write what `megapd scheduler token run` printed")
    return token
