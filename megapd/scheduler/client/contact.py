"""Carried out of megapd/teacher/leases.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.client.http import Api, Away, Refusal

T = TypeVar("T")


log = logging.getLogger(__name__)


CALL_SECONDS = 5.0  # for one answer: with the default lease, two beats may hang before it runs out


class _Contact:
    """The service as one client sees it. Tells the user once that it went away, once that it is back."""

    def __init__(self, settings: SchedulerConfig, without: str) -> None:
        """without: what happens meanwhile. UserError where token or certificate cannot be read."""
        self.api = Api(settings, timeout_seconds=CALL_SECONDS)
        self._without, self._trouble = without, ""

    def ask(self, read: Callable[[Any], T], method: str, path: str, body: Any = None) -> T:
        """What `read` makes of the answer. Raises Refusal, or Away: of an answer that is no scheduler's, too."""
        tree = self.api.ask(method, path, body)
        try:
            return read(tree)
        except (LookupError, TypeError, ValueError) as error:
            raise Away(f"scheduler.url: {self.api.url} does not answer {path} as a scheduler does: {error!r}") from error

    def failed(self, error: Exception) -> None:
        """An answer did not come, or was a refusal."""
        trouble = f"{type(error).__name__} {getattr(error, 'status', '')}"
        if trouble != self._trouble:
            self._trouble = trouble
            unknown = None if isinstance(error, Away | Refusal) else error
            log.warning("%s; %s", error, self._without, exc_info=unknown)

    def heard(self) -> None:
        if self._trouble:
            self._trouble = ""
            log.warning("the scheduler at %s answers again", self.api.url)


def _mistake(error: Refusal, role: str) -> UserError:
    """A refusal as the error that ends a program at its start."""
    if error.status in (401, 403):
        fix = f"name a file that holds what `megapd scheduler token {role}` printed"
        return UserError(f"scheduler.token: scheduler.url refuses it: {error}; {fix}")
    return UserError(str(error))
