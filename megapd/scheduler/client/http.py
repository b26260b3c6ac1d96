"""The service's API as its clients call it (runs, replicas, the registry, the command line), and whether it is there."""

from __future__ import annotations

import logging
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from megapd.config import SchedulerConfig
from megapd.errors import UserError, masked
from megapd.network import check_transport, client_tls, read_secret

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
CALL_SECONDS = 5.0  # for one answer, of who asks beside other work: with the default lease, two beats may hang before it runs out
COMPLAINTS = 100  # that are remembered, so as not to be logged again
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
        process. Raises UserError where token or certificate cannot be read, or the token would cross a network in the clear."""
        assert settings.url is not None
        self.url, self._retry_seconds = settings.url.rstrip("/"), retry_seconds
        root, has_token = settings.root_certificate, settings.token is not None
        check_transport("scheduler", self.url, token=has_token, insecure=settings.insecure, authority=root is not None)
        headers, verify = {}, True if root is None else client_tls("scheduler.root_certificate", root)
        if has_token:
            headers["Authorization"] = f"Bearer {_token(settings)}"
        # A proxy of the environment would be told the token where there is no TLS.
        proxies = not has_token or self.url.startswith("https://")
        try:
            self._client = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=timeout_seconds,
                verify=verify,
                transport=transport,
                trust_env=proxies,
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
        return patiently(self._retry_seconds)(self._once, method, path, body)

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


def patiently(seconds: float, pause: float = 5.0) -> Retrying:
    """Repeats a call while the service is away, for `seconds`, after random pauses that grow up to `pause` seconds."""
    away, wait = retry_if_exception_type(Away), wait_random_exponential(multiplier=0.2, max=pause)
    return Retrying(retry=away, wait=wait, stop=stop_after_delay(seconds), reraise=True)


def _problem(response: httpx.Response) -> dict[str, Any]:
    try:
        tree = response.json()
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _detail(response: httpx.Response) -> str:
    return masked(str(_problem(response).get("detail") or response.text))[:500]


def _token(settings: SchedulerConfig) -> str:
    assert settings.token is not None
    token = read_secret(settings.token, "scheduler.token").decode("latin-1").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"scheduler.token: {settings.token} holds no token; write what `megapd scheduler token run` printed")
    return token


class Contact:
    """Tells the user once that the service went away, or refuses, and once that it is back. For any thread.

    api  what calls it
    up   whether it answered last: only then is it worth while to wait for an answer
    """

    def __init__(self, api: Api, without: str) -> None:
        """without: what happens while there is no service."""
        self.api, self.up = api, False
        self._without, self._trouble = without, ""
        self._complaints: set[str] = set()

    def failed(self, error: Exception) -> None:
        """An answer did not come, or was a refusal."""
        self.up = False
        trouble = f"{type(error).__name__} {getattr(error, 'status', '')}"
        if trouble != self._trouble:
            self._trouble = trouble
            unknown = None if isinstance(error, Away | Refusal) else error
            log.warning("%s; %s", error, self._without, exc_info=unknown)

    def heard(self) -> None:
        self.up = True
        if self._trouble:
            self._trouble = ""
            log.warning("the scheduler at %s answers again", self.api.url)

    def complain(self, text: str) -> None:
        """Log an error, once."""
        if text in self._complaints:
            return
        log.error("%s", text)
        if len(self._complaints) == COMPLAINTS:
            self._complaints.clear()
        self._complaints.add(text)


def mistake(error: Refusal, role: str) -> UserError:
    """A refusal as the error that ends a program at its start."""
    if error.status in (401, 403):
        fix = f"name a file that holds what `megapd scheduler token {role}` printed"
        return UserError(f"scheduler.token: scheduler.url refuses it: {error}; {fix}")
    return UserError(str(error))
